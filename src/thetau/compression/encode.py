"""One encoder a form: what a tensor will take, then its parts, written window by window, with the error that this brings.

The low-rank form truncates a singular value decomposition, the best approximation of its rank in Frobenius norm (Eckart and Young,
Psychometrika 1, 1936). It goes through the smaller of the two Gram matrices, in float64, whose singular values are exact to about
1e-8 of the largest: below that lies what float32 itself rounds away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeAlias, final, runtime_checkable

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint import Dtype, Spec, dtype_name
from thetau.checkpoint.compressed import BLOCK, SCALED_ROW, Layout, block_rows, layout
from thetau.compression.forms import LowRank, Precision
from thetau.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

Put: TypeAlias = "Callable[[str, int, Tensor], None]"  # part, first row, rows
Windows: TypeAlias = "Iterable[tuple[int, Tensor]]"  # first row, rows; those of a 0-d tensor have shape [1]
Kept: TypeAlias = "Callable[[str, int, Tensor], Tensor]"  # tensor, first row, rows → the same with zeros where nothing is kept


@dataclass(frozen=True)
class Room:
    """What a tensor will take: its kind, and its parts."""

    kind: str
    parts: Layout

    @property
    def values(self) -> tuple[tuple[int, ...], Dtype]:
        """Shape and dtype of its values."""
        return self.parts["values"]


@dataclass(frozen=True)
class Loss:
    """‖τ‖² and ‖τ − τ̂‖² of a tensor, and how many of its entries are stored."""

    square: float
    error: float
    kept: int


@runtime_checkable
class Encoder(Protocol):
    """A form at work. `room` comes first for every tensor, `encode` once for each after that; both may run in several threads."""

    @property
    def looks(self) -> bool:
        """Whether `room` reads the tensor."""
        ...

    def memory(self, spec: Spec) -> int:
        """Bytes held beside the windows."""
        ...

    def room(self, spec: Spec, windows: Windows) -> Room:
        """What a tensor will take."""
        ...

    def encode(self, spec: Spec, room: Room, again: Callable[[], Windows], put: Put) -> Loss:
        """Write its parts; `again` reads it from the start."""
        ...


class Bits:
    """A mask on its way to the file: eight entries a byte, the lowest bit first, whatever the rows in which it comes."""

    def __init__(self, put: Callable[[int, Tensor], None]) -> None:
        self._put, self._done = put, 0
        self._carry = np.zeros(0, dtype=np.uint8)  # bits that do not fill a byte yet

    def add(self, mask: Tensor, *, last: bool) -> None:
        """The next entries; what is left of the last byte is 0."""
        bits = np.concatenate([self._carry, mask.reshape(-1).numpy().astype(np.uint8)])
        whole = len(bits) if last else len(bits) // 8 * 8
        packed = np.packbits(bits[:whole], bitorder="little")
        self._put(self._done, torch.from_numpy(packed))
        self._done, self._carry = self._done + len(packed), bits[whole:]


@final
@dataclass(frozen=True)
class SparseEncoder:
    """Values where `kept` leaves something that does not round to zero."""

    dtype: Dtype
    kept: Kept
    looks: bool = True

    def memory(self, spec: Spec) -> int:
        """Little more than a window."""
        return 0

    def room(self, spec: Spec, windows: Windows) -> Room:
        """Counts what is kept."""
        count = sum(int((self._values(spec, start, rows) != 0).sum()) for start, rows in windows)
        return Room("sparse", layout("sparse", spec.shape, self.dtype, kept=count))

    def encode(self, spec: Spec, room: Room, again: Callable[[], Windows], put: Put) -> Loss:
        """Mask, values and offsets, in the order of the rows."""
        planned, step = room.values[0][0], block_rows(spec.row_elements)
        offsets = torch.zeros(room.parts["offsets"][0], dtype=torch.int64)
        square = error = 0.0
        total, bits = 0, Bits(lambda first, packed: put("mask", first, packed))
        for start, rows in again():
            values = self._values(spec, start, rows)
            square, error = square + _square(rows), error + _square(rows - values.float().reshape(rows.shape))
            mask = values != 0
            counts = mask.reshape(len(rows), -1).sum(1).cumsum(0)
            edges = range(-(-start // step) * step, start + len(rows), step)
            for edge in edges:
                offsets[edge // step] = total + (int(counts[edge - start - 1]) if edge > start else 0)
            flat = values.reshape(-1)[mask.reshape(-1)]
            if total + len(flat) > planned:
                raise changed(spec)
            put("values", total, flat)
            total += len(flat)
            bits.add(mask, last=start + len(rows) == spec.rows)
        if total != planned:
            raise changed(spec)
        offsets[-1] = total
        put("offsets", 0, offsets)
        return Loss(square, error, total)

    def _values(self, spec: Spec, start: int, rows: Tensor) -> Tensor:
        return rounded(self.kept(spec.name, start, rows), self.dtype, spec)


@final
@dataclass(frozen=True)
class LowRankEncoder:
    """U·V where that takes less room, the tensor itself elsewhere."""

    form: LowRank
    looks: bool = False

    def memory(self, spec: Spec) -> int:
        """The tensor, its approximation, and the smaller Gram matrix with its eigenvectors."""
        if self._rank(spec) == 0:
            return 0
        return 12 * spec.elements + 24 * min(spec.rows, spec.row_elements) ** 2

    def room(self, spec: Spec, windows: Windows) -> Room:
        """Nothing is read."""
        rank = self._rank(spec)
        kind = "low_rank" if rank else "dense"
        return Room(kind, layout(kind, spec.shape, self.form.values, rank=rank))

    def encode(self, spec: Spec, room: Room, again: Callable[[], Windows], put: Put) -> Loss:
        """The decomposition of the whole tensor, rounded; the error is that of what was stored."""
        if room.kind == "dense":
            return dense(spec, self.form.values, again(), put)
        tau = torch.cat([rows for _, rows in again()]).reshape(spec.rows, -1)
        u, v = (rounded(factor, self.form.values, spec) for factor in truncated(tau, room.parts["u"][0][1]))
        put("u", 0, u)
        put("v", 0, v)
        error, wide = 0.0, v.float()
        for low, part in _blocks(tau):
            error += _square(part - u[low : low + len(part)].float() @ wide)
        return Loss(_square(tau), error, u.numel() + v.numel())

    def _rank(self, spec: Spec) -> int:
        """The rank of the product, or 0 where the tensor stays dense."""
        if len(spec.shape) < 2 or not spec.elements:
            return 0
        rank = min(self.form.rank_of(spec.name), spec.rows, spec.row_elements)
        return rank if rank * (spec.rows + spec.row_elements) < spec.elements else 0


@final
@dataclass(frozen=True)
class PrecisionEncoder:
    """Every entry, rounded."""

    form: Precision
    looks: bool = False

    def memory(self, spec: Spec) -> int:
        """Little more than a window."""
        return 0

    def room(self, spec: Spec, windows: Windows) -> Room:
        """Nothing is read."""
        kind = "scaled" if self.form.dtype == "int8" else "dense"
        return Room(kind, layout(kind, spec.shape, self.form.values))

    def encode(self, spec: Spec, room: Room, again: Callable[[], Windows], put: Put) -> Loss:
        """Round to nearest."""
        if room.kind == "dense":
            return dense(spec, self.form.values, again(), put)
        by_row = spec.row_elements >= SCALED_ROW
        whole = (
            None if by_row else _scale(torch.stack([_largest(rows.reshape(1, -1)) for _, rows in again()] or [torch.zeros(1)]))
        )
        if whole is not None:
            put("scale", 0, whole)
        square = error = 0.0
        for start, rows in again():
            flat = rows.reshape(len(rows), -1)
            scale = whole if whole is not None else _scale(flat.abs().amax(1)[None])
            steps = torch.where(scale[:, None] > 0, flat / scale[:, None], 0).round_().clamp_(-127, 127)
            square, error = square + _square(rows), error + _square(flat - steps * scale[:, None])
            _store(spec, put, start, steps.to(torch.int8).reshape(rows.shape))
            if by_row:
                put("scale", start, scale)
        return Loss(square, error, spec.elements)


def dense(spec: Spec, dtype: Dtype, windows: Windows, put: Put) -> Loss:
    """A tensor as it is, in a dtype."""
    square = error = 0.0
    for start, rows in windows:
        values = rounded(rows, dtype, spec)
        square, error = square + _square(rows), error + _square(rows - values.float())
        _store(spec, put, start, values)
    return Loss(square, error, spec.elements)


def truncated(tau: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U `[rows, rank]` and V `[rank, columns]` whose product is nearest to a matrix; both bear the root of the singular values."""
    tall = tau.shape[0] >= tau.shape[1]
    gram = torch.zeros(min(tau.shape), min(tau.shape), dtype=torch.float64)
    for _, part in _blocks(tau if tall else tau.T):  # blocks of the longer axis
        wide = part.double()
        gram += wide.T @ wide
    values, vectors = torch.linalg.eigh(gram)
    kept = vectors[:, -rank:].flip(1)
    root = values[-rank:].flip(0).clamp(min=0).sqrt().sqrt()  # of the singular values
    inverse = torch.where(root > 0, 1 / root, 0)
    one = torch.cat([part.double() @ (kept * inverse) for _, part in _blocks(tau if tall else tau.T)]).float()
    other = (kept * root).float()
    return (one, other.T.contiguous()) if tall else (other, one.T.contiguous())


