"""Stored tensors under other names and in another order: layers moved about, rows of an embedding mapped to another vocabulary.

Nothing is copied: an arranged tensor is read from where it lies, row by row where its rows are mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.source import Demand, Source, Spec, span
from thetau.checkpoint.window import Window
from thetau.errors import AlignmentError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

ZERO = -1  # of `RowMap.origin`: a row of zeros
MEAN = -2  # a row that is the mean of others
GAP = 64  # rows between two wanted ones that are read with them sooner than by another read


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which stored row each row of an arranged tensor is.

    - `origin`: index into the piece's origins, by row; `ZERO` for zeros, `MEAN` for a mean.
    - `row`: the row in that origin.
    - `means`: rows that are means, each of the `(origin, row)` given for it.
    - `padding`: the first row that is padding; from there on every row is the mean of all rows before. None where there is none.
    """

    origin: Int[np.ndarray, " rows"]
    row: Int[np.ndarray, " rows"]
    means: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    padding: int | None = None

    def __len__(self) -> int:
        return len(self.origin)

    @cached_property
    def digest(self) -> str:
        """Tells this map from others."""
        found = hashlib.blake2b(digest_size=16)
        found.update(self.origin.astype(np.int64).tobytes())
        found.update(self.row.astype(np.int64).tobytes())
        found.update(repr((sorted(self.means.items()), self.padding)).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Piece:
    """Where an arranged tensor comes from: a tensor of a source, or rows of several.

    `origins` are further tensors of which single rows are taken: what `rows` counts from 1 on, the piece's own tensor being 0.
    """

    source: Source
    name: str
    rows: RowMap | None = None
    origins: tuple[tuple[Source, str], ...] = ()

    @property
    def places(self) -> tuple[tuple[Source, str], ...]:
        """The tensors that rows are taken of, the own one first."""
        return ((self.source, self.name), *self.origins)

    @property
    def shape(self) -> tuple[int, ...]:
        """The arranged tensor's."""
        own = self.source.specs[self.name].shape
        return own if self.rows is None else (len(self.rows), *own[1:])

    @property
    def dtype(self) -> Dtype:
        """The widest of its tensors', so that no row is rounded."""
        dtypes = [source.specs[name].dtype for source, name in self.places]
        found = dtypes[0]
        for dtype in dtypes[1:]:
            found = found.wider(dtype)
        mixed = self.rows is not None and (self.rows.means or self.rows.padding is not None)
        return found.wider(Dtype.F32) if mixed else found


class Arranged(Source):
    """One model's tensors, or those of several, under an output's names."""

    def __init__(
        self,
        pieces: Mapping[str, Piece],
        *,
        label: str,
        degree: int = 1,
        partial: bool = False,
        folder: Path | None = None,
        metadata: Mapping[str, str] = MappingProxyType({}),
        files: Mapping[str, Any] = MappingProxyType({}),
        quantised: str = "",
        coded: frozenset[str] = frozenset(),
        twins: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.pieces, self.label = dict(pieces), label
        self.files, self.quantised, self.coded, self.twins = files, quantised, coded, twins
        self.degree, self.partial, self.folder, self.metadata = degree, partial, folder, metadata
        self.specs = {
            name: Spec(name=name, shape=piece.shape, dtype=piece.dtype, file=piece.source.specs[piece.name].file)
            for name, piece in self.pieces.items()
        }
        for name, piece in self.pieces.items():
            _check(name, piece, label)
        found: dict[str, Source] = {}
        for piece in self.pieces.values():
            for source, _ in piece.places:
                found.setdefault(source.key, source)
        self._origins = tuple(found.values())
        self.key = f"arranged:{self._digest(lambda source: source.key)}"
        self._paddings: dict[str, Tensor] = {}

    def _digest(self, said: Callable[[Source], str]) -> str:
        found = hashlib.blake2b(digest_size=16)
        known = {source.key: said(source) for source in self.origins()}
        for name, piece in sorted(self.pieces.items()):
            places = [(known[source.key], theirs) for source, theirs in piece.places]
            found.update(repr((name, places, piece.rows.digest if piece.rows is not None else None)).encode())
        return found.hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the sources."""
        return tuple(dict.fromkeys(note for source in self.origins() for note in source.notes))

    def origins(self) -> Sequence[Source]:
        """The sources below, each once, in the order of the pieces."""
        return self._origins

    def fingerprint(self) -> str:
        """Of the sources' fingerprints and of the arrangement."""
        return self._digest(lambda source: source.fingerprint())

    def children(self) -> Sequence[Source]:
        """The sources that are computed themselves."""
        return [source for source in self.origins() if source.children()]

    def changed_files(self) -> list[str]:
        """Files below that are no longer what was opened."""
        return [file for source in self.origins() for file in source.changed_files()]

    def prepare(self) -> None:
        """What the sources need."""
        for source in self.origins():
            source.prepare()

    def place(self, name: str) -> tuple[int, int] | None:
        """Where the tensor lies, if it is a stored one as it is."""
        piece = self.pieces[name]
        return piece.source.place(piece.name) if piece.rows is None else None

    def has_place(self, name: str) -> bool:
        """Whether it has one, or will have one."""
        piece = self.pieces[name]
        return piece.rows is None and piece.source.has_place(piece.name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows as stored, or gathered from where they lie."""
        start, stop = span(self.specs[name], start, stop)
        piece = self.pieces[name]
        if piece.rows is None:
            return piece.source.read(piece.name, start, stop)
        return self._gathered(piece, piece.rows, self.specs[name], start, stop)

    def block(self, window: Window, name: str, start: int, stop: int) -> Tensor:
        """Rows within a window; a computed source computes them there."""
        piece = self.pieces[name]
        if piece.rows is None and piece.source.children():
            return piece.source.block(window.called(piece.name), piece.name, start, stop)
        return window.rows(self, name, start, stop)

    def whole(self, name: str) -> bool:
        """As the source says."""
        piece = self.pieces[name]
        return piece.rows is None and piece.source.whole(piece.name)

    def grain(self, name: str) -> int:
        """The source's."""
        piece = self.pieces[name]
        return piece.source.grain(piece.name) if piece.rows is None else 1

    def demand(self, name: str) -> Demand:
        """What the source takes; of mapped rows, those rows."""
        piece = self.pieces[name]
        if piece.rows is None:
            return piece.source.demand(piece.name)
        inner = [source.demand(theirs) for source, theirs in piece.places]
        return Demand(self.specs[name].nbytes, max(one.memory for one in inner), sum(one.flops for one in inner), "torch")

    def _gathered(self, piece: Piece, rows: RowMap, spec: Spec, start: int, stop: int) -> Tensor:
        out = torch.zeros((stop - start, *spec.shape[1:]), dtype=spec.dtype.torch)
        origin, row = rows.origin[start:stop], rows.row[start:stop]
        for index, (source, theirs) in enumerate(piece.places):
            _take(source, theirs, row, np.flatnonzero(origin == index), out)
        for at in np.flatnonzero(origin == MEAN):
            parts = rows.means[start + int(at)]
            picked = [piece.places[index] for index, _ in parts]
            values = [source.read(name, which, which + 1)[0] for (source, name), (_, which) in zip(picked, parts, strict=True)]
            out[at] = torch.stack([value.float() for value in values]).mean(0).to(spec.dtype.torch)
        if rows.padding is not None and stop > rows.padding:
            out[max(0, rows.padding - start) :] = self._padding(piece, rows, spec)
        return out

    def _padding(self, piece: Piece, rows: RowMap, spec: Spec) -> Tensor:
        """The mean of all rows that are no padding, taken block by block in float64."""
        if spec.name not in self._paddings:
            assert rows.padding is not None
            total = torch.zeros(spec.shape[1:], dtype=torch.float64)
            step = max(1, (1 << 20) // max(1, spec.row_elements))
            for first in range(0, rows.padding, step):
                total += self._gathered(piece, rows, spec, first, min(first + step, rows.padding)).double().sum(0)
            self._paddings[spec.name] = (total / rows.padding).to(spec.dtype.torch)
        return self._paddings[spec.name]


def _take(source: Source, name: str, row: np.ndarray, at: np.ndarray, out: Tensor) -> None:
    """Read the wanted rows in as few pieces as they lie in, and put each where it belongs."""
    if not len(at):
        return
    order = at[np.argsort(row[at], kind="stable")]
    wanted = row[order]
    breaks = np.flatnonzero(np.diff(wanted) > GAP) + 1
    for places, rows in zip(np.split(order, breaks), np.split(wanted, breaks), strict=True):
        first, last = int(rows[0]), int(rows[-1]) + 1
        values = source.read(name, first, last)
        out[torch.from_numpy(places)] = values[torch.from_numpy(rows - first)].to(out.dtype)


def _check(name: str, piece: Piece, label: str) -> None:
    own = piece.source.specs[piece.name]
    if piece.rows is None:
        return
    for index, (source, theirs) in enumerate(piece.places):
        spec = source.specs[theirs]
        if spec.shape[1:] != own.shape[1:]:
            raise AlignmentError(
                f"{label}: {name!r} takes rows of {theirs!r} of {source.label}, which has shape {list(spec.shape)}; "
                f"{own.name!r} of {piece.source.label} has {list(own.shape)}."
            )
        used = piece.rows.row[piece.rows.origin == index]
        beyond = [which for parts in piece.rows.means.values() for place, which in parts if place == index]
        if (len(used) and (int(used.max()) >= spec.rows or int(used.min()) < 0)) or any(not 0 <= r < spec.rows for r in beyond):
            raise AlignmentError(
                f"{label}: {name!r} takes a row that {theirs!r} of {source.label} with {spec.rows} rows has not."
            )
