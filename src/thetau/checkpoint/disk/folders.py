"""New outputs, folders or single files of many gigabytes: made under another name beside the one that they get at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from thetau.checkpoint.disk.documents import as_json
from thetau.checkpoint.disk.failure import busy, failed, not_confirmed
from thetau.checkpoint.disk.locks import Held, Lock
from thetau.checkpoint.disk.parents import make_parents, remove_empty
from thetau.checkpoint.disk.syncing import sync, sync_tree
from thetau.errors import OutputError


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it. Raises `OSError`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_new(target: Path) -> None:
    """Refuse a name that something has already.

    Raises:
        OutputError: it is taken, or it cannot be looked at.
    """
    try:
        there = target.exists() or target.is_symlink()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise failed(target, error) from error
    if there:
        raise OutputError(f"{target}: exists. An output is never mixed with older files: give a new name, or remove it first.")


@final
class Place:
    """The place of a new output: a name that nothing has yet, a lock on it, and the folder `.NAME.partial` beside it where it is made.

    Folders above it are made; those that stay empty because no output came of it are removed again.

    Raises:
        OutputError: the name is taken, another run is writing there, or the place cannot be written to.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.partial = target, target.with_name(f".{target.name}.partial")
        self._done = False
        check_new(target)
        made: list[Path] = []
        try:
            made = make_parents(target)
            self._lock = Lock(target.with_name(f".{target.name}.lock"))
        except Held as error:
            raise busy(target, error.holder) from error
        except OSError as error:
            remove_empty(made)
            raise failed(target, error) from error
        self._made = made
        try:
            check_new(target)  # another run may have finished meanwhile
        except BaseException:
            self.leave()
            raise

    def begin(self) -> None:
        """An empty `partial`. What lies there was left by a run that died: the lock says that nobody is writing it. Raises `OSError`."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()

    def put(self, name: str, document: Any) -> None:
        """Bytes as they are, anything else as JSON, into `partial`. Raises `OSError`; `OutputError`: JSON cannot hold it."""
        path = self.partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document if isinstance(document, bytes) else as_json(document, self.target))

    def commit(self) -> None:
        """Put everything on the disk and give the folder its name.

        Raises:
            OutputError: the target appeared meanwhile. OSError: the disk failed.
        """
        sync_tree(self.partial)
        if self.target.exists():
            raise OutputError(f"{self.target}: appeared while it was being written. Give a new name, or remove it first.")
        self.partial.rename(self.target)
        self._confirm()

    def commit_file(self, name: str) -> None:
        """The same for an output that is a single file in `partial`."""
        sync(self.partial / name)
        os.link(self.partial / name, self.target)  # refuses a target that appeared meanwhile
        shutil.rmtree(self.partial, ignore_errors=True)
        self._confirm()

    def clear(self) -> None:
        """Remove what was begun, while the lock is still ours."""
        if self._lock.held:
            shutil.rmtree(self.partial, ignore_errors=True)

    def leave(self) -> None:
        """Release the lock. A second time does nothing."""
        self._lock.release()
        if not self._done:
            remove_empty(self._made)

    def _confirm(self) -> None:
        self._done = True
        try:
            for folder in (self.target.parent, *(made.parent for made in reversed(self._made))):
                sync(folder)
        except OSError as error:
            raise not_confirmed(self.target, error) from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well; else nothing is left of it.

    Raises:
        OutputError: as `Place` does, or the disk failed.
    """
    place = Place(target)
    try:
        place.begin()
        yield place.partial
        place.commit()
    except OSError as error:
        raise failed(target, error) from error
    except OutputError as error:
        inside, said = str(place.partial), str(error)
        if not said.startswith(inside):
            raise
        raise OutputError(f"{target}{said.removeprefix(inside)}") from error  # by the name that the file would have had
    finally:
        place.clear()
        place.leave()
