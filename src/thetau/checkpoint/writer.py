"""Writing a checkpoint so that it is either whole or not there.

Everything goes into a sibling folder `.NAME.partial`, space is reserved before the first tensor is computed, and the folder is renamed
only after every row was written and synced. A lock keeps a second run from the same output.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.dtypes import TO_SAFETENSORS
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.checkpoint.source import Spec
from thetau.errors import OutputError

WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ckpt",
    ".npz",
    ".ot",
    ".tflite",
    ".partial",
    ".lock",
    ".journal",
}
NOT_COPIED = {"thetau.json", "adapter_config.json", "README.md", "trainer_state.json", "thetau_finetune.json"}
SHARD_BYTES = 5_000_000_000
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
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise OutputError(
                f"{self.target}: {name!r} was declared {spec.dtype} {list(spec.shape)}. Got rows of {rows.dtype} {list(rows.shape)}."
            )
        raw = rows.detach().contiguous().reshape(-1).view(torch.uint8)
        if not raw.numel():
            return
        fd, offset = self.place(name)
        try:
            _write_at(fd, raw.numpy().data, offset + start * spec.row_elements * spec.dtype.itemsize)
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
            os.fdatasync(self.place(name)[0])
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = sum(spec.nbytes for spec in self.specs.values()) / 1e9
            return OutputError(
                f"{self.target}: the disk is full; the output needs {need:.2f} GB. Free some space or write elsewhere. No output was made."
            )
        return OutputError(f"{self.target}: cannot be written: {error.strerror}.")

    def sync(self) -> None:
        """Put everything that was written on the disk."""
        for fd in self._fds.values():
            os.fsync(fd)

    def close(self) -> None:
        """Close the files."""
        with self._mutex:
            while self._fds:
                os.close(self._fds.popitem()[1])


class Writer:
    """One output, a folder or (where the path ends in `.safetensors`) a single file. Use as a context: leaving it without `commit` removes what was begun.

    `run` tells this run from every other one that could write there (its recipe and inputs). With `resume`, a begun output of the same
    run is continued: tensors whose bytes agree with the journal are `sealed` from the start; and what was done stays for the next time
    if this run ends early. The journal `.NAME.journal` has a line for each finished tensor, with the CRC-32 of its bytes.
    """

    def __init__(
        self,
        target: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        *,
        shard_bytes: int = SHARD_BYTES,
        run: str = "",
        resume: bool = False,
    ) -> None:
        self.target = target
        self.single = target.suffix == ".safetensors"
        self._refuse_existing()
        if not target.parent.is_dir():
            raise OutputError(f"{target}: the folder {target.parent} does not exist. Make it, then run again.")
        self.specs = dict(specs)
        self.sealed: dict[str, int] = {}  # CRC-32 by tensor
        self._metadata = dict(metadata)
        self._partial = target.with_name(f".{target.name}.partial")
        self._journal_path = target.with_name(f".{target.name}.journal")
        self._lock_path = target.with_name(f".{target.name}.lock")
        self._run, self._resume = run, resume
        self._done = False
        self._journal = -1
        self._shards = _split(self.specs, shard_bytes if not self.single else None)
        self._headers = [_header([self.specs[name] for name in names], self._metadata) for names in self._shards]
        places: dict[str, tuple[str, int]] = {}
        for file, names, (header, _) in zip(self._shards_files(), self._shards, self._headers, strict=True):
            place = len(header)
            for name in names:
                places[name] = (file, place)
                place += self.specs[name].nbytes
        self.slots = Slots(target, self._partial, self.specs, places)
        self._lock = self._acquire()
        begun = False
        try:
            self._refuse_existing()  # another run may have finished meanwhile
            begun = self._continue() if resume else False
            if not begun:
                self._begin()
        except BaseException:
            self._stop(keep=begun or (resume and self._journal_path.exists()))
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done:
            self.abort()

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Store rows, as `Slots.write` does."""
        self.slots.write(name, start, rows)

    def done(self, name: str, crc: int) -> None:
        """Put a finished tensor into the journal."""
        self.sealed[name] = crc
        line = json.dumps({"tensor": name, "crc32": crc}) + "\n"
        try:
            os.write(self._journal, line.encode())
        except OSError as error:
            raise self.slots.failed(error) from error

    def commit(self, *, copy_from: Path | None, files: Mapping[str, Any]) -> None:
        """Check that every tensor is there, add side files, sync, and give the output its name.

        `copy_from` is the base's folder: config, tokenizer and generation files are copied; `files` are JSON documents by name
        (one that is also copied is replaced).

        Raises:
            OutputError: tensors are missing, the disk failed, or the target appeared meanwhile.
        """
        for name in self.specs:
            if name not in self.sealed:
                self.done(name, self.slots.seal(name))
        try:
            self.slots.close()
            for file, names in zip(self._shards_files(), self._shards, strict=True):
                _sync(self._partial / file)
                self._check_header(self._partial / file, names)
            if self.single:
                os.link(self._partial / self._shards_files()[0], self.target)
                shutil.rmtree(self._partial)
            else:
                self._side_files(copy_from, files)
                for path in (p for p in self._partial.rglob("*") if p.is_file()):
                    _sync(path)
                for folder in (p for p in [*self._partial.rglob("*"), self._partial] if p.is_dir()):
                    _sync(folder)
                if self.target.exists():
                    raise OutputError(f"{self.target}: appeared while it was being written. Give a new name, or remove it first.")
                self._partial.rename(self.target)
            _sync(self.target.parent)
        except OSError as error:
            raise self.slots.failed(error) from error
        self._done = True
        self._stop(keep=False)

    def _check_header(self, path: Path, names: list[str]) -> None:
        """Read a finished file's header as every later reader will."""
        found = {name: (spec.shape, spec.dtype) for name, spec in SafetensorsFile(path).specs.items()}
        if found != {name: (self.specs[name].shape, self.specs[name].dtype) for name in names}:
            raise OutputError(f"{self.target}: {path.name} does not hold what was written. Check the disk, then run again.")

    def abort(self) -> None:
        """Remove what was begun, or keep it for the next time where this run is one that resumes."""
        self._stop(keep=self._resume)

    def _stop(self, *, keep: bool) -> None:
        self.slots.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
        if not keep and self._lock >= 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._journal_path.unlink()
        self._release()

    def _shards_files(self) -> list[str]:
        count = len(self._shards)
        return ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def _refuse_existing(self) -> None:
        try:
            there = self.target.exists() or self.target.is_symlink()
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise OutputError(f"{self.target}: cannot be written: {error.strerror}.") from error
        if there:
            raise OutputError(
                f"{self.target}: exists. An output is never mixed with older files: give a new name, or remove it first."
            )

    def _acquire(self) -> int:
        while True:
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise self.slots.failed(error) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                raise OutputError(
                    f"{self.target}: another run is writing it. Wait for that run, or give another name."
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    return lock
            os.close(lock)  # its owner removed it between our open and our lock: it guards nothing any more

    def _begin(self) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                self._journal_path.unlink()  # first: without it, whatever else is there is nothing
            if self._partial.exists():
                shutil.rmtree(self._partial)  # left by a run that died: the lock says that nobody is writing it
            self._partial.mkdir()
            for file, (header, size) in zip(self._shards_files(), self._headers, strict=True):
                fd = os.open(self._partial / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    if size + len(header):
                        os.posix_fallocate(fd, 0, size + len(header))  # a full disk shows now, not after hours
                    _write_at(fd, memoryview(header), 0)
                finally:
                    os.close(fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._journal = os.open(self._journal_path, flags, 0o644)
            os.write(self._journal, (json.dumps({"run": self._run}) + "\n").encode())
        except OSError as error:
            raise self.slots.failed(error) from error

    def _continue(self) -> bool:
        """Take up a begun output of the same run; False where there is none.

        Raises:
            OutputError: what was begun belongs to another run.
        """
        if not self._partial.is_dir():
            return False  # a journal alone was left by a run that died as soon as its output had its name
        try:
            first, *lines = self._journal_path.read_text(encoding="utf-8", errors="replace").split("\n")
            run = json.loads(first)["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # the run died before there was anything to keep
        if run != self._run:
            raise OutputError(
                f"{self._partial}: was begun by another run: its recipe, its options or one of its inputs has changed since. "
                "Run again without `--resume` to start over."
            )
        for file, (header, size) in zip(self._shards_files(), self._headers, strict=True):
            try:
                with open(self._partial / file, "rb") as begun:
                    if begun.read(len(header)) != header or os.fstat(begun.fileno()).st_size != size + len(header):
                        return False
            except OSError:
                return False
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
                entry = json.loads(line)
                name, crc = entry["tensor"], entry["crc32"]
                if name in self.specs and self.slots.checksum(name) == crc:
                    self.sealed[name] = crc
        try:
            for path in self._partial.iterdir():  # side files of a run that died in its commit
                if path.name not in self._shards_files():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.write(self._journal, b"\n")  # ends a torn line
        except OSError as error:
            raise self.slots.failed(error) from error
        return True

    def _side_files(self, copy_from: Path | None, files: Mapping[str, Any]) -> None:
        if copy_from is not None and copy_from.is_dir():
            for path in sorted([*copy_from.iterdir(), *copy_from.glob("*/config.json")]):
                relative = path.relative_to(copy_from)
                if _is_side_file(path, relative):
                    (self._partial / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self._partial / relative)
        documents = dict(files)
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in zip(self._shards_files(), self._shards, strict=True) for name in names}
            total = sum(spec.nbytes for spec in self.specs.values())
            documents["model.safetensors.index.json"] = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
        for name, document in documents.items():
            (self._partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _release(self) -> None:
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):
                self._lock_path.unlink()
            os.close(self._lock)
            self._lock = -1


def _is_side_file(path: Path, relative: Path) -> bool:
    if any(part.startswith(".") for part in relative.parts) or not path.is_file():
        return False
    if (
        len(relative.parts) == 2 and not relative.parts[0][0].isdigit()
    ):  # only sentence-transformers' modules lie deeper: 1_Pooling
        return False
    name = relative.name
    index = name.endswith(".index.json")
    return path.suffix not in WEIGHTS and name not in NOT_COPIED and not index and path.stat().st_size < 200_000_000


def _split(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    """Shards in order; wider dtypes first within each, so that every tensor is aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if limit is not None and shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return [sorted(shard, key=lambda name: -specs[name].dtype.itemsize) for shard in shards]


def _header(specs: list[Spec], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": TO_SAFETENSORS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [place, place + spec.nbytes],
        }
        place += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, place


def _write_at(fd: int, view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):  # one call may write less than it is given
        done += os.pwrite(fd, view[done : done + (1 << 30)], at + done)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
