"""Reading safetensors: one file, or shards with their index.

The header is parsed here rather than by the safetensors library because the engine reads row blocks with `pread` into memory of its
own: a file that shrinks under a memory map kills the process, while a short `pread` is an error that can name its file. The format
is <https://github.com/huggingface/safetensors#format>; every offset is checked before anything is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.dtypes import PACKED, UNREAD, Dtype
from thetau.checkpoint.source import Source, Spec, span
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("model", "task_vector", "evidence")
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
SAMPLES = 64  # places of a file that its fingerprint looks at
SAMPLE_BYTES = 4096


class SafetensorsFile:
    """One open file: its header, checked, and `pread` access to its data."""

    local = True  # there is a descriptor that the compiled loop can read from

    def __init__(self, path: Path) -> None:
        self.path: Path | str = path
        self._fd = _open(path)
        self._close = weakref.finalize(self, os.close, self._fd)
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path} is not a regular file. Give the path of a safetensors file.")
        self.size = info.st_size
        self.stamp: tuple[int | str, ...] = (info.st_size, info.st_mtime_ns, info.st_ino)
        self._parse(lambda count, offset: os.pread(self._fd, count, offset))

    def _parse(self, pread: Callable[[int, int], bytes]) -> None:
        """Read and check the header."""
        path = self.path
        self.header_bytes, header = _header(path, pread, self.size)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise CheckpointError(
                f"{path}: `__metadata__` must map strings to strings. The file is damaged: copy or download it again."
            )
        self.start = 8 + len(self.header_bytes)
        self.specs, self.offsets = _tensors(path, header, self.size - self.start)

    @property
    def place(self) -> str:
        """Where the file is, whatever the way to it."""
        return str(Path(self.path).resolve())

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.path, self.stamp)

    def read_bytes(self, offset: int, count: int, what: str) -> Tensor:
        """`count` bytes from `offset` after the header, as uint8 of shape `[count]`."""
        out = torch.empty(count, dtype=torch.uint8)
        self.fill(out.numpy().data, offset, what)
        return out

    def raw_bytes(self, offset: int, count: int, what: str) -> bytearray:
        """The same without torch."""
        out = bytearray(count)
        self.fill(memoryview(out), offset, what)
        return out

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Read what lies from `offset` after the header on into a buffer, all of it."""
        count, done = len(view), 0
        while done < count:
            try:
                got = os.preadv(self._fd, [view[done : done + (1 << 30)]], self.start + offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: reading {what} failed: {error.strerror}. Check the disk, then run again."
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: the file ended inside {what}; it changed while it was read. Restore it, then run again."
                )
            done += got

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self._fd

    def unchanged(self) -> bool:
        """Whether the path still holds the file that was opened, by size, time and inode."""
        try:
            info = os.stat(self.path)
        except OSError:
            return False
        return (info.st_size, info.st_mtime_ns, info.st_ino) == self.stamp

    def fingerprint(self) -> str:
        """SHA-256 of header, size and evenly spaced samples of the data."""
        digest = hashlib.sha256(self.header_bytes)
        digest.update(str(self.size).encode())
        data = self.size - self.start
        step = max(SAMPLE_BYTES, data // SAMPLES)
        for offset in range(0, data, step):
            digest.update(self.raw_bytes(offset, min(SAMPLE_BYTES, data - offset), "a sample"))
        return digest.hexdigest()


class SafetensorsSource(Source):
    """A model, or a saved task vector, in one or several safetensors files."""

    exact = True

    def __init__(
        self,
        path: Path | str,
        files: Mapping[str, SafetensorsFile],
        *,
        weight_map: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.path = path
        self.folder = (path if path.is_dir() else home_of(path)) if isinstance(path, Path) else folder
        self.label = str(path)
        self.local = all(file.local for file in files.values())
        self._files = files
        self._home: dict[str, SafetensorsFile] = {}
        self.specs: dict[str, Spec] = {}
        notes: list[str] = []
        for name, file in files.items():
            wanted = [tensor for tensor in file.specs if weight_map is None or weight_map.get(tensor) == name]
            for tensor in wanted:
                self.specs[tensor] = file.specs[tensor]
                self._home[tensor] = file
            extra = [tensor for tensor in file.specs if weight_map is not None and tensor not in weight_map]
            if extra:
                notes.append(
                    f"{file.path}: {len(extra)} tensors that the index does not name were left out ({', '.join(extra[:3])}, …)."
                )
        if weight_map is not None:
            _check_map(path, files, weight_map)
        if not self.specs:
            raise CheckpointError(f"{path}: holds no tensor.")
        self._notes = tuple(notes)
        kinds = {file.metadata.get("thetau.kind", "model") for file in files.values()}
        if not kinds <= set(KINDS) or len(kinds) > 1:
            raise CheckpointError(
                f"{path}: the kind in the files' metadata must be one of {', '.join(KINDS)}. Got {', '.join(sorted(kinds))}."
            )
        self.degree = 1 if kinds == {"model"} else 0
        self.partial = self.degree == 0
        self.metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
        # `safetensors.torch.save_model` stores shared tensors once, and says in the metadata which name stands for which.
        self.twins = {name: kept for name, kept in self.metadata.items() if kept in self.specs and name not in self.specs}
        stamps = [f"{file.place}:{file.stamp}" for file in files.values()]
        self.key = "file:" + hashlib.sha256("|".join(sorted(stamps)).encode()).hexdigest()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` as stored, freshly allocated."""
        spec, file = self.specs[name], self._home[name]
        start, stop = span(spec, start, stop)
        row_bytes = spec.row_elements * spec.dtype.itemsize
        raw = file.read_bytes(file.offsets[name] + start * row_bytes, (stop - start) * row_bytes, f"tensor {name!r}")
        return raw.view(spec.dtype.torch).reshape((stop - start, *spec.shape[1:]) if spec.shape else ())

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of these rows."""
        spec, file = self.specs[name], self._home[name]
        start, stop = span(spec, start, stop)
        row_bytes = spec.row_elements * spec.dtype.itemsize
        at = file.offsets[name] + start * row_bytes
        return memoryview(file.raw_bytes(at, (stop - start) * row_bytes, f"tensor {name!r}"))

    def slab(self, name: str, entry: int, start: int, stop: int) -> Tensor:
        """Rows of one entry of the first axis, and nothing else."""
        spec, file = self.specs[name], self._home[name]
        _, rows, *rest = spec.shape
        width = prod(rest) * spec.dtype.itemsize
        raw = file.read_bytes(file.offsets[name] + (entry * rows + start) * width, (stop - start) * width, f"tensor {name!r}")
        return raw.view(spec.dtype.torch).reshape(stop - start, *rest)

    def place(self, name: str) -> tuple[int, int] | None:
        """The open local file of a tensor and the byte at which its first element lies; None where it lies behind a URL."""
        if not self.local:
            return None
        file = self._home[name]
        return file.descriptor, file.start + file.offsets[name]

    def fingerprint(self) -> str:
        """SHA-256 over the files' own fingerprints, in the order of their names."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self._files[name].fingerprint() for name in sorted(self._files)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def header_hashes(self) -> dict[str, str]:
        """SHA-256 of each file's header, by file name."""
        return {Path(file.path).name: hashlib.sha256(file.header_bytes).hexdigest() for file in self._files.values()}

    def changed_files(self) -> list[str]:
        """Files that are no longer what was opened."""
        return [str(file.path) for file in self._files.values() if not file.unchanged()]


def open_file(path: Path, folder: Path | None = None) -> SafetensorsSource:
    """One safetensors file; `folder` where it was found through its folder, which is then what messages name."""
    return SafetensorsSource(folder or path, {path.name: SafetensorsFile(path)})


def _reopen(kind: Callable[[Any], SafetensorsFile], path: Path | str, stamp: tuple[int | str, ...]) -> SafetensorsFile:
    """The same file in another process.

    Raises:
        CheckpointError: it has changed since it was opened first, or is not the same file on this machine.
    """
    file = kind(path)
    if file.stamp != stamp:
        raise CheckpointError(
            f"{path}: changed while it was read, or is another file on this machine. Every worker must see the same files."
        )
    return file


def open_index(index: Path) -> SafetensorsSource:
    """Shards, by the `*.index.json` beside them."""
    folder = index.parent
    weight_map = read_weight_map(index)
    files = {name: SafetensorsFile(shard_path(folder, name, index)) for name in dict.fromkeys(weight_map.values())}
    return SafetensorsSource(folder, files, weight_map=weight_map)


def read_text(path: Path) -> str:
    """A small text file, whole.

    Raises:
        CheckpointError: it cannot be read, is no regular file (a FIFO would hang us), is not UTF-8, or is far too big.
    """
    fd = _open(path)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > HEADER_LIMIT:
            raise CheckpointError(f"{path} is not a regular file of a sensible size ({info.st_size} bytes).")
        return os.pread(fd, info.st_size, 0).decode("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    finally:
        os.close(fd)


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name → file name."""
    return parse_weight_map(index, read_text(index))


def parse_weight_map(index: Path | str, text: str) -> dict[str, str]:
    """The same of an index's text."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
        weight_map = content["weight_map"]
        assert_strings = all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({error}). It must hold a `weight_map` from tensor to file."
        ) from error
    if not assert_strings or not weight_map:
        raise CheckpointError(f"{index}: `weight_map` must map at least one tensor name to a file name.")
    return dict(weight_map)


def check_shard(name: str, index: Path) -> None:
    """Refuse what an index names outside its folder."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not name or "\0" in name:
        raise CheckpointError(
            f"{index}: names the shard {name!r}, which lies outside its folder. An index may only name files beside it."
        )


def shard_path(folder: Path, name: str, index: Path) -> Path:
    """The file that an index names, if it lies in the index's folder (or, in a hub cache, among the repository's blobs)."""
    check_shard(name, index)
    path = folder / name
    if not exists(path):
        raise CheckpointError(
            f"{index}: names the shard {name!r}, which is not in {folder}. Copy or download it, then run again."
        )
    target, home = path.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    if not (target.is_relative_to(home) or in_cache):
        raise CheckpointError(
            f"{index}: the shard {name!r} is a link to {target}, outside its folder. Put the file itself there."
        )
    return path


def home_of(file: Path) -> Path | None:
    """The folder of a weights file that was named by itself, if it is a model's: only then are its other files the model's too."""
    return file.parent if (file.parent / "config.json").exists() else None


def exists(path: Path) -> bool:
    """Whether something is there; names that no file can have are not."""
    try:
        return path.exists()
    except OSError:
        return False


def _check_map(path: Path | str, files: Mapping[str, SafetensorsFile], weight_map: Mapping[str, str]) -> None:
    lost = [(tensor, file) for tensor, file in weight_map.items() if tensor not in files[file].specs]
    if lost:
        tensor, file = lost[0]
        raise CheckpointError(
            f"{path}: the index puts {tensor!r} in {file}, which does not hold it ({len(lost)} such tensors). The index and its shards do not belong together."
        )


def _open(path: Path) -> int:
    for attempt in (0, 1):
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a FIFO must not hang us
        except OSError as error:
            if error.errno == errno.EMFILE and attempt == 0:  # many models in many shards: use what the system allows
                _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                continue
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from error
    raise AssertionError("unreachable")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key!r} stands twice")
        found[key] = value
    return found


def _header(path: Path | str, pread: Callable[[int, int], bytes], size: int) -> tuple[bytes, dict[str, Any]]:
    truncated = "It is truncated or not a safetensors file: copy or download it again."
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors header. {truncated}")
    length = int.from_bytes(pread(8, 0), "little")
    if length > HEADER_LIMIT or 8 + length > size:
        raise CheckpointError(f"{path}: the header claims {length} bytes, the file has {size}. {truncated}")
    try:
        raw = pread(length, 8)
    except OSError as error:
        raise CheckpointError(f"{path}: reading the header failed: {error.strerror}. Check the disk, then run again.") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}). {truncated}") from error
    if len(raw) != length or not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors. {truncated}")
    return raw, header


def _tensors(path: Path | str, header: Mapping[str, Any], data: int) -> tuple[dict[str, Spec], dict[str, int]]:
    """Specs and offsets in file order; every byte of the data must belong to exactly one tensor."""
    found: list[tuple[int, int, Spec]] = []
    for name, entry in header.items():
        try:
            name.encode()  # lone surrogates could never be written again
            dtype, shape, (begin, end) = Dtype[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            numbers = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except KeyError as error:
            known = ", ".join(Dtype.__members__)
            if error.args[0] in UNREAD:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {error.args[0]}, {UNREAD[error.args[0]]}, which cannot be read. Take the original, unquantised checkpoint."
                ) from error
            raise CheckpointError(f"{path}: tensor {name!r} has no usable entry ({error}). Known dtypes: {known}.") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the header's entry of tensor {name!r} is damaged ({error}). Copy or download the file again."
            ) from error
        if dtype is PACKED and numbers and shape and shape[-1] % 2 == 0:
            shape = (*shape[:-1], shape[-1] // 2)
        elif dtype is PACKED:
            numbers = False
        if (
            not numbers
            or len(shape) > 64
            or prod(n or 1 for n in shape) >= 1 << 60
            or end - begin != prod(shape) * dtype.itemsize
        ):
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} cannot lie at bytes {begin}:{end}. Copy or download the file again."
            )
        found.append((begin, end, Spec(name=name, shape=shape, dtype=dtype, file=str(path))))
    found.sort(key=lambda item: item[:2])
    place = 0
    for begin, end, spec in found:
        if begin != place:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} starts at byte {begin} where {place} was due: tensors overlap or leave a gap. The file is damaged."
            )
        place = end
    if place != data:
        raise CheckpointError(
            f"{path}: the header describes {place} bytes of data, the file holds {data}. It is truncated: copy or download it again."
        )
    return {spec.name: spec for _, _, spec in found}, {spec.name: begin for begin, _, spec in found}
