"""Matrices as products B·A of low rank: sums, norms and decompositions that never form the product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from thetau._lazy import torch
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Factors:
    """B·A, one product or as many as a layer has experts: A `[copy, rank, d_in]`, B `[copy, d_out, rank]`, float64."""

    a: Float[Tensor, "copy rank d_in"]
    b: Float[Tensor, "copy d_out rank"]

    @property
    def rank(self) -> int:
        """Rows of A; what the product has of rank at most."""
        return self.a.shape[1]

    @property
    def norm(self) -> float:
        """‖B·A‖, from r × r Gram matrices alone."""
        inner = ((self.b.mT @ self.b) * (self.a @ self.a.mT).mT).sum()
        return math.sqrt(max(0.0, float(inner)))

    def dense(self) -> Float[Tensor, "copy d_out d_in"]:
        """The product."""
        return self.b @ self.a

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U `[copy, d_out, k]`, s `[copy, k]`, Vᵀ `[copy, k, d_in]` of the product, by two QR decompositions and one of size r × r."""
        left, outer = torch.linalg.qr(self.b)
        right, inner = torch.linalg.qr(self.a.mT)
        u, s, vt = torch.linalg.svd(outer @ inner.mT, full_matrices=False)
        return left @ u, s, vt @ right.mT

    @classmethod
    def joined(cls, parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """Σ w·B·A exactly: A's below one another, B's beside one another, of which the weight and its sign go into B."""
        return cls(
            a=torch.cat([part.a for part in parts], 1),
            b=torch.cat([weight * part.b for part, weight in zip(parts, weights, strict=True)], 2),
        )

    @classmethod
    def of(cls, u: Tensor, s: Tensor, vt: Tensor) -> Factors:
        """U·diag(s)·Vᵀ, the square root of s on either side."""
        root = s.sqrt()
        return cls(a=root[:, :, None] * vt, b=u * root[:, None, :])

    def padded(self, rank: int) -> Factors:
        """The same product, with rows and columns of zeros up to a rank."""
        missing = rank - self.rank
        grow = torch.nn.functional.pad
        return Factors(a=grow(self.a, (0, 0, 0, missing)), b=grow(self.b, (0, missing)))


@final
@dataclass(frozen=True, kw_only=True)
class Cut:
    """To which rank a layer is cut: at most `rank`, or the least with ‖Δ − B·A‖ ≤ `error`·‖Δ‖; neither keeps all there is.

    With both, the rank wins where the error cannot be had.
    """

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RecipeError([f"`rank` must be at least 1. Got {self.rank}."], "cut")
        if self.error is not None and not 0 <= self.error < 1:
            raise RecipeError([f"`error` is a share of a layer's norm, in [0, 1). Got {self.error}."], "cut")

    def ranks(self, s: Float[Tensor, "copy k"], norm: float | None = None) -> int:
        """How many singular values are kept, at least one, given the norm of all where `s` are not all; rounding is never kept."""
        total = float(s.square().sum()) if norm is None else norm**2
        kept = s.square().sum(0).cumsum(0)
        some = int((s.max(0).values > s.max() * max(s.shape) * torch.finfo(s.dtype).eps).sum())
        found = some
        if self.error is not None:
            enough = (total - kept <= self.error**2 * total).nonzero()
            found = min(found, int(enough[0, 0]) + 1 if len(enough) else found)
        return max(1, min(found, self.rank or found))

    def apply(self, factors: Factors) -> tuple[Factors, float]:
        """The best product of the chosen rank, and ‖difference‖."""
        u, s, vt = factors.svd()
        rank = self.ranks(s)
        lost = float(s[:, rank:].square().sum()) ** 0.5
        return Factors.of(u[:, :, :rank], s[:, :rank], vt[:, :rank]), lost
