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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.dtypes import TO_SAFETENSORS
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
}
NOT_COPIED = {"thetau.json", "adapter_config.json", "README.md", "trainer_state.json", "thetau_finetune.json"}
SHARD_BYTES = 5_000_000_000


class Writer:
    """One output, a folder or (where the path ends in `.safetensors`) a single file. Use as a context: leaving it without `commit` removes what was begun."""

    def __init__(
        self, target: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.target = target
        self.single = target.suffix == ".safetensors"
        self._refuse_existing()
        if not target.parent.is_dir():
            raise OutputError(f"{target}: the folder {target.parent} does not exist. Make it, then run again.")
        self.specs = dict(specs)
        self._metadata = dict(metadata)
        self._partial = target.with_name(f".{target.name}.partial")
        self._lock_path = target.with_name(f".{target.name}.lock")
        self._fds: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._written: dict[str, int] = dict.fromkeys(specs, 0)
        self._mutex = threading.Lock()
        self._done = False
        self._shards = _split(self.specs, shard_bytes if not self.single else None)
        self._lock = self._acquire()
        try:
            self._refuse_existing()  # another run may have finished meanwhile
            self._begin()
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done:
            self.abort()

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Store rows from `start` on, of the dtype that was declared. Safe from several threads."""
        spec = self.specs[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise OutputError(
                f"{self.target}: {name!r} was declared {spec.dtype} {list(spec.shape)}. Got rows of {rows.dtype} {list(rows.shape)}."
            )
        file, offset = self._places[name]
        raw = rows.detach().contiguous().reshape(-1).view(torch.uint8)
        if not raw.numel():
            return
        at = offset + start * spec.row_elements * spec.dtype.itemsize
        try:
            _write_at(self._fds[file], raw.numpy().data, at)
        except OSError as error:
            raise self.failed(error) from error
        with self._mutex:
            self._written[name] += len(raw)

    def place(self, name: str) -> tuple[int, int]:
        """The open file of a tensor and the byte at which it begins, for those who write by themselves; they then tell `wrote`."""
        file, offset = self._places[name]
        return self._fds[file], offset

    def wrote(self, name: str, count: int) -> None:
        """Count bytes that were written at a `place`."""
        with self._mutex:
            self._written[name] += count

    def commit(self, *, copy_from: Path | None, files: Mapping[str, Any]) -> None:
        """Check that every row is there, add side files, sync, and give the output its name.

        `copy_from` is the base's folder: config, tokenizer and generation files are copied; `files` are JSON documents by name
        (one that is also copied is replaced).

        Raises:
            OutputError: rows are missing, the disk failed, or the target appeared meanwhile.
        """
        short = [name for name, count in self._written.items() if count != self.specs[name].nbytes]
        if short:
            raise OutputError(
                f"{self.target}: {len(short)} tensors were not wholly written, the first {short[0]!r}. This is a fault of thetau: please report it."
            )
        try:
            for file in self._fds.values():
                os.fsync(file)
            if self.single:
                self._close()
                _sync(self._partial)
                os.link(self._partial / self._shards_files()[0], self.target)
                shutil.rmtree(self._partial)
            else:
                self._side_files(copy_from, files)
                self._close()
                for path in (p for p in self._partial.rglob("*") if p.is_file()):
                    _sync(path)
                for folder in (p for p in [*self._partial.rglob("*"), self._partial] if p.is_dir()):
                    _sync(folder)
                if self.target.exists():
                    raise OutputError(f"{self.target}: appeared while it was being written. Give a new name, or remove it first.")
                self._partial.rename(self.target)
            _sync(self.target.parent)
        except OSError as error:
            raise self.failed(error) from error
        self._done = True
        self._release()

    def abort(self) -> None:
        """Remove what was begun."""
        self._close()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._release()

    def _shards_files(self) -> list[str]:
        count = len(self._shards)
        return ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def _refuse_existing(self) -> None:
        try:
            there = self.target.exists() or self.target.is_symlink()
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise self.failed(error) from error
        if there:
            raise OutputError(
                f"{self.target}: exists. An output is never mixed with older files: give a new name, or remove it first."
            )

    def _acquire(self) -> int:
        while True:
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise self.failed(error) from error
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
            if self._partial.exists():
                shutil.rmtree(self._partial)  # left by a run that died: the lock says that nobody is writing it
            self._partial.mkdir()
            for file, names in zip(self._shards_files(), self._shards, strict=True):
                header, size = _header([self.specs[name] for name in names], self._metadata)
                fd = os.open(self._partial / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                self._fds[file] = fd
                if size + len(header):
                    os.posix_fallocate(fd, 0, size + len(header))  # a full disk shows now, not after hours
                _write_at(fd, memoryview(header), 0)
                place = len(header)
                for name in names:
                    self._places[name] = (file, place)
                    place += self.specs[name].nbytes
        except OSError as error:
            raise self.failed(error) from error

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

    def failed(self, error: OSError) -> OutputError:
        """What went wrong with the output, in words."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = sum(spec.nbytes for spec in self.specs.values()) / 1e9
            return OutputError(
                f"{self.target}: the disk is full; the output needs {need:.2f} GB. Free some space or write elsewhere. Nothing was left behind."
            )
        return OutputError(f"{self.target}: cannot be written: {error.strerror}.")

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

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
