r"""Leading right singular directions by a random range finder, as many as the spectrum asks for, and what they leave out.

Randomised subspace iteration, block by block, each block taken orthogonal to those before (Halko, Martinsson and Tropp, SIAM Review
2011; Martinsson and Voronin, SIAM J. Sci. Comput. 2016). The error needs no estimate: V is orthonormal, so ‖M − MVVᵀ‖² = ‖M‖² − ‖MV‖²
holds for whatever V was found. Both are summed in float64; what is less than the rounding of float32 columns is zero.

A sketch is a function of `bits` and M alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps
from thetau.linalg.sketch import Bits, signs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FIRST = 16  # directions of the first block; the blocks after it double what is there
BESIDE = 8  # directions that are found beside a given number, and dropped
TINY, HUGE = 1e-24, 1e30  # between them no row that counts leaves the range of float32
POWERS = 1  # powers of MᵀM that each block goes through


@dataclass(frozen=True, kw_only=True)
class Leading:
    """M V = `images`, whose columns are orthogonal and have the lengths `values`, falling; `rest` is ‖M − MVVᵀ‖²."""

    images: Float[Tensor, "rows r"]
    values: Float[Tensor, " r"]  # float64
    vectors: Float[Tensor, "columns r"]
    rest: float
    square: float  # ‖M‖²
    enough: bool = True  # whether it was allowed as many as it asked for

    def cut(self, rank: int) -> Leading:
        """The first of them."""
        if rank >= len(self.values):
            return self
        rest = self.rest + float(self.values[rank:].square().sum())
        images, values, vectors = self.images[:, :rank], self.values[:rank], self.vectors[:, :rank]
        return replace(self, images=images, values=values, vectors=vectors, rest=rest)

    def least(self, tolerance: float) -> Leading:
        """The fewest of them that leave out no more than a share of ‖M‖²."""
        outside = self.rest + (self.values.square().sum() - self.values.square().cumsum(0))
        return self.cut(1 + int((outside > tolerance * self.square).sum()))


def leading(matrix: Float[Tensor, "rows columns"], rank: int, bits: Bits, *, square: float | None = None) -> Leading:
    """So many directions, at most; `square` is ‖M‖² where it is known. Zeros have none."""
    width = min(rank + BESIDE, *matrix.shape)
    basis = _block(matrix, None, width, bits, 0)
    return _measured(matrix @ basis, basis, energy(matrix) if square is None else square).cut(rank)


def followed(
    matrix: Float[Tensor, "rows columns"],
    limit: int,
    bits: Bits,
    *,
    tolerance: float,
    square: float | None = None,
    first: int = FIRST,
) -> Leading:
    """As many directions as the spectrum asks for, at most `limit`; `first` in the first block.

    It ends where what is left out is no more than the share `tolerance` of ‖M‖², or where it looks like noise: no direction of it
    stands out from its mean by more than from independent entries of one variance, (1 + √β)² times with β the ratio of the sides
    (Marchenko and Pastur, 1967). The last values of a sketch are too small to tell; the one `BESIDE` before the last is asked.
    """
    square = energy(matrix) if square is None else square
    small, large = min(matrix.shape), max(matrix.shape)
    edge = (1 + (small / large) ** 0.5) ** 2
    basis = images = matrix.new_empty(0, 0)
    while True:
        before = basis.shape[1]
        width = min(max(first, 2 * before), limit) - before
        block = _block(matrix, basis if before else None, width, bits, before)
        basis = torch.cat([basis, block], 1) if before else block
        images = torch.cat([images, matrix @ block], 1) if before else matrix @ block
        found = _measured(images, basis, square)
        count = before + width
        noise = edge * found.rest / max(1, small - count)
        if found.rest <= tolerance * square or float(found.values[-1 - BESIDE :][0]) ** 2 <= noise:
            return found
        if count >= limit:
            return replace(found, enough=False)


def leading_flops(rows: int, columns: int, rank: int) -> float:
    """Operations of as many directions: the products of a block, its orthogonalisation twice."""
    width = min(rank + BESIDE, rows, columns)
    return 2.0 * width * rows * columns * (2 + 2 * POWERS) + (rows + columns) * width**2 * (4.0 + 4 * POWERS) + 20.0 * width**3


def energy(matrix: Float[Tensor, "rows columns"]) -> float:
    """‖M‖²: rows in float32, which is eight times as fast, their sum in float64; all in float64 where rows leave float32's range."""
    square = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    if TINY < square < HUGE:
        return square
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _block(matrix: Tensor, basis: Tensor | None, width: int, bits: Bits, number: int) -> Tensor:
    """Orthonormal columns, orthogonal to the basis."""
    start = signs(matrix.shape[0], width, lambda axis, count: bits(f"{axis}{number}", count))
    block = _beside(basis, matrix.T @ start.to(matrix))
    for _ in range(POWERS):
        block = _beside(basis, matrix.T @ torch.linalg.qr(matrix @ block).Q)
    return block


def _beside(basis: Tensor | None, columns: Tensor) -> Tensor:
    """An orthonormal basis of what columns have outside another; projected twice, since what is left may be small."""
    if basis is None:
        return _orthonormal(columns)
    for _ in range(2):
        columns = _orthonormal(columns - basis @ (basis.T @ columns))
    return columns


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def _measured(images: Tensor, basis: Tensor, square: float) -> Leading:
    """The singular value decomposition of M on a basis, from its images, and what is outside it."""
    exact = images.double()
    values, turn = torch.linalg.eigh(exact.T @ exact)
    values, turn = values.flip(0).clamp(min=0), turn.flip(1).to(images)
    rest = square - float(values.sum())
    precision = max(len(images), len(basis)) ** 0.5 * eps(images.dtype)
    lengths = values.sqrt()
    seen = max(1, int((lengths > lengths[0] * precision).sum()))
    return Leading(
        images=images @ turn[:, :seen],
        values=lengths[:seen],
        vectors=basis @ turn[:, :seen],
        rest=rest if rest > MARGIN * precision * square else 0.0,
        square=square,
    )
