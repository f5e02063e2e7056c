"""Matrices that lie together in one stored tensor, and the tensor put together again: fused q/k/v, gate and up, the experts of a mixture.

Nothing is copied: a piece is read from where it lies, as the matrix `[d_out, d_in]` that it is; of stacked experts one expert at a time.
Which pieces a tensor holds is told by `checkpoint.layouts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.align import Alignment
from thetau.checkpoint.source import Demand, Source, span

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Which entries of an axis a piece takes: `count` of every `every` from `first` on, `times` times; the axis has `every` · `times`.

    Examples:
        >>> Strip(first=1, count=1, every=3, times=2).of(torch.arange(6), 0)
        tensor([1, 4])
    """

    first: int
    count: int
    every: int
    times: int = 1

    @classmethod
    def whole(cls, size: int) -> Strip:
        """The whole axis."""
        return cls(first=0, count=size, every=size)

    @property
    def size(self) -> int:
        """Entries that are taken."""
        return self.count * self.times

    @property
    def together(self) -> bool:
        """Whether they lie next to each other."""
        return self.times == 1 or self.count == self.every

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """The entries, along an axis counted from the front."""
        return self._taken(tensor, axis).flatten(axis, axis + 1)

    def put(self, into: Tensor, axis: int, values: Tensor) -> None:
        """The inverse: write the entries where they belong."""
        self._taken(into, axis).copy_(torch.unflatten(values, axis, (self.times, self.count)))

    def _taken(self, tensor: Tensor, axis: int) -> Tensor:
        """A view of the entries, the axis being two."""
        return torch.unflatten(tensor, axis, (self.times, self.every)).narrow(axis + 1, self.first, self.count)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One matrix, or one vector, of each unit of a fused tensor. `called` is its name with `{}` for the unit's number."""

    called: str
    strip: Strip

    def name(self, unit: int) -> str:
        """What the matrix of one unit is called."""
        return self.called.replace("{}", str(unit))


