r"""How a merged matrix differs from the base's in its spectrum and its directions, tensor by tensor.

The measures of LARV, Wang et al. 2026, <https://arxiv.org/abs/2602.09413>: with the effective rank r(A) = exp(−Σ p log p), p = σ²/Σσ², the
contrast r(θ₀)/r(Δ); and the conflict ½(‖θ₀Δᵀ − Δθ₀ᵀ‖ + ‖θ₀ᵀΔ − Δᵀθ₀‖)/(‖θ₀‖‖Δ‖). Both follow from θ₀θ₀ᵀ, ΔΔᵀ and θ₀Δᵀ over the smaller side alone:
the squared commutator of the larger side is 2 tr(θ₀θ₀ᵀ ΔΔᵀ) − 2 tr((θ₀Δᵀ)²).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.gram import commutator, effective_rank
from thetau.parts import Selection, Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PIECE = 1 << 22  # entries of a matrix that are widened to float64 at once


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What is known of one matrix of a block."""

    block: tuple[str, int]
    contrast: float
    conflict: float


@dataclass(kw_only=True)
class Pair:
    """The base's matrix and the merged vector's, `[2, *shape]` as the file stores them, filled row by row."""

    block: tuple[str, int]
    matrices: Tensor


@dataclass(frozen=True, kw_only=True)
class Contrast(Statistic):
    """A `Difference` for every weight matrix of a block, of the merged tensor against the base; None elsewhere, and where either is zero.

    - `models`: the merged tensor is a model, not a task vector.
    """

    models: bool = False

    @property
    def per_tensor(self) -> bool:
        """Each tensor has its own."""
        return True

    def add(self, total: Pair | None, stack: Float[Tensor, "row *block"], site: Site, seen: None) -> Pair | None:
        """Take in a block of rows; the merged tensor stands first in the stack."""
        block = block_of(site)
        if block is None or not Selection(tensors="linear").takes(site.name, site.shape, site.kind):
            return None
        assert site.base is not None
        total = Pair(block=block, matrices=torch.empty(2, *site.shape, dtype=stack.dtype)) if total is None else total
        rows = total.matrices[:, site.start : site.start + stack.shape[1]]
        rows[0] = site.base
        rows[1] = stack[0] - site.base if self.models else stack[0]
        return total

    def fold(self, total: Pair | None, other: Pair | None) -> Pair | None:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: Pair | None, seen: None) -> Difference | None:
        """The two measures."""
        if total is None:
            return None
        own, other, cross = products(*total.matrices)
        weight = float((own.trace() * other.trace()).sqrt())
        if weight == 0:
            return None
        conflict = (commutator(own, other, cross) + float((cross - cross.T).norm())) / (2 * weight)
        return Difference(block=total.block, contrast=effective_rank(own) / effective_rank(other), conflict=conflict)

    def memory(self, tasks: int, elements: int) -> int:
        """Both matrices; in float64 three products of the smaller side, and two such for a spectrum."""
        return 2 * 4 * elements + 5 * 8 * elements


def block_of(site: Site) -> tuple[str, int] | None:
    """The tower that a tensor belongs to, by what stands before the number of its block, and that number; None outside the blocks."""
    if site.layer is None:
        return None
    before, found, _ = site.name.partition(f".{site.layer}.")
    return (before if found else ""), site.layer


def products(base: Float[Tensor, "rows columns"], delta: Float[Tensor, "rows columns"]) -> list[Float[Tensor, "side side"]]:
    """θ₀θ₀ᵀ, ΔΔᵀ and θ₀Δᵀ over the smaller side, in float64, a run of the larger one at a time."""
    if len(base) > base.shape[1]:
        base, delta = base.T, delta.T
    sums = [torch.zeros(len(base), len(base), dtype=torch.float64) for _ in range(3)]
    step = max(1, PIECE // len(base))
    for a, b in zip(torch.split(base, step, 1), torch.split(delta, step, 1), strict=True):
        left, right = a.double(), b.double()
        for total, (one, two) in zip(sums, ((left, left), (right, right), (left, right)), strict=True):
            total.addmm_(one, two.T)
    return sums
