"""What is said when the disk refuses: one wording for everything that is written."""

from __future__ import annotations

import errno
from pathlib import Path

from thetau.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT)


class NotConfirmed(OutputError):
    """An output has its name, but the disk did not confirm that it is there."""


def failed(path: Path, error: OSError, *, need: int | None = None) -> OutputError:
    """An error of the system as one of an output, in words. `need`: bytes that the output takes, where they are known."""
    if error.errno in FULL:
        size = f"; the output needs {need / 1e9:.2f} GB" if need is not None else ""
        return OutputError(f"{path}: the disk is full{size}. Free some space or write elsewhere. No output was made.")
    return OutputError(f"{path}: cannot be written: {error.strerror or error}.")


def not_confirmed(path: Path, error: OSError) -> NotConfirmed:
    """That the last step of all failed: the output is there, and may be gone after a power cut."""
    return NotConfirmed(f"{path}: was written, but the disk does not confirm it: {error.strerror or error}. Check the disk.")


def busy(path: Path, holder: str) -> OutputError:
    """That another run holds an output; `holder` is what `Held` knows of it."""
    return OutputError(f"{path}: another run is writing it. Wait for that run, or give another name.{holder}")
