r"""How a merged matrix differs from the base's in its spectrum and its directions, tensor by tensor.

The measures of LARV, Wang et al. 2026, <https://arxiv.org/abs/2602.09413>: with the effective rank r(A) = exp(−Σ p log p), p = σ²/Σσ², the
contrast r(θ₀)/r(Δ); and the conflict ½(‖θ₀Δᵀ − Δθ₀ᵀ‖ + ‖θ₀ᵀΔ − Δᵀθ₀‖)/(‖θ₀‖‖Δ‖). Both follow from θ₀θ₀ᵀ, ΔΔᵀ and θ₀Δᵀ over the smaller side alone:
the squared commutator of the larger side is 2 tr(θ₀θ₀ᵀ ΔΔᵀ) − 2 tr((θ₀Δᵀ)²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.gram import commutator, effective_rank, gram_of
from thetau.parts import Selection, Site, Statistic

PIECE = 1 << 20  # entries of a wide matrix that are widened to float64 at once


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What is known of one matrix of a block."""

    block: tuple[str, int]
    contrast: float
    conflict: float


@dataclass(kw_only=True)
class Products:
    """Sums over rows of a tall matrix `[side, side]`, float64; the rows themselves of a wide one."""

    block: tuple[str, int]
    tall: bool
    sums: list[Tensor]
    rows: list[tuple[Tensor, Tensor]]


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

    def add(self, total: Products | None, stack: Float[Tensor, "row *block"], site: Site, seen: None) -> Products | None:
        """Take in a block of rows; the merged tensor stands first in the stack."""
        block = block_of(site)
        if block is None or not Selection(tensors="linear").takes(site.name, site.shape, site.kind):
            return None
        assert site.base is not None
        base = site.base.double()
        delta = stack[0].double() - base if self.models else stack[0].double()
        tall = site.shape[0] >= site.shape[1]
        total = Products(block=block, tall=tall, sums=[], rows=[]) if total is None else total
        if tall:
            found = [gram_of(base), gram_of(delta), base.T @ delta]
            total.sums = [a + b for a, b in zip(total.sums, found, strict=True)] if total.sums else found
        else:
            total.rows.append((site.base.clone(), stack[0] - site.base if self.models else stack[0].clone()))
        return total

    def fold(self, total: Products | None, other: Products | None) -> Products | None:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: Products | None, seen: None) -> Difference | None:
        """The two measures."""
        if total is None:
            return None
        own, other, cross = total.sums if total.tall else wide_products(total.rows)
        weight = float((own.trace() * other.trace()).sqrt())
        if weight == 0:
            return None
        conflict = (commutator(own, other, cross) + float((cross - cross.T).norm())) / (2 * weight)
        return Difference(block=total.block, contrast=effective_rank(own) / effective_rank(other), conflict=conflict)

    def memory(self, tasks: int, elements: int) -> int:
        """Two matrices as they are and joined, three products of the smaller side, and as much again for the spectrum."""
        return 4 * 4 * elements + 8 * 6 * elements


def block_of(site: Site) -> tuple[str, int] | None:
    """The tower that a tensor belongs to, by what stands before the number of its block, and that number; None outside the blocks."""
    if site.layer is None:
        return None
    before, found, _ = site.name.partition(f".{site.layer}.")
    return (before if found else ""), site.layer


def wide_products(rows: list[tuple[Tensor, Tensor]]) -> list[Float[Tensor, "side side"]]:
    """The three products of a wide matrix from its rows, a run of columns at a time."""
    base, delta = (torch.cat(side) for side in zip(*rows, strict=True))
    sums = [torch.zeros(len(base), len(base), dtype=torch.float64) for _ in range(3)]
    step = max(1, PIECE // len(base))
    for a, b in zip(torch.split(base, step, 1), torch.split(delta, step, 1), strict=True):
        a, b = a.double(), b.double()
        for total, product in zip(sums, (a @ a.T, b @ b.T, a @ b.T), strict=True):
            total += product
    return sums