@dataclass(frozen=True, kw_only=True)
class Fused:
    """How one stored tensor holds several: so many `units` of the same parts, a unit being one expert; one unit where nothing is stacked.

    - `shape`: as stored: `[unit, rows, columns]` or `[unit, entries]` where units are `stacked` along an axis of their own, else
      `[unit · rows, columns]`.
    - `turned`: a unit is stored `[d_in, d_out]`; parts are always taken along d_out.
    - `experts`: whether the units are experts of a mixture.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    units: int = 1
    stacked: bool = False
    turned: bool = False
    experts: bool = False

    @property
    def grain(self) -> int:
        """Stored rows of one unit."""
        return 1 if self.stacked else self.shape[0] // self.units

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Of one unit as stored."""
        return self.shape[1:] if self.stacked else (self.grain, *self.shape[1:])

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """Every piece by name, unit by unit."""
        return {
            part.name(unit): Piece(name=part.name(unit), fused=self, unit=unit, strip=part.strip)
            for unit in range(self.units)
            for part in self.parts
        }

    def logical(self, unit: Tensor, lead: int = 0) -> Tensor:
        """A view of one unit with d_out before d_in; `lead` axes stand before its own."""
        return unit.transpose(lead, lead + 1) if self.turned else unit

    def joined(self, unit: int, made: Callable[[Piece], Float[Tensor, "*lead d_out d_in"]]) -> Float[Tensor, "*lead rows *rest"]:
        """One unit's stored rows, put together from its pieces; all have the same axes before their own."""
        out: Tensor | None = None
        for part in self.parts:
            values = made(self.pieces[part.name(unit)])
            lead = values.shape[: values.ndim - len(self.unit_shape)]
            if out is None:
                out = values.new_empty((*lead, *self.unit_shape))
            part.strip.put(self.logical(out, len(lead)), len(lead), values)
        assert out is not None
        return out.unsqueeze(out.ndim - len(self.unit_shape)) if self.stacked else out

    def rows(self, start: int, stop: int, made: Callable[[int], Tensor], lead: int = 0) -> Tensor:
        """Stored rows, given each unit's."""
        first, last = start // self.grain, -(-stop // self.grain)
        units = [made(unit) for unit in range(first, last)]
        rows = units[0] if len(units) == 1 else torch.cat(units, lead)
        return rows.narrow(lead, start - first * self.grain, stop - start)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One matrix `[d_out, d_in]`, or one vector, inside a fused tensor."""

    name: str
    fused: Fused
    unit: int
    strip: Strip

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        own = self.fused.unit_shape
        return (self.strip.size, *(own[:-1] if self.fused.turned else own[1:]))

    @property
    def by_rows(self) -> bool:
        """Whether single rows of it can be read without the rest of its unit."""
        return not self.fused.stacked and not self.fused.turned

    @property
    def slabs(self) -> bool:
        """Whether it is a run of rows of one stacked matrix."""
        return len(self.fused.shape) == 3 and self.fused.stacked and not self.fused.turned and self.strip.together

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """The stored rows that hold these rows of it."""
        if not self.by_rows:
            return self.unit * self.fused.grain, (self.unit + 1) * self.fused.grain
        strip, ground = self.strip, self.unit * self.fused.grain
        if start == stop:
            return ground, ground
        low, high = ((row // strip.count) * strip.every + strip.first + row % strip.count for row in (start, stop - 1))
        return ground + low, ground + high + 1

    def read(self, source: Source, theirs: str, start: int, stop: int) -> Tensor:
        """Rows of the matrix, out of a source that calls the fused tensor `theirs`."""
        fused, strip = self.fused, self.strip
        if self.slabs:
            return source.slab(theirs, self.unit, strip.first + start, strip.first + stop)
        low, high = self.reach(start, stop)
        stored = source.read(theirs, low, high)
        if self.by_rows and strip.together:
            return stored
        if self.by_rows:
            at = torch.arange(start, stop)
            rows = (at // strip.count) * strip.every + strip.first + at % strip.count
            return stored[rows - (low - self.unit * fused.grain)]
        unit = stored[0] if fused.stacked else stored
        return strip.of(fused.logical(unit), 0)[start:stop].contiguous()

    def offset(self) -> int | None:
        """The element of the stored tensor at which it begins, if it lies there as it is."""
        if self.fused.turned or not self.strip.together:
            return None
        own = self.fused.unit_shape
        return self.unit * prod(own) + self.strip.first * prod(own[1:])


class PiecesView(Source):
    """A source whose fused tensors stand as the pieces that they hold. `places` are a piece and the source's name of its fused tensor."""

    def __init__(self, source: Source, places: Mapping[str, tuple[Piece, str]]) -> None:
        self.label, self.degree, self.partial, self.folder = source.label, source.degree, source.partial, source.folder
        self.metadata, self.over, self.quantised = source.metadata, source.over, source.quantised
        digest = hashlib.blake2b(repr([(name, theirs) for name, (_, theirs) in sorted(places.items())]).encode(), digest_size=8)
        self.key = f"pieces:{source.key}:{digest.hexdigest()}"
        specs = dict(source.specs)
        for name, (piece, theirs) in places.items():
            specs[name] = replace(specs[theirs], name=name, shape=piece.shape)
        self.specs = specs
        self._source, self._places = source, dict(places)

    def origins(self) -> Sequence[Source]:
        """What is shown."""
        return (self._source,)

    def children(self) -> Sequence[Source]:
        """Those of what is shown."""
        return self._source.children()

    def prepare(self) -> None:
        """What the source needs."""
        self._source.prepare()

    def fingerprint(self) -> str:
        """That of what is shown."""
        return self._source.fingerprint()

    def changed_files(self) -> list[str]:
        """Those of what is shown."""
        return self._source.changed_files()

    def called(self, name: str) -> str:
        """The fused tensor's name."""
        return self._source.called(self._places[name][1] if name in self._places else name)

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a piece lies, if it lies there as it is."""
        if name not in self._places:
            return self._source.place(name)
        piece, theirs = self._places[name]
        offset, there = piece.offset(), self._source.place(theirs)
        return None if offset is None or there is None else (there[0], there[1] + offset * self.specs[name].dtype.itemsize)

    def has_place(self, name: str) -> bool:
        """Whether it has one, or will have one."""
        if name not in self._places:
            return self._source.has_place(name)
        piece, theirs = self._places[name]
        return piece.offset() is not None and self._source.has_place(theirs)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a piece as they would be stored alone."""
        if name not in self._places:
            return self._source.read(name, start, stop)
        piece, theirs = self._places[name]
        return piece.read(self._source, theirs, *span(self.specs[name], start, stop))

    def whole(self, name: str) -> bool:
        """Whether all of it is read for any row: of a turned matrix, or of an expert."""
        if name not in self._places:
            return self._source.whole(name)
        piece, _ = self._places[name]
        return not (piece.by_rows or (piece.slabs and self._source.exact))

    def demand(self, name: str) -> Demand:
        """The source's demand for the rows that are read, and what is read beside the piece."""
        if name not in self._places:
            return self._source.demand(name)
        piece, theirs = self._places[name]
        inner, spec = self._source.demand(theirs), self._source.specs[theirs]
        low, high = piece.reach(0, piece.shape[0])
        if piece.slabs and self._source.exact:
            return replace(inner, read=self.specs[name].nbytes)
        whole = self._source.whole(theirs)
        share = 1.0 if whole or not spec.rows else (high - low) / spec.rows
        beside = 0 if piece.by_rows and piece.strip.together else (high - low) * spec.row_elements * spec.dtype.itemsize
        return replace(inner, read=round(inner.read * share), memory=inner.memory + beside, flops=inner.flops * share)


def apart(alignment: Alignment, fused: Mapping[str, Fused], sources: Iterable[Source]) -> Alignment:
    """An alignment in which the pieces of fused tensors stand for these, in all sources.

    What a source holds under a fused tensor's name in another shape (a Gram matrix of inputs) stands for each of its pieces as it is.
    """
    if not fused:
        return alignment
    names, specs = [], {name: spec for name, spec in alignment.specs.items() if name not in fused}
    for name in alignment.names:
        names += list(fused[name].pieces) if name in fused else [name]
    for name, one in fused.items():
        specs |= {piece.name: replace(alignment.specs[name], name=piece.name, shape=piece.shape) for piece in one.pieces.values()}
    maps, views = dict(alignment.maps), dict(alignment.views)
    for source in sources:
        mapping = dict(alignment.maps[source.key])
        seen = alignment.seen(source)
        places: dict[str, tuple[Piece, str]] = {}
        for name, one in fused.items():
            theirs = mapping.pop(name, None)
            if theirs is None:
                continue
            same = seen.specs[theirs].shape == one.shape
            for piece in one.pieces.values():
                mapping[piece.name] = piece.name if same else theirs
                if same:
                    places[piece.name] = piece, theirs
        maps[source.key] = mapping
        if places:
            views[source.key] = PiecesView(seen, places)
    return replace(alignment, specs=specs, names=tuple(names), maps=maps, views=views)
