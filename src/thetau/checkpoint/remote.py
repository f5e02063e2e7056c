"""Checkpoints behind URLs, through fsspec: `s3://bucket/model`, `gs://…`, `memory://…`, whatever library is installed for them.

Tensors are read in ranges, as from a disk. Object stores have no rename, so an output is finished on a disk first and then copied, the
record that says that it is whole last.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau.checkpoint.disk import is_side_file
from thetau.checkpoint.safetensors import HEADER_LIMIT, SafetensorsFile, SafetensorsSource, parse_weight_map
from thetau.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    pass

URL = re.compile(r"[a-z][a-z0-9+.-]*://.+|[a-z][a-z0-9+.-]+::.+", re.DOTALL)
INDEX = "model.safetensors.index.json"
SIDE_BYTES = 50_000_000
LAST = "thetau.json"
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "created", "LastModified", "last_modified")


def is_url(text: str) -> bool:
    """Whether this is a URL and not a path or a hub id."""
    return URL.fullmatch(text) is not None


class RemoteFile(SafetensorsFile):
    """One file behind a URL: its header, checked, and its data in ranges."""

    local = False

    def __init__(self, url: str) -> None:
        self.path = url
        self._fs, self._at = _file_system(url)
        try:
            self.stamp = self._look()
            self.size = int(self.stamp[0])
            self._parse(lambda count, offset: self._range(offset, count))
        except OSError as error:
            raise CheckpointError(f"{url}: cannot be read: {error}. Check the address and your rights to it.") from error

    @property
    def place(self) -> str:
        """The URL."""
        return str(self.path)

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Read what lies from `offset` after the header on into a buffer, all of it."""
        if not len(view):
            return
        try:
            raw = self._range(self.start + offset, len(view))
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading {what} failed: {error}. Run again with `--resume`.") from error
        if len(raw) != len(view):
            raise CheckpointError(
                f"{self.path}: the file ended inside {what}; it changed while it was read. Restore it, then run again."
            )
        view[:] = raw

    def _look(self) -> tuple[int | str, ...]:
        """Size and version, by whichever of the names for it the store uses."""
        info = self._fs.info(self._at)
        version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
        return int(info["size"]), version.strip('"')

    def _range(self, start: int, count: int) -> bytes:
        return bytes(self._fs.cat_file(self._at, start=start, end=start + count))

    def unchanged(self) -> bool:
        """Whether the store still names the same version."""
        try:
            self._fs.invalidate_cache()
            return self._look() == self.stamp
        except OSError:
            return False


def open_url(url: str) -> SafetensorsSource:
    """A safetensors file, or a folder with one file or with shards and an index.

    Raises:
        CheckpointError: nothing of the kind is there, or its library is not installed.
    """
    url = url.rstrip("/")
    if url.endswith(".safetensors"):
        return SafetensorsSource(url, {url.rsplit("/", 1)[-1]: RemoteFile(url)})
    fs, at = _file_system(url)
    try:
        names = {
            str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry.get("size") or 0) for entry in fs.ls(at, detail=True)
        }
    except OSError as error:
        raise CheckpointError(f"{url}: cannot be listed: {error}. Check the address and your rights to it.") from error
    side = _side_files(fs, at, names)
    if INDEX in names:
        if names[INDEX] > HEADER_LIMIT:
            raise CheckpointError(f"{url}/{INDEX}: is far too big for an index ({names[INDEX]} bytes).")
        try:
            weight_map = parse_weight_map(f"{url}/{INDEX}", bytes(fs.cat_file(f"{at}/{INDEX}")).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{url}/{INDEX}: cannot be read: {error}.") from error
        lost = sorted({name for name in weight_map.values() if name not in names})
        if lost:
            raise CheckpointError(f"{url}/{INDEX}: names {lost[0]!r}, which is not beside it.")
        files: dict[str, SafetensorsFile] = {name: RemoteFile(f"{url}/{name}") for name in dict.fromkeys(weight_map.values())}
        return SafetensorsSource(url, files, weight_map=weight_map, folder=side)
    found = (
        ["model.safetensors"] if "model.safetensors" in names else sorted(name for name in names if name.endswith(".safetensors"))
    )
    if len(found) != 1:
        raise CheckpointError(
            f"{url}: holds {len(found)} safetensors files and no index. It holds: {', '.join(sorted(names)[:6]) or 'nothing'}."
        )
    return SafetensorsSource(url, {found[0]: RemoteFile(f"{url}/{found[0]}")}, folder=side)


def check_free(url: str) -> None:
    """Refuse a target that is there.

    Raises:
        OutputError: it exists, or its store cannot be reached.
    """
    fs, at = _file_system(url, OutputError)
    try:
        there = fs.exists(at)
    except OSError as error:
        raise OutputError(f"{url}: cannot be reached: {error}.") from error
    if there:
        raise OutputError(f"{url}: exists. An output is never mixed with older files: give a new name, or remove it first.")


def upload(output: Path, url: str) -> None:
    """Copy a finished output, weights first and its record last: where `thetau.json` is, everything is.

    Raises:
        OutputError: the store refused a file; what had been copied is removed again.
    """
    fs, at = _file_system(url, OutputError)
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    try:
        for path in sorted(files, key=lambda path: (path.name == LAST, path.suffix != ".safetensors", str(path))):
            fs.put_file(str(path), at if path == output else f"{at}/{path.relative_to(output).as_posix()}")
    except OSError as error:
        if fs.exists(at):
            fs.rm(at, recursive=True)
        raise OutputError(f"{url}: cannot be written: {error}. The output was removed again there.") from error


def _file_system(url: str, kind: type[CheckpointError] | type[OutputError] = CheckpointError) -> tuple[Any, str]:
    try:
        import fsspec

        fs, at = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise kind(
            f"{url}: needs a library that is not installed ({error}). `pip install fsspec s3fs` reads s3://, for example."
        ) from error
    except (OSError, ValueError) as error:
        raise kind(f"{url}: cannot be opened: {error}.") from error
    return fs, str(at)


def _side_files(fs: Any, at: str, names: dict[str, int]) -> Path | None:
    """Config and tokenizer files, copied to a folder that lives as long as this process."""
    wanted = [name for name, size in names.items() if is_side_file(name) and size < SIDE_BYTES]
    if "config.json" not in wanted:
        return None
    folder = Path(tempfile.mkdtemp(prefix="thetau-"))
    weakref.finalize(fs, shutil.rmtree, folder, ignore_errors=True)
    for name in wanted:
        if name == Path(name).name and not name.startswith("."):
            (folder / name).write_bytes(bytes(fs.cat_file(f"{at}/{name}")))
    return folder
