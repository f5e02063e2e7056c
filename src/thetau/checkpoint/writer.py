"""Writing a checkpoint so that it is either whole or not there.

Everything goes into a sibling folder `.NAME.partial`, space is reserved before the first tensor is computed, and the folder is renamed
only after every row was written and synced. A lock keeps a second run from the same output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau.checkpoint.disk import NotConfirmed, Place, copy_side_files, header, remove, sync
from thetau.checkpoint.journal import Journal
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.checkpoint.slots import Slots, is_begun, make_file
from thetau.checkpoint.source import Spec
from thetau.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5_000_000_000


class Writer:
    """One output, a folder or (where the path ends in `.safetensors`) a single file. Use as a context: leaving it without `commit` removes what was begun.

    `stem` is what the files of a folder are called, before their numbers.

    Folders above the output are made. `run` tells this run from every other one that could write there (its recipe and inputs). With
    `resume`, a begun output of the same run is continued: tensors whose bytes agree with the journal are `sealed` from the start; and what
    was done stays for the next time if this run ends early.

    Raises:
        OutputError: the target exists, another run writes it, the disk is full, or what was begun is another run's.
    """

    def __init__(
        self,
        target: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        *,
        shard_bytes: int = SHARD_BYTES,
        run: str = "",
        resume: bool = False,
        stem: str = "model",
    ) -> None:
        self.target = target
        self.single = target.suffix == ".safetensors"
        self.specs = dict(specs)
        self.sealed: dict[str, int] = {}  # CRC-32 by tensor
        self._run, self._resume = run, resume
        self._done = False
        self._stem = stem
        self._shards = _split(self.specs, None if self.single else shard_bytes, stem)
        self._headers = {
            file: header([(name, specs[name].dtype, specs[name].shape) for name in names], metadata)
            for file, names in self._shards.items()
        }
        self._place = Place(target)
        self._journal = Journal(target)
        self.slots = Slots(target, self._place.partial, self.specs, self._places())
        begun = False
        try:
            begun = self._continue() if resume else False
            if not begun:
                self._begin()
        except BaseException:
            self._stop(keep=begun or (resume and self._journal.path.exists()))
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done:
            self.abort()

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Store rows, as `Slots.write` does."""
        self.slots.write(name, start, rows)

    def done(self, name: str, crc: int) -> None:
        """Put a finished tensor into the journal."""
        self.sealed[name] = crc
        try:
            self._journal.add(name, crc)
        except OSError as error:
            raise self.slots.failed(error) from error

    def commit(self, *, copy_from: Path | None, files: Mapping[str, Any]) -> None:
        """Check that every tensor is there, add side files, sync, and give the output its name.

        `copy_from` is the base's folder, whose side files are copied; `files` are JSON documents or bytes by name (one that is also copied
        is replaced, or left out where the value is None).

        Raises:
            OutputError: tensors are missing, the disk failed, or the target appeared meanwhile.
        """
        for name in self.specs:
            if name not in self.sealed:
                self.done(name, self.slots.seal(name))
        try:
            self.slots.close()
            for file in self._shards:
                sync(self._place.partial / file)
                self._check_header(file)
            if self.single:
                self._place.commit_file(next(iter(self._shards)))
            else:
                if copy_from is not None and copy_from.is_dir():
                    copy_side_files(
                        copy_from, self._place.partial, leave=[name for name, given in files.items() if given is None]
                    )
                for name, document in {**files, **self._index()}.items():
                    if document is not None:
                        self._place.put(name, document)
                self._place.commit()
        except NotConfirmed:
            self._done = True
            self._stop(keep=False)
            raise
        except OSError as error:
            raise self.slots.failed(error) from error
        self._done = True
        self._stop(keep=False)

    def abort(self) -> None:
        """Remove what was begun, or keep it for the next time where this run is one that resumes."""
        self._stop(keep=self._resume)

    def _stop(self, *, keep: bool) -> None:
        self.slots.close()
        self._journal.close()
        if not keep:
            self._place.clear()
            with contextlib.suppress(OSError):
                self._journal.remove()
        self._place.leave()

    def _places(self) -> dict[str, tuple[str, int]]:
        """Tensor → its file and the byte at which it begins."""
        places: dict[str, tuple[str, int]] = {}
        for file, names in self._shards.items():
            at = len(self._headers[file][0])
            for name in names:
                places[name] = (file, at)
                at += self.specs[name].nbytes
        return places

    def _begin(self) -> None:
        try:
            self._journal.remove()  # first: without it, whatever else is there is nothing
            self._place.begin()
            for file, (head, size) in self._headers.items():
                make_file(self._place.partial / file, head, size)
            self._journal.begin(self._run)
        except OSError as error:
            raise self.slots.failed(error) from error

    def _continue(self) -> bool:
        """Take up a begun output of the same run; False where there is none.

        Raises:
            OutputError: what was begun belongs to another run.
        """
        partial = self._place.partial
        if not partial.is_dir():
            return False  # a journal alone was left by a run that died as soon as its output had its name
        finished = self._journal.read(self._run, partial)
        if finished is None or not all(is_begun(partial / file, *head) for file, head in self._headers.items()):
            return False
        self.sealed = {name: crc for name, crc in finished.items() if name in self.specs and self.slots.checksum(name) == crc}
        try:
            for path in partial.iterdir():  # side files of a run that died in its commit
                if path.name not in self._shards:
                    remove(path)
            self._journal.go_on()
        except OSError as error:
            raise self.slots.failed(error) from error
        return True

    def _check_header(self, file: str) -> None:
        """Read a finished file's header as every later reader will."""
        found = {name: (spec.shape, spec.dtype) for name, spec in SafetensorsFile(self._place.partial / file).specs.items()}
        if found != {name: (self.specs[name].shape, self.specs[name].dtype) for name in self._shards[file]}:
            raise OutputError(f"{self.target}: {file} does not hold what was written. Check the disk, then run again.")

    def _index(self) -> dict[str, Any]:
        """The index of an output of several files, by its name."""
        if len(self._shards) == 1:
            return {}
        weight_map = {name: file for file, names in self._shards.items() for name in names}
        total = sum(spec.nbytes for spec in self.specs.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return {f"{self._stem}.safetensors.index.json": content}


def _split(specs: Mapping[str, Spec], limit: int | None, stem: str) -> dict[str, list[str]]:
    """File → its tensors, in order; wider dtypes first within each file, so that every tensor is aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if limit is not None and shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    count = len(shards)
    files = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return {file: sorted(shard, key=lambda name: -specs[name].dtype.itemsize) for file, shard in zip(files, shards, strict=True)}
