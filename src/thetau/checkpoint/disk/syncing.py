"""Putting on the disk what the system still holds in memory."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """A file's content, or a folder's names. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_data(handle: int) -> None:
    """The content of an open file, without its times. Raises `OSError`."""
    os.fdatasync(handle)


def sync_tree(folder: Path) -> None:
    """Every file below a folder, then every folder, itself the last. Raises `OSError`."""
    below = [path for path in folder.rglob("*") if not path.is_symlink()]
    for path in [*(path for path in below if path.is_file()), *(path for path in below if path.is_dir()), folder]:
        sync(path)
