"""Models on the Hugging Face hub: their headers when they are opened, their files when something is first to be read.

Opening resolves the revision to a commit and brings the small files of that commit (`SIDE_FILES`) into the hub's cache. The headers of the
safetensors files that the cache lacks are read in ranges, so that names, shapes and dtypes are known, and with them all that can be wrong
with a recipe. `prepare` downloads those files, of the same commit, and compares each with the header that was promised.
"""

from __future__ import annotations

import glob
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau.checkpoint.disk import SIDE_FILES
from thetau.checkpoint.safetensors import (
    HEADER_LIMIT,
    SafetensorsFile,
    SafetensorsSource,
    check_shard,
    exists,
    read_weight_map,
    shard_path,
)
from thetau.checkpoint.source import Lack, Source, leaves, span
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 1 << 14  # bytes that are asked for first: the header of a file of a few hundred tensors fits
AT_ONCE = 8  # headers that are asked for side by side
PEEK = 1 << 20  # bytes of one read that do not yet need the file: a row, a buffer, which alignment compares
PEEKS = 1 << 24  # bytes of all such reads of a model; what reads more wants the files


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A repository at one commit: the sizes of its files, and the folder of the hub's cache in which they lie or will lie."""

    repository: str
    sizes: Mapping[str, int]
    folder: Path

    @property
    def revision(self) -> str:
        """The commit's hash."""
        return self.folder.name

    @property
    def label(self) -> str:
        """What notes and messages call it."""
        return f"{self.repository}@{self.revision[:8]}"

    def lacks(self, name: str) -> bool:
        """Whether the cache has no such file yet."""
        return not exists(self.folder / name)

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from `start`, from the hub.

        Raises:
            CheckpointError: the hub does not give them.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, name, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        except Exception as error:  # whatever the HTTP library below huggingface_hub raises; it has changed more than once
            raise CheckpointError(
                f"{self.label}: the hub does not give bytes {start}:{start + count} of {name} ({reason(error)}). Run again."
            ) from error
        raw = bytes(response.content)
        if response.status_code == 200:  # a server without ranges: it gave all of it
            raw = raw[start : start + count]
        if len(raw) != count:
            raise CheckpointError(
                f"{self.label}: asked for {count} bytes of {name} from {start}, the hub gave {len(raw)}; the file has {self.sizes[name]} bytes. "
                "Run again."
            )
        return raw

    def head(self, name: str) -> bytes:
        """The first bytes of a safetensors file, to the end of its header where its length is a possible one."""
        size = self.sizes[name]
        raw = self.read(name, 0, min(FIRST, size)) if size else b""
        end = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < end <= min(size, 8 + HEADER_LIMIT):
            raw += self.read(name, len(raw), end - len(raw))
        return raw[:end]

    def download(self, names: Iterable[str]) -> None:
        """Bring files into the cache; those that are there already, or in part where huggingface_hub keeps parts, are not read again.

        Raises:
            CheckpointError: the hub does not give them, or the disk does not take them.
        """
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(self.repository, revision=self.revision, allow_patterns=[glob.escape(name) for name in names])
        except Exception as error:
            raise CheckpointError(
                f"{self.label}: the download into {self.folder} failed ({reason(error)}). Run again: files that are complete are kept."
            ) from error