def rounded(values: Tensor, dtype: Dtype, spec: Spec) -> Tensor:
    """Values in a dtype.

    Raises:
        OutputError: one of them does not fit.
    """
    out = values.to(dtype.torch)
    if dtype == Dtype.F16 and not bool(torch.isfinite(out).all()):
        raise OutputError(
            f"{spec.name!r}: {float(values.abs().max()):.4g} does not fit {dtype_name(dtype)}. Choose bfloat16 or float32. Nothing was written."
        )
    return out


def changed(spec: Spec) -> CheckpointError:
    """What is wrong when two readings of a tensor differ."""
    return CheckpointError(
        f"{spec.file}: tensor {spec.name!r} changed while it was read. Nothing was written: run again when it is at rest."
    )


def _store(spec: Spec, put: Put, start: int, rows: Tensor) -> None:
    put("values", start, rows if spec.shape else rows.reshape(()))


def _blocks(tau: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, BLOCK // max(1, prod(tau.shape[1:])))
    for low in range(0, len(tau), step):
        yield low, tau[low : low + step]


def _square(rows: Tensor) -> float:
    return float(rows.double().square().sum())


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row; 0 where it has no entry."""
    return rows.abs().amax(1) if rows.shape[1] else torch.zeros(len(rows))


def _scale(largest: Tensor) -> Tensor:
    """What one step of int8 stands for."""
    return largest.amax(0).float() / 127
