"""One change of a bank: alone, from its newest state, and true in one step.

Files come first, then the manifest, then the rubbish goes: a process that dies between any two of these leaves a whole bank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from thetau._version import __version__
from thetau.bases.bank import LOCK, MANIFEST, Bank, Operation, State, left_over, read_state
from thetau.checkpoint.disk import Held, Lock, NotConfirmed, remove, write_bytes
from thetau.errors import BankError, OutputError


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
        lock = Lock(path / LOCK, wait=wait, keep=True)
    except Held as error:
        raise BankError(f"{path}: another process is changing this bank. Wait for it, then try again.{error.holder}") from error
    except OSError as error:
        raise BankError(f"{path}: cannot be changed: {error.strerror}.") from error
    with lock:
        state = read_state(path)
        clear(path, state)
        try:
            yield Change(path, state)
        except BaseException:
            with contextlib.suppress(BankError):
                clear(path, read_state(path))  # whatever was written for a change that failed
            raise


def clear(path: Path, state: State) -> None:
    """Remove the files that the bank does not name any more."""
    for entry in left_over(path, state):
        with contextlib.suppress(OSError):
            remove(entry)


def write_manifest(path: Path, state: State) -> None:
    """Replace `bank.json` in one step, on the disk.

    Raises:
        BankError: it cannot be written; the old one still holds.
    """
    try:
        write_bytes(path / MANIFEST, TypeAdapter(State).dump_json(state, indent=1) + b"\n")
    except NotConfirmed as error:
        raise BankError(str(error)) from error
    except OutputError as error:
        raise BankError(f"{error} The bank is as it was.") from error
