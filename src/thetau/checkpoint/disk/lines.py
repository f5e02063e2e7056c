"""Files of lines to which several processes append, none of which can spoil them by dying."""

from __future__ import annotations

import os
from pathlib import Path

from thetau.checkpoint.disk.failure import busy, failed
from thetau.checkpoint.disk.locks import Held, locked
from thetau.checkpoint.disk.parents import make_parents

WAIT = 60.0  # seconds for the others' writing
_STEP = 4096


def append_lines(path: Path, content: bytes, *, wait: float = WAIT) -> None:
    """Add whole lines at a file's end under the system's lock, synced; the file and the folders above it are made. What a process left of a line when it
    died is cut off first.

    Raises:
        OutputError: others write for longer than `wait` seconds, or the file cannot be written.
    """
    try:
        make_parents(path)
        handle = locked(path, wait=wait)
    except Held as error:
        raise busy(path, error.holder) from error
    except OSError as error:
        raise failed(path, error) from error
    try:
        with open(handle, "r+b", closefd=False) as file:
            file.truncate(_whole(handle))
            file.seek(0, os.SEEK_END)
            file.write(content)
            file.flush()
            os.fsync(handle)
    except OSError as error:
        raise failed(path, error) from error
    finally:
        os.close(handle)


def _whole(handle: int) -> int:
    """The bytes up to the end of the last whole line."""
    end = os.fstat(handle).st_size
    while end > 0:
        start = max(0, end - _STEP)
        place = os.pread(handle, end - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
