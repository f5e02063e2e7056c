"""How many directions a matrix has: singular values, stable and effective rank; whole where that is cheap, else the leading ones by a sketch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from thetau.linalg.leading import leading
from thetau.linalg.sketch import Bits
from thetau.linalg.svd import spectrum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHOWN = 16  # shares that are kept
WHOLE = 1024  # smaller sides up to this are decomposed whole
LEADING = 64  # directions that a sketch finds of larger ones


@final
@dataclass(frozen=True, kw_only=True)
class Directions:
    """The singular values of a matrix in short.

    - `full`: its smaller side. `stable_rank`: ‖M‖²/σ₁². Both ranks are 0 for zeros.
    - `effective_rank`: exp of the entropy of σ²/Σσ². Where not `exact`, what the sketch leaves out counts as spread evenly, so that it
      is an upper bound.
    - `shares`: σ²/Σσ² of the first ones, falling; at most `SHOWN`.
    """

    full: int
    stable_rank: float
    effective_rank: float
    exact: bool
    shares: tuple[float, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A matrix's directions, and the leading ones themselves: at most `SHOWN` orthonormal columns on either side; none of zeros."""

    directions: Directions
    outputs: Float[Tensor, "rows r"]
    inputs: Float[Tensor, "columns r"]


def decomposition(matrix: Float[Tensor, "rows columns"], bits: Bits) -> Decomposition:
    """The singular values of a float32 matrix, and its leading singular vectors; `bits` are those of the sketch, where one is needed."""
    rows, columns = matrix.shape
    if min(rows, columns) > WHOLE:
        found = leading(matrix, LEADING, bits)
        said = _described(found.values.square().tolist(), found.rest, min(rows, columns))
        return Decomposition(
            directions=said,
            outputs=(found.images / found.values.to(found.images))[:, :SHOWN],
            inputs=found.vectors[:, :SHOWN],
        )
    values, basis = spectrum(matrix)
    first, count = basis[:, :SHOWN].to(matrix), min(SHOWN, len(values))
    other = (matrix.T if rows <= columns else matrix) @ first / values[:count].to(matrix)
    left, right = (first, other) if rows <= columns else (other, first)
    return Decomposition(directions=_described(values.square().tolist(), 0.0, min(rows, columns)), outputs=left, inputs=right)


def directions(matrix: Float[Tensor, "rows columns"], bits: Bits) -> Directions:
    """The singular values of a float32 matrix; `bits` are those of the sketch, where one is needed.

    Examples:
        >>> import torch
        >>> from thetau.random import stream
        >>> directions(torch.diag(torch.tensor([2.0, 2.0, 0.0])), stream("m")).effective_rank
        2.0
    """
    full = min(matrix.shape)
    if full <= WHOLE:
        values = spectrum(matrix)[0].square()
        return _described(values.tolist(), 0.0, full)
    found = leading(matrix, LEADING, bits)
    return _described(found.values.square().tolist(), found.rest, full)


def _described(squares: Sequence[float], rest: float, full: int) -> Directions:
    whole = math.fsum(squares) + rest
    if not whole > 0:
        return Directions(full=full, stable_rank=0.0, effective_rank=0.0, exact=True, shares=())
    shares = [square / whole for square in squares]
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    if rest > 0 and full > len(shares):
        left = rest / whole
        entropy -= left * math.log(left / (full - len(shares)))
    return Directions(
        full=full,
        stable_rank=1 / shares[0],
        effective_rank=round(math.exp(entropy), 12),
        exact=full <= WHOLE,
        shares=tuple(shares[:SHOWN]),
    )


def fits(shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix that has directions worth counting."""
    return len(shape) == 2 and min(shape) > 1


def working(shape: Sequence[int]) -> int:
    """Bytes that `directions` takes beside the matrix itself."""
    small, large = min(shape), max(shape)
    if small <= WHOLE:
        return 8 * (small * large + 4 * small * small)
    return 4 * (LEADING + 8) * 6 * (small + large)
