"""Single files: the new content has the name, or the old one keeps it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from thetau.checkpoint.disk.documents import as_json
from thetau.checkpoint.disk.failure import busy, failed, not_confirmed
from thetau.checkpoint.disk.locks import Held, locked
from thetau.checkpoint.disk.parents import made_parents
from thetau.checkpoint.disk.syncing import sync

WAIT = 600.0  # seconds for another process that writes the same file
MODE = 0o666  # less what the umask takes


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` when the block ends well; else what was there is as it was.

    Folders above it are made. Of two processes that write one file the second waits for the first. A link is followed; what is
    neither file nor folder (a pipe, `/dev/stdout`) is written to as it is.

    Raises:
        OutputError: the file cannot be written, or another process writes it for ten minutes.
        NotConfirmed: it has its new content, but the disk does not say so.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as special:
                yield special
            return
        target = path.resolve() if path.is_symlink() else path
        with made_parents(target):
            yield from _replaced(target)
    except Held as error:
        raise busy(path, error.holder) from error
    except OSError as error:
        raise failed(path, error) from error
    try:
        sync(target.parent)
    except OSError as error:
        raise not_confirmed(path, error) from error


def _replaced(target: Path) -> Iterator[BinaryIO]:
    part = target.with_name(f".{target.name}.part")
    handle = locked(part, wait=WAIT, mode=MODE)
    try:
        os.ftruncate(handle, 0)  # what a process that died had written
        with open(handle, "wb", closefd=False) as file:
            yield file
        os.fsync(handle)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises `OutputError`."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Raises `OutputError`."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any, *, indent: int = 2) -> None:
    """Write a document as JSON, whole or not at all. Raises `OutputError`: it cannot be written, or JSON cannot hold it."""
    write_bytes(path, as_json(document, path, indent=indent))
