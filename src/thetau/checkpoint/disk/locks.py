"""Locks on files, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import final

PAUSE = 0.05  # seconds between two tries
NOTE = 1024  # bytes of what a holder writes of itself, at most


class Held(Exception):
    """Another process has the lock. `holder` says who, as a sentence to end a message with; it is empty where nobody knows."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path}: is locked.{holder}")
        self.holder = holder


def locked(path: Path, *, wait: float = 0.0, mode: int = 0o644) -> int:
    """Open a file for reading and writing, made where there is none, and lock it for this process alone: its descriptor.

    The descriptor is of the file that has the name now: one that its owner renamed or removed between our open and our lock is left.

    Raises:
        Held: another process has the lock for longer than `wait` seconds.
        OSError: the file cannot be made or locked.
    """
    deadline = time.monotonic() + wait
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        with contextlib.ExitStack() as unless_it_is_ours:
            unless_it_is_ours.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise Held(path, _holder(handle)) from error
                time.sleep(PAUSE)
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    unless_it_is_ours.pop_all()
                    return handle


@final
class Lock:
    """An exclusive lock by means of a file of its own, in which its holder says who it is. With `keep` the file stays when it is released.

    Raises:
        Held: another process has it for longer than `wait` seconds.
        OSError: the file cannot be made or locked.
    """

    def __init__(self, path: Path, *, wait: float = 0.0, keep: bool = False) -> None:
        self.path, self._keep = path, keep
        self._handle = locked(path, wait=wait)
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a courtesy to those who wait; the lock holds without it
            os.ftruncate(self._handle, 0)
            os.write(self._handle, json.dumps(holder).encode())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return self._handle >= 0

    def release(self) -> None:
        """Let others have it. A second time does nothing."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):
            if self._keep:
                os.ftruncate(self._handle, 0)
            else:
                self.path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # for the copies of the descriptor that forked children have, too
        os.close(self._handle)
        self._handle = -1


def _holder(handle: int) -> str:
    try:
        note = json.loads(os.pread(handle, NOTE, 0))
        process, machine, since = note["process"], note["machine"], note["since"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    here = "this very process" if (process, machine) == (os.getpid(), socket.gethostname()) else f"process {process} on {machine}"
    return f" It is {here}, since {since}."
