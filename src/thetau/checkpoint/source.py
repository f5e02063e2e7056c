"""What every readable set of weights looks like: named tensors, read lazily by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.window import Window
from thetau.plan import Pass

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A stored tensor without its values. `file` is what messages call the place it lies in."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    file: str

    @property
    def rows(self) -> int:
        """Length of the first axis; a 0-d tensor has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Elements in one row."""
        return prod(self.shape[1:])

    @property
    def elements(self) -> int:
        """Elements in the whole tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Demand:
    """What it takes to get a tensor from a source: bytes read, memory beside the rows themselves, operations, and by what it is made."""

    read: int
    memory: int = 0
    flops: float = 0.0
    by: Literal["copy", "loop", "torch"] = "copy"
    pace: float = 1.4e9  # bytes of input a second that one worker gets through


@dataclass(frozen=True)
class Lack:
    """What of a source is not on this machine yet: bytes, and the folder into which `prepare` downloads them."""

    nbytes: int
    folder: Path


class Source(ABC):
    """Weights that can be read by tensor and by row: stored ones, or ones that are computed from other sources when they are read.

    Reading is safe from several threads. The defaults are those of stored weights; what is computed says so by its `children`.

    - `label`: what messages and provenance call it: a path, a hub id or a given name.
    - `key`: equal for two openings of the same weights, so that they cancel in `a - b`.
    - `specs`: every tensor by name, in the order in which they lie in the files.
    - `degree`: 1 for a model, 0 for a difference of models.
    - `partial`: whether an absent name stands for zeros (a task vector, or an adapter that touches some tensors only).
    - `folder`: where config and tokenizer files lie, if anywhere.
    - `metadata`: what a file says of itself.
    - `over`: the model that this is a difference to, where it knows it (an adapter's base).
    - `quantised`: the form that its weights are stored in, where they are codes with scales that are dequantised when they are read.
    - `coded`: the names of these weights.
    - `twins`: names whose tensors are the very storage of others' → those others.
    - `apart`: of a difference: whether what its base ties is changed apart, so that a name that is absent does not follow the one it is tied to.
    - `files`: side files of an output that takes this as its base, by name, in place of those in the folder; None for one that is left out.
    - `exact`: whether `slab` reads no more than it gives.
    """

    label: str
    key: str
    specs: Mapping[str, Spec]
    degree: int = 1
    partial: bool = False
    folder: Path | None = None
    metadata: Mapping[str, str] = MappingProxyType({})
    over: Source | None = None
    quantised: str = ""
    coded: frozenset[str] = frozenset()
    twins: Mapping[str, str] = MappingProxyType({})
    apart: bool = False
    files: Mapping[str, Any] = MappingProxyType({})
    exact: bool = False
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told about how this was opened or made."""
        return self._notes

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` as stored: shape `[stop - start, *shape[1:]]`; a 0-d tensor as it is. The result is the caller's own or read-only."""

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of such rows, in their order."""
        rows = self.read(name, start, stop).detach().contiguous().reshape(-1).view(torch.uint8)
        return rows.numpy().data if rows.numel() else memoryview(b"")

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that tells these weights from others of the same shapes."""

    def slab(self, name: str, entry: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one entry of the first axis, a matrix; all of it is read unless the source is `exact`."""
        return self.read(name, entry, entry + 1)[0, start:stop]

    def header_hashes(self) -> dict[str, str]:
        """SHA-256 of each file's header, by file name."""
        return {}

    def changed_files(self) -> list[str]:
        """Files that are no longer what was opened."""
        return []

    def place(self, name: str) -> tuple[int, int] | None:
        """The open local file of a tensor and the byte at which its first element lies; None where there is no such place."""
        return None

    def called(self, name: str) -> str:
        """What a tensor is called where it is stored: what a user can name."""
        return name

    def has_place(self, name: str) -> bool:
        """Whether a tensor has such a place, or will have one once this was prepared."""
        return self.place(name) is not None

    def lacking(self) -> Lack | None:
        """What `prepare` downloads; None where everything is here."""
        return None

    def as_stored(self) -> Source:
        """The tensors as the files hold them, codes and scales too."""
        return self

    def origins(self) -> Sequence[Source]:
        """The stored weights that this stands for; itself, unless it only shows others under other names."""
        return (self,)

    # What is computed.

    def children(self) -> Sequence[Source]:
        """The sources that this one is computed from; none where it is stored."""
        return ()

    @property
    def abreast(self) -> int:
        """How many sources are read side by side for one tensor."""
        return len(self.children())

    def prepare(self) -> None:  # noqa: B027  nothing, where it is stored
        """Do once what must be done before the first row."""

    def passes(self) -> Sequence[Pass]:
        """The walks over the inputs that `prepare` makes."""
        return ()

    def block(self, window: Window, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor that this source calls `name`, from within a window."""
        return window.rows(self, name, start, stop)

    def whole(self, name: str) -> bool:
        """Whether any row of this tensor needs all of it."""
        return False

    def grain(self, name: str) -> int:
        """Rows that are made together: a window holds whole runs of so many."""
        return self.specs[name].rows if self.whole(name) else 1

    def demand(self, name: str) -> Demand:
        """What it takes to get this tensor."""
        return Demand(self.specs[name].nbytes)

    def write(self, name: str, ground: Source | None, weight: float, slots: Any) -> bool:
        """Write ground + weight · tensor straight into the output's `Slots`; False where it cannot, and nothing was written."""
        return False

    def guards(self) -> Sequence[Any]:
        """What looks at the values that pass by, whose findings must come back from another process."""
        return ()

    def recipe(self) -> Mapping[str, Any] | None:
        """How this was computed, for the provenance."""
        return None

    def left_out(self, base: Source | None) -> Mapping[str, str]:
        """Tensors of this base that it does not move, and what becomes of them: `excluded`, or what the chain does elsewhere."""
        return {}

    def excluded(self, base: Source | None) -> Sequence[str]:
        """Tensors of this base that go over as they are, because the recipe leaves them out by name."""
        return ()

    def alternatives(self) -> Mapping[str, float]:
        """What other solvers of the same objective would take, in operations."""
        return {}

    def warnings(self, base: Source | None) -> Sequence[str]:
        """What deserves a second look, once everything was read."""
        return ()


def leaves(sources: Iterable[Source]) -> list[Source]:
    """Every stored source below some sources, each once."""
    found: dict[str, Source] = {}
    for source in sources:
        _find_stored(source, found)
    return list(found.values())


def _find_stored(source: Source, found: dict[str, Source]) -> None:
    for child in source.children():
        _find_stored(child, found)
    for origin in source.origins():
        if origin is not source:
            _find_stored(origin, found)
        elif not source.children():
            found.setdefault(origin.key, origin)


def computed(sources: Iterable[Source]) -> list[Source]:
    """Every computed source among and below some sources, each once, those below first."""
    found: dict[str, Source] = {}
    for source in sources:
        _find_computed(source, found)
    return list(found.values())


def _find_computed(source: Source, found: dict[str, Source]) -> None:
    for child in source.children():
        _find_computed(child, found)
    if source.children():
        found.setdefault(source.key, source)


def span(spec: Spec, start: int, stop: int | None) -> tuple[int, int]:
    """Row bounds, checked.

    Raises:
        IndexError: `start:stop` does not lie inside the tensor.
    """
    end = spec.rows if stop is None else stop
    if not 0 <= start <= end <= spec.rows:
        raise IndexError(f"Rows {start}:{end} do not lie inside {spec.name!r} with {spec.rows} rows.")
    return start, end
