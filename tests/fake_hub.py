"""A small hub on 127.0.0.1 that answers as huggingface_hub wants, keeps account of what was asked, and fails where a test says so."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """One request: its method and path, and the bytes of the body that went back."""

    method: str
    path: str
    nbytes: int
    ranged: bool

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass
class FakeHub:
    """Repositories by name: commits in order, each of them files by name; `main` is the last one.

    - `gated`: repositories whose files are refused.
    - `cut`: after so many bytes the connection ends, once, when this file is downloaded.
    - `broken`: files that are refused with an error of the server, headers aside.
    - `swapped`: what a whole download gives in place of a file.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    swapped: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    endpoint: str = ""

    def push(self, repository: str, folder: Path) -> str:
        """The files of a folder as a new commit; its hash."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        known = self.commits.setdefault(repository, {})
        revision = hashlib.sha1(f"{repository} {len(known)}".encode()).hexdigest()
        known[revision] = files
        return revision

    def head(self, repository: str) -> str:
        return list(self.commits[repository])[-1]

    @property
    def nbytes(self) -> int:
        """Bytes that were given so far."""
        return sum(asked.nbytes for asked in self.asked)

    def downloads(self, suffix: str = ".safetensors") -> list[str]:
        """Files that were asked for whole, or on from where a download had ended, in their order by name."""
        whole = [asked for asked in self.asked if asked.method == "GET" and asked.file.endswith(suffix)]
        return sorted(f"{asked.path.split('/resolve/')[0].strip('/')}/{asked.file}" for asked in whole if not asked.ranged)

    def forget(self) -> None:
        self.asked.clear()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers while the block runs."""
    hub = FakeHub()

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._tell("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _commit(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = self.fake.commits.get(repository)
        if known is None:
            self._refuse(401, "RepoNotFound")
            return None
        revision = list(known)[-1] if revision == "main" else revision
        if revision not in known:
            self._refuse(404, "RevisionNotFound")
            return None
        return revision, known[revision]

    def _tell(self, repository: str, rest: list[str]) -> None:
        found = self._commit(repository, rest[1] if rest else "main")
        if found is None:
            return
        revision, files = found
        if rest[:1] == ["tree"]:
            listing: Any = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)} for name, content in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(content), "blobId": _etag(content)} for name, content in files.items()]
            listing = {"id": repository, "sha": revision, "siblings": siblings, "tags": [], "private": False}
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str) -> None:
        found = self._commit(repository, revision)
        if found is None:
            return
        revision, files = found
        if repository in self.fake.gated:
            self._refuse(403, "GatedRepo")
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content, asked = files[name], self.headers.get("Range")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if asked is None:
            if name in self.fake.broken and self.command == "GET":
                self._refuse(500, "")
                return
            self._send(
                200, self.fake.swapped.get(name, content), headers, end=self.fake.cut.pop(name, None) if self._gets else None
            )
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(content)
        part = content[start:stop]
        self._send(206, part, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})

    @property
    def _gets(self) -> bool:
        return self.command == "GET"

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, end: int | None = None) -> None:
        sent = body[:end] if self._gets else b""
        ranged = "Range" in self.headers
        self.fake.asked.append(Asked(self.command, unquote(urlsplit(self.path).path), len(sent), ranged))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)
        if end is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
