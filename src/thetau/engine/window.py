"""Reading: which rows are worked on at once, and the rows of all sources over one such window.

Arithmetic always runs over the same blocks of rows, fixed by a tensor's shape alone, so that no setting can change a bit. A window is
how many of those blocks are read from disk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint import Alignment, Source, Spec
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.window import Window
from thetau.parts import as_float
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements of a block: with a stack of eight in float32, 2 MiB, which a core's cache holds


def block_rows(spec: Spec) -> int:
    """Rows of one block."""
    return max(1, BLOCK // max(1, spec.row_elements))


def blocks(spec: Spec, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The blocks between two rows, of which the first starts at a block's edge; rows without entries are one block, however many."""
    if not spec.row_elements:
        if start < stop:
            yield start, stop
        return
    step = block_rows(spec)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def window_rows(spec: Spec, elements: int, grain: int = 1) -> int:
    """Rows of one window of about `elements` elements: whole blocks, at least one, or whole runs of `grain` rows that are made together."""
    if elements >= spec.elements:
        return spec.rows
    least = grain if grain > 1 else block_rows(spec)
    return min(spec.rows, least * max(1, elements // (least * spec.row_elements)))


def windows(spec: Spec, elements: int, grain: int = 1) -> Iterator[tuple[int, int]]:
    """Windows of so many rows, one after the other."""
    step = max(1, window_rows(spec, elements, grain))
    for first in range(0, spec.rows, step):
        yield first, min(first + step, spec.rows)


def whole_tensor(spec: Spec, elements: int, made: Callable[[Window, int, int], Tensor], lead: int = 0) -> Tensor:
    """All rows of a tensor that is made block by block, or window by window where a window is the whole; `lead` axes stand before the rows."""
    found = []
    for low, high in windows(spec, elements):
        window = Window(spec.name, low, high)
        whole = elements >= spec.elements
        found += [made(window, low, high)] if whole else [made(window, start, stop) for start, stop in blocks(spec, low, high)]
    return found[0] if len(found) == 1 else torch.cat(found, lead)


class Reading:
    """Evaluates linear combinations over windows, given how the sources align."""

    def __init__(self, alignment: Alignment, combinations: Sequence[Combination]) -> None:
        self.alignment = alignment
        self.wide = any(spec.dtype is Dtype.F64 for c in combinations for s in c.sources() for spec in s.specs.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.float64 if self.wide else torch.float32

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the arithmetic."""
        return 8 if self.wide else 4

    def terms(self, combination: Combination, name: str) -> list[tuple[float, Source, str]]:
        """The terms that hold this tensor, and its name in each."""
        maps: Mapping[str, Mapping[str, str]] = self.alignment.maps
        seen = self.alignment.seen
        return [
            (weight, seen(source), maps[source.key][name]) for weight, source in combination.terms if name in maps[source.key]
        ]

    def evaluate(self, combination: Combination, window: Window, start: int, stop: int, out: Tensor) -> None:
        """Write Σ weight · rows into `out`, in float32 (float64 where a source is)."""
        terms = self.terms(combination, window.name)
        if not terms:
            out.zero_()
            return
        for index, (weight, source, name) in enumerate(terms):
            rows = self.rows(source, name, window, start, stop)
            if index == 0:
                out.copy_(rows)
                if weight != 1:
                    out.mul_(weight)
            else:
                rows = as_float(rows).to(out.dtype)
                out.add_(rows if weight == 1 else rows * weight)  # two roundings, as the compiled loop makes them, not one

    def rows(self, source: Source, name: str, window: Window, start: int, stop: int) -> Tensor:
        """Rows of one source; a merge is computed, everything else read."""
        return source.block(window, name, start, stop)

    def stack(self, combinations: Sequence[Combination], window: Window, start: int, stop: int) -> Tensor:
        """`[task, rows, *rest]` of task vectors."""
        spec = self.alignment.specs[window.name]
        rest = spec.shape[1:]
        out = torch.empty((len(combinations), stop - start, *rest), dtype=self.dtype)
        for task, combination in enumerate(combinations):
            self.evaluate(combination, window, start, stop, out[task])
        return out


def straight(reading: Reading, combination: Combination, name: str) -> tuple[float, Source, Source | None] | None:
    """Weight, merge and ground where a tensor is a base's and one computed term over it, or such a term alone; None otherwise."""
    terms = reading.terms(combination, name)
    merges = [(weight, source) for weight, source, theirs in terms if source.children() and theirs == name]
    grounds = [source for weight, source, _ in terms if weight == 1 and not source.children()]
    if len(merges) != 1 or len(terms) != 1 + len(grounds) or len(grounds) > 1:
        return None
    return (*merges[0], grounds[0] if grounds else None)


def read_rows(source: Source, name: str, start: int, stop: int | None) -> Tensor:
    """Rows of a computed source that is prepared, outside any walk: all at once where it needs the whole tensor, else block by block."""
    spec = source.specs[name]
    stop = spec.rows if stop is None else stop
    if source.whole(name):
        rows = source.block(Window(name, 0, spec.rows), name, start, stop)
    else:
        window = Window(name, start, stop)
        rows = torch.cat([source.block(window, name, a, b) for a, b in blocks(spec, start, stop)])
    return rows if spec.shape else rows.reshape(())