class HubFile(SafetensorsFile):
    """A file that the cache lacked when it was opened: its header from the hub, its data from the hub in ranges until it is there."""

    local = True

    def __init__(self, commit: Commit, name: str, head: bytes) -> None:
        self.commit, self.name, self._head = commit, name, head
        self.path = commit.folder / name
        self.size = commit.sizes[name]
        self.stamp = (self.size,)
        self._arrived: SafetensorsFile | None = None
        self._parse(lambda count, offset: head[offset : offset + count])

    def __reduce__(self) -> tuple[Any, ...]:
        return HubFile, (self.commit, self.name, self._head)

    def arrive(self) -> SafetensorsFile:
        """The downloaded file.

        Raises:
            CheckpointError: it is not there, or not what its header promised.
        """
        if self._arrived is None:
            file = SafetensorsFile(Path(self.path))
            if (file.size, file.header_bytes) != (self.size, self.header_bytes):
                what = f"it has {file.size} bytes instead of {self.size}" if file.size != self.size else "it holds other tensors"
                raise CheckpointError(
                    f"{self.path}: is not the file of which {self.commit.repository} gave the header before the download: {what}. "
                    "Remove it from the cache, then run again."
                )
            self._arrived = file
        return self._arrived

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Read what lies from `offset` after the header on into a buffer, all of it."""
        if self._arrived is not None:
            self._arrived.fill(view, offset, what)
        elif len(view):
            view[:] = self.commit.read(self.name, self.start + offset, len(view))

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self.arrive().descriptor

    def unchanged(self) -> bool:
        """Whether it is what was opened; on the hub, a commit's files do not change."""
        return self._arrived is None or self._arrived.unchanged()


class HubSource(Source):
    """A model of which the cache lacks files: what headers tell without them, the rest once they were downloaded."""

    def __init__(self, commit: Commit, stored: SafetensorsSource, files: Mapping[str, HubFile]) -> None:
        self.commit, self.stored, self.waiting = commit, stored, dict(files)
        self.label, self.folder, self.key = stored.label, stored.folder, key_of(commit.folder)
        self.specs, self.metadata = stored.specs, stored.metadata
        self.degree, self.partial = stored.degree, stored.partial
        self._here = False
        self._peeked: dict[tuple[str, int, int], Tensor] = {}
        self._room = PEEKS
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        left = {"_lock", "_here", "_peeked"}  # another machine may have another cache
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here, self._peeked, self._lock = False, {}, threading.RLock()

    @property
    def notes(self) -> tuple[str, ...]:
        """What its files say, and what was downloaded."""
        return (*self.stored.notes, *self._notes)

    def lacking(self) -> Lack | None:
        """The files that the cache has not yet."""
        sizes = [] if self._here else [file.size for name, file in self.waiting.items() if self.commit.lacks(name)]
        return Lack(sum(sizes), self.commit.folder) if sizes else None

    def prepare(self) -> None:
        """Download what the cache lacks, once, and compare it with the headers.

        Raises:
            CheckpointError: there is no room for it, the hub does not give it, or it is not what was promised.
        """
        with self._lock:
            if self._here:
                return
            lack = self.lacking()
            if lack is not None:
                check_room([lack])
                self.commit.download([name for name in self.waiting if self.commit.lacks(name)])
                self._notes = (f"{self.commit.label}: {_size(lack.nbytes)} were downloaded into {self.commit.folder}.",)
            for file in self.waiting.values():
                file.arrive()
            self._here = True
            self._peeked.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows as stored. A few small ones come from the hub; more of them bring the files."""
        if not self._here:
            rows = self._peek(name, *span(self.specs[name], start, stop))
            if rows is not None:
                return rows
            self.prepare()
        return self.stored.read(name, start, stop)

    def _peek(self, name: str, start: int, stop: int) -> Tensor | None:
        spec, at = self.specs[name], (name, start, stop)
        nbytes = (stop - start) * spec.row_elements * spec.dtype.itemsize
        with self._lock:
            if at not in self._peeked:
                if nbytes > PEEK or nbytes > self._room or self.lacking() is None:
                    return None
                self._peeked[at] = self.stored.read(name, start, stop)
                self._room -= nbytes + FIRST  # a request costs something too
            return self._peeked[at].clone()

    def place(self, name: str) -> tuple[int, int] | None:
        """The downloaded file of a tensor and the byte at which its first element lies."""
        self.prepare()
        return self.stored.place(name)

    def has_place(self, name: str) -> bool:
        """Yes, once it was downloaded."""
        return True

    def fingerprint(self) -> str:
        """That of the files, which it takes."""
        self.prepare()
        return self.stored.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """SHA-256 of each file's header, by file name."""
        return self.stored.header_hashes()

    def changed_files(self) -> list[str]:
        """Files that are no longer what was downloaded."""
        return self.stored.changed_files()


