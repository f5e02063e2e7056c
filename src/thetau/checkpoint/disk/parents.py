"""The folders above an output: made where they are missing, gone again where nothing came of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from thetau.checkpoint.disk.failure import failed
from thetau.errors import OutputError


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """The folders above `path`; where the block fails, those that were made for it and hold nothing are removed again. Raises `OSError`."""
    made = make_parents(path)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def check_place(path: Path) -> None:
    """Refuse, before the work, a place where nothing can be written after it; folders that are missing above it will be made.

    Raises:
        OutputError: a folder above is a file, or may not be written to.
    """
    try:
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise failed(path, error) from error
    if not nearest.is_dir():
        raise OutputError(f"{path}: cannot be written: {nearest} is a file. Give a place in a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be written: the folder {nearest} may not be changed. Give another place.")


def check_file(path: Path) -> None:
    """The same for a single file. Raises `OutputError`: it is a folder, too."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give the name of a file.")
    if path.exists() and not path.is_file():
        return  # a pipe, a terminal
    check_place(path)


def make_parents(path: Path) -> list[Path]:
    """Make the folders above `path` that are missing: those that were made, the outermost first. Raises `OSError`."""
    missing = list(takewhile(lambda folder: not folder.exists(), path.parents))
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                made.append(folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove what `make_parents` made, where it holds nothing."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # it holds what others put there
            folder.rmdir()
