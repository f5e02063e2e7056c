"""One change of a bank: alone, from its newest state, and true in one step.

Files come first, then the manifest, then the rubbish goes: a process that dies between any two of these leaves a whole bank.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from thetau._version import __version__
from thetau.bases.bank import LOCK, MANIFEST, Bank, Operation, State, left_over, read_state
from thetau.errors import BankError


class Change:
    """A change under way: the bank is locked, its state fresh, and only `commit` makes anything of it true."""

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state = path, state
        self.began = time.perf_counter()
        self.read = self.written = 0

    def file(self, basis: str) -> str:
        """A name for a new file of a basis: no file that the bank names has it."""
        return f"{basis}-{self.state.generation + 1:06d}.safetensors"

    def commit(self, state: State, operation: Operation) -> Bank:
        """Make it true: from here on the bank is the new one, also after a crash."""
        done = replace(state, generation=self.state.generation + 1, log=(*state.log, operation), thetau=__version__)
        write_manifest(self.path, done)
        self.state = done
        clear(self.path, done)
        return Bank(self.path, done)

    def operation(self, kind: str, names: tuple[str, ...], said: tuple[str, ...], drift: Mapping[str, Any] | None) -> Operation:
        """What was done so far, as a record."""
        return Operation(
            kind=kind,
            names=names,
            read=self.read,
            written=self.written,
            seconds=round(time.perf_counter() - self.began, 3),
            said=said,
            drift=None if drift is None else dict(drift),
        )


@contextlib.contextmanager
def changing(path: Path, *, wait: float = 600.0) -> Iterator[Change]:
    """Hold the bank alone, with its newest state.

    Raises:
        BankError: another process holds it for longer than `wait` seconds, or it cannot be read or written.
    """
    read_state(path)  # a folder that is no bank gets no lock file
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise BankError(f"{path}: cannot be changed: {error.strerror}.") from error
    try:
        _acquire(lock, path, wait)
        state = read_state(path)
        clear(path, state)
        try:
            yield Change(path, state)
        except BaseException:
            with contextlib.suppress(BankError):
                clear(path, read_state(path))  # whatever was written for a change that failed
            raise
    finally:
        os.close(lock)


def _acquire(lock: int, path: Path, wait: float) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise BankError(f"{path}: another process is changing this bank. Wait for it, then try again.") from error
            time.sleep(0.05)


def clear(path: Path, state: State) -> None:
    """Remove them."""
    for entry in left_over(path, state):
        with contextlib.suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_manifest(path: Path, state: State) -> None:
    """Replace `bank.json` in one step, on the disk.

    Raises:
        BankError: it cannot be written; the old one still holds.
    """
    content = TypeAdapter(State).dump_json(state, indent=1) + b"\n"
    temporary = path / f".{MANIFEST}.new"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path / MANIFEST)
    except OSError as error:
        raise BankError(f"{path / MANIFEST}: cannot be written: {error.strerror}. The bank is as it was.") from error
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BankError(f"{path}: was changed, but the disk does not confirm it: {error.strerror}. Check the disk.") from error