def look(identifier: str) -> Commit | None:
    """A repository as it stands, its small files brought into the cache; None where the hub does not tell, and only the cache can.

    `identifier` is `org/name` or `org/name@revision`.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    name, _, revision = identifier.partition("@")
    api, timeout = HfApi(), constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = api.model_info(name, revision=revision or None, files_metadata=True, timeout=timeout)
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(SIDE_FILES)))
        if folder.name != info.sha:  # it has changed between the two
            info = api.model_info(name, revision=folder.name, files_metadata=True, timeout=timeout)
        folder.mkdir(parents=True, exist_ok=True)  # there may be no small file
    except Exception:  # out of reach, unknown, gated: the download says it, or finds the cache complete
        return None
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    return Commit(repository=name, sizes=sizes, folder=folder)


def open_headers(commit: Commit, main: str) -> HubSource | None:
    """A model by the headers of its files, `main` being the one file or the index; None where the cache has all of them.

    Raises:
        CheckpointError: the index and the files do not belong together, a header is damaged, or the hub does not give it.
    """
    index = commit.folder / main
    weight_map = read_weight_map(index) if main.endswith(".index.json") else None
    names = list(dict.fromkeys(weight_map.values())) if weight_map is not None else [main]
    for name in names:
        check_shard(name, index)
        if name not in commit.sizes:
            raise CheckpointError(f"{index}: names the shard {name!r}, which {commit.label} does not hold. Tell its authors.")
    lost = [name for name in names if commit.lacks(name)]
    if not lost:
        return None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        heads = list(pool.map(commit.head, lost))
    waiting = {name: HubFile(commit, name, head) for name, head in zip(lost, heads, strict=True)}
    files = {
        name: waiting[name] if name in waiting else SafetensorsFile(shard_path(commit.folder, name, index)) for name in names
    }
    return HubSource(commit, SafetensorsSource(commit.folder, files, weight_map=weight_map), waiting)


def download(identifier: str, text: str) -> Path:
    """A whole snapshot, or the cache's when offline; safetensors first, torch files only where there are none. `text`: what a user wrote.

    Raises:
        CheckpointError: there is no such model within reach.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = identifier.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors", *SIDE_FILES]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.bin", *SIDE_FILES]))
    except Exception as error:
        raise CheckpointError(
            f"{text}: no such file or folder, and the hub has no such model within reach ({reason(error)})."
        ) from error
    return folder


def key_of(folder: Path) -> str:
    """The key of the model in a snapshot's folder, the same before its files were downloaded and after."""
    return f"hub:{folder.parent.parent.name}@{folder.name}"


def bring(sources: Iterable[Source]) -> None:
    """Prepare every stored source below some sources; what they download must find room together before the first byte.

    Raises:
        CheckpointError: there is too little room, or a download failed.
    """
    stored = leaves(sources)
    check_room([lack for source in stored if (lack := source.lacking()) is not None])
    for source in stored:
        source.prepare()


def check_room(lacking: Iterable[Lack]) -> None:
    """Refuse a download for which its disk has no room.

    Raises:
        CheckpointError: with how much is needed and how much is free.
    """
    disks: dict[int, list[Lack]] = {}
    for lack in lacking:
        disks.setdefault(lack.folder.stat().st_dev, []).append(lack)
    for group in disks.values():
        need, free = sum(lack.nbytes for lack in group), shutil.disk_usage(group[0].folder).free
        if need > free:
            raise CheckpointError(
                f"{group[0].folder}: {_size(need)} are to be downloaded, and its disk has {_size(free)} free. Free some space, or set "
                "HF_HOME to a folder on another disk. Nothing was downloaded."
            )


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e3:.1f} kB"
