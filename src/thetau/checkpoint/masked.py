"""The task vectors of several tasks in one safetensors file: one vector that they share, and for each a bit an entry and a rescaler.

Format 1 of compressed task vectors (`thetau.checkpoint.compressed`), with `thetau.form=masked`: `thetau.tasks` is a JSON table from each
task to its rescaler, in the order of the masks, `thetau.tensors` one from each tensor's name to its `shape` and its `kind`, `masked`. A
tensor is stored as `values:name`, dense in float32, bfloat16 or float16, and `mask0:name`, `mask1:name`, …: a bit an entry, row by row, the
lowest bit of a byte first. A task's vector is values ⊙ mask · rescaler, in float32. One task is opened by `file.safetensors#task`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from thetau.checkpoint.compressed import (
    FLOATS,
    REMEDY,
    Layout,
    check_metadata,
    damaged,
    entry_of,
    part,
    read_bits,
    table_of,
)
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.safetensors import SafetensorsSource
from thetau.checkpoint.source import Source, Spec, span
from thetau.errors import CheckpointError, nearest
from thetau.sums import masked

if TYPE_CHECKING:
    from torch import Tensor

FORM = "masked"


def layout_of(shape: tuple[int, ...], dtype: Dtype, tasks: int) -> Layout:
    """Shape and dtype of each part of a tensor."""
    bits = -(-math.prod(shape) // 8)
    return {"values": (shape, dtype), **{f"mask{task}": ((bits,), Dtype.U8) for task in range(tasks)}}


class MaskedStore:
    """Such a file, opened: only its header is read. `rescalers` are by task, in the order of the masks.

    Raises:
        CheckpointError: the format is newer than this version, or the file is damaged.
    """

    def __init__(self, stored: SafetensorsSource) -> None:
        self.stored, self.label = stored, stored.label
        metadata = stored.metadata
        check_metadata(self.label, metadata, (FORM,))
        self.rescalers: dict[str, float] = {}
        for task, rescaler in table_of(self.label, metadata, "thetau.tasks", "task").items():
            if not task or isinstance(rescaler, bool) or not isinstance(rescaler, int | float) or not 0 <= rescaler < math.inf:
                raise CheckpointError(
                    f"{self.label}: `thetau.tasks` must give each task's rescaler, a finite number from 0. Got {rescaler!r} for {task!r}. {REMEDY}"
                )
            self.rescalers[task] = float(rescaler)
        file = next(iter(stored.specs.values())).file
        self.specs: dict[str, Spec] = {}
        for name, entry in table_of(self.label, metadata, "thetau.tensors", "tensor").items():
            _, shape = entry_of(self.label, name, entry, (FORM,))
            self.specs[name] = Spec(name=name, shape=shape, dtype=Dtype.F32, file=file)
        known = set()
        for name in self.specs:
            known |= self._check(name)
        extra = [name for name in stored.specs if name not in known]
        if extra:
            raise CheckpointError(
                f"{self.label}: {extra[0]!r} belongs to no tensor of `thetau.tensors` ({len(extra)} such). {REMEDY}"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the masks."""
        return tuple(self.rescalers)

    def task(self, name: str) -> MaskedSource:
        """One task's vector.

        Raises:
            CheckpointError: the file has no such task.
        """
        if name not in self.rescalers:
            raise CheckpointError(
                f"{self.label}: has no task {name!r}.{nearest(name, self.tasks)} Its tasks: {', '.join(self.tasks)}."
            )
        return MaskedSource(self, name)

    def mask(self, task: str, name: str, start: int, stop: int) -> Tensor:
        """A task's bits at some rows of a tensor, bool `[(stop - start) · row elements]`."""
        return read_bits(self.stored, part(f"mask{self.tasks.index(task)}", name), self.specs[name], start, stop)

    def _check(self, name: str) -> set[str]:
        """The names of a tensor's parts, which must be there and fit."""
        shape = self.specs[name].shape
        values = self.stored.specs.get(part("values", name))
        dtype = values.dtype if values is not None and values.dtype in FLOATS else Dtype.F32
        wanted = layout_of(shape, dtype, len(self.tasks))
        for which, (want, of) in wanted.items():
            got = self.stored.specs.get(part(which, name))
            if got is None:
                damaged(self.label, name, f"its part {which!r} is missing")
            if (got.shape, got.dtype) != (want, of):
                damaged(
                    self.label,
                    name,
                    f"its part {which!r} must be {of} {list(want)} for shape {list(shape)}, not {got.dtype} {list(got.shape)}",
                )
        return {part(which, name) for which in wanted}


class MaskedSource(Source):
    """One task's vector out of a `MaskedStore`, whose rows are made when they are read, in float32."""

    degree = 0
    partial = True

    def __init__(self, store: MaskedStore, task: str) -> None:
        self.store, self.task = store, task
        self.label, self.key = f"{store.label}#{task}", f"masked:{store.stored.key}#{task}"
        self.folder, self.metadata, self.specs = store.stored.folder, store.stored.metadata, store.specs

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it comes from."""
        said = f"{self.label}: one of {len(self.store.tasks)} task vectors that share their values, read as dense."
        return (*self.store.stored.notes, said)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the vector, in float32: `[stop - start, *shape[1:]]`.

        Raises:
            CheckpointError: what the file holds contradicts itself there.
        """
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        values = self.store.stored.read(part("values", name), start, stop).float()
        bits = self.store.mask(self.task, name, start, stop).reshape(values.shape)
        return masked(values, bits, self.store.rescalers[self.task])

    def fingerprint(self) -> str:
        """That of the file, and the task."""
        return f"{self.store.stored.fingerprint()}#{self.task}"

    def header_hashes(self) -> dict[str, str]:
        """That of the file."""
        return self.store.stored.header_hashes()

    def changed_files(self) -> list[str]:
        """The file, if it is no longer what was opened."""
        return self.store.stored.changed_files()


def store_of(source: Source) -> MaskedStore:
    """A file of several tasks, opened as such.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(source, SafetensorsSource) and source.metadata.get("thetau.form") == FORM:
        return MaskedStore(source)
    raise CheckpointError(
        f"{source.label}: is no file of several task vectors. `thetau vector compress --method tall` writes one; open others without `#task`."
    )


def one_vector(source: Source) -> Source:
    """A source that is not of several tasks, as it is.

    Raises:
        CheckpointError: it is, and one of them must be named.
    """
    if isinstance(source, SafetensorsSource) and source.metadata.get("thetau.form") == FORM:
        tasks = MaskedStore(source).tasks
        raise CheckpointError(
            f"{source.label}: holds the vectors of {len(tasks)} tasks. Name one of them: {source.label}#{tasks[0]}. Tasks: {', '.join(tasks)}."
        )
    return source
