"""Gram matrices: the product, and the span of vectors that are given by nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def gram_of(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "d_in d_in"]:
    """RᵀR, in the precision of R."""
    return rows.T @ rows


STRIP = 128  # columns of a strip: narrower ones waste the processor, wider ones compute more of what is there twice


def add_upper(total: Float[Tensor, "d_in d_in"], rows: Float[Tensor, "row d_in"]) -> None:
    """Add RᵀR to the upper triangle of a float64 sum, in strips, so that little more than half of it is computed; `mirrored` makes it whole."""
    width = rows.shape[1]
    for start in range(0, width, STRIP):
        stop = min(start + STRIP, width)
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def mirrored(total: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The symmetric matrix whose upper triangle this is; what is below counts for nothing."""
    whole = total.clone()
    for start in range(0, len(whole), STRIP):  # strip by strip, since a large matrix is slow to turn over at once
        stop = min(start + STRIP, len(whole))
        corner = whole[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        whole[stop:, start:stop] = whole[start:stop, stop:].T
    return whole


def span(gram: Float[Tensor, "*batch task task"]) -> tuple[Float[Tensor, "*batch task task"], Bool[Tensor, "*batch task"]]:
    """Coefficients onto those that count, and which dimensions of the span do.

    The first, P, takes coefficients c to the shortest ones (in units of the vectors' lengths) with the same Σ c_k τ_k up to rounding; it is the
    identity where the vectors are independent. The second has as many true entries as the vectors have independent directions.

    Lengths are taken out first, since each vector is known relative to its own. Vectors of float32 are known to ε in each entry, so that K of
    them which lie on one line still have eigenvalues of K ε² beside it; those up to (4ε)² K are rounding. (The float64 sums of a Gram
    matrix round by less.)
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(length > 0, 1 / length.clamp(min=torch.finfo(gram.dtype).tiny), 0)
    values, vectors = torch.linalg.eigh(gram * unit[..., :, None] * unit[..., None, :])
    seen = values > (MARGIN * eps(torch.float32)) ** 2 * gram.shape[-1]
    whole = seen.sum(-1) == (length > 0).sum(-1)
    onto = (vectors * seen[..., None, :]) @ vectors.mT
    onto = onto * unit[..., :, None] * length[..., None, :]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram)
    return torch.where(whole[..., None, None], eye, onto), seen


def effective_rank(gram: Float[Tensor, "side side"]) -> float:
    """exp of the entropy of a Gram matrix's eigenvalues: from 1 to the side's length."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return float(torch.special.entr(values / values.sum()).sum().exp())


def commutator(own: Float[Tensor, "side side"], other: Float[Tensor, "side side"], cross: Float[Tensor, "side side"]) -> float:
    """‖ABᵀ − BAᵀ‖ from AᵀA, BᵀB and AᵀB: its square is 2 tr(AᵀA BᵀB) − 2 tr((AᵀB)²).

    It is 0 where that is no more than the rounding of the two terms that cancel in it.
    """
    whole = 2 * float((own * other).sum())
    square = whole - 2 * float((cross * cross.T).sum())
    return square**0.5 if square > MARGIN * len(own) ** 0.5 * eps(own.dtype) * whole else 0.0
