"""Where the rows of an output go: files that were begun at their full size, written at any place, in any order."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.disk import failed, sync_data
from thetau.checkpoint.source import Spec
from thetau.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

CHECK_BYTES = 1 << 20  # read at a time for a checksum


class Slots:
    """Where each tensor's rows go: files of a begun output, and the byte at which each tensor begins. Safe from several threads, and from
    other processes that see the same folder: what travels there are paths, and each opens its own files."""

    def __init__(self, target: Path, folder: Path, specs: Mapping[str, Spec], places: Mapping[str, tuple[str, int]]) -> None:
        self.target, self.specs = target, dict(specs)
        self._folder, self._places = folder, dict(places)
        self._fds: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._mutex = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"target": self.target, "specs": self.specs, "_folder": self._folder, "_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["target"], state["_folder"], state["specs"], state["_places"])  # type: ignore[misc]

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Store rows from `start` on, of the dtype that was declared."""
        spec = self.specs[name]
        if rows.dtype != spec.dtype.torch or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise OutputError(
                f"{self.target}: {name!r} was declared {spec.dtype} {list(spec.shape)}. Got rows of {rows.dtype} {list(rows.shape)}."
            )
        raw = rows.detach().contiguous().reshape(-1).view(torch.uint8)
        if raw.numel():
            self.write_raw(name, start, raw.numpy().data)

    def write_raw(self, name: str, start: int, raw: memoryview) -> None:
        """The same of rows as bytes."""
        spec, (fd, offset) = self.specs[name], self.place(name)
        try:
            write_at(fd, raw, offset + start * spec.row_elements * spec.dtype.itemsize)
        except OSError as error:
            raise self.failed(error) from error
        self.wrote(name, len(raw))

    def place(self, name: str) -> tuple[int, int]:
        """The open file of a tensor and the byte at which it begins, for those who write by themselves; they then tell `wrote`."""
        file, offset = self._places[name]
        with self._mutex:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self._folder / file, os.O_RDWR | os.O_CLOEXEC)
                except OSError as error:
                    raise self.failed(error) from error
            return self._fds[file], offset

    def begin(self, name: str) -> None:
        """Count a tensor's bytes from zero."""
        with self._mutex:
            self._written[name] = 0

    def wrote(self, name: str, count: int) -> None:
        """Count bytes that were written at a `place`."""
        with self._mutex:
            self._written[name] = self._written.get(name, 0) + count

    def seal(self, name: str, *, sync: bool = False) -> int:
        """Check that a tensor was wholly written, and return the CRC-32 of what its file now holds; `sync` puts it on the disk first.

        Raises:
            OutputError: rows are missing, or the file cannot be read back.
        """
        if self._written.get(name, 0) != self.specs[name].nbytes:
            raise OutputError(
                f"{self.target}: {name!r} was not wholly written ({self._written.get(name, 0)} of {self.specs[name].nbytes} bytes). "
                "This is a fault of thetau: please report it."
            )
        if sync and self.specs[name].nbytes:
            sync_data(self.place(name)[0])
        return self.checksum(name)

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor's bytes as its file holds them.

        Raises:
            OutputError: the file cannot be read.
        """
        crc, count = 0, self.specs[name].nbytes
        if not count:
            return 0
        fd, at = self.place(name)
        buffer = memoryview(bytearray(min(count, CHECK_BYTES)))
        try:
            while count > 0:
                got = os.preadv(fd, [buffer[: min(count, CHECK_BYTES)]], at)
                if got == 0:
                    raise OSError(errno.EIO, "the file ended early")
                crc = zlib.crc32(buffer[:got], crc)
                at, count = at + got, count - got
        except OSError as error:
            raise self.failed(error) from error
        return crc

    def failed(self, error: OSError) -> OutputError:
        """What went wrong with the output, in words."""
        return failed(self.target, error, need=sum(spec.nbytes for spec in self.specs.values()))

    def close(self) -> None:
        """Close the files."""
        with self._mutex:
            while self._fds:
                os.close(self._fds.popitem()[1])


def make_file(path: Path, head: bytes, size: int) -> None:
    """A new file of `head` and room for `size` bytes after it: a full disk shows now, not after hours. Raises `OSError`."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(handle, 0, len(head) + size)
        write_at(handle, memoryview(head), 0)
    finally:
        os.close(handle)


def is_begun(path: Path, head: bytes, size: int) -> bool:
    """Whether `make_file` made this very file."""
    try:
        with path.open("rb") as file:
            return file.read(len(head)) == head and os.fstat(file.fileno()).st_size == len(head) + size
    except OSError:
        return False


def write_at(handle: int, view: memoryview, at: int) -> None:
    """Write all of `view` to an open file from the byte `at` on. Raises `OSError`."""
    done = 0
    while done < len(view):  # one call may write less than it is given
        done += os.pwrite(handle, view[done : done + (1 << 30)], at + done)
