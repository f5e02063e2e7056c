"""One method on the whole stack, written three ways: the best approximation of Σ τ_t by a matrix of rank r (Eckart and Young, 1936).

Which to choose: `Whole` is the shortest and holds all tasks of a tensor in memory; `Streamed` holds one; `Projected` is a transform, which
any reduction may follow (`Mean` here would give the mean's approximation, TIES an election among the projected vectors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.methods.fields import AtLeast
from thetau.methods.reductions import Sum
from thetau.parts import Access, Chain, Cost, Method, Selection, Site, StreamReduction, Transform, WholeReduction

Kept = Annotated[int, AtLeast(1), "singular vectors that are kept."]
MATRICES = Selection(tensors="matrices")


def directions(total: Float[Tensor, "d_out d_in"], rank: int) -> Float[Tensor, "d_out r"]:
    """The leading left singular vectors."""
    return torch.linalg.svd(total, full_matrices=False).U[:, :rank]


def cost_of(shape: tuple[int, ...]) -> Cost:
    """One decomposition, and its factors."""
    d_out, d_in = shape
    return Cost(flops=6.0 * d_out * d_in * min(shape) + 20.0 * min(shape) ** 3, memory=4 * (3 * d_out * d_in + min(shape) ** 2))


@dataclass(frozen=True, kw_only=True)
class Whole(Method, WholeReduction):
    """All tasks of a tensor at once."""

    rank: Kept = 4

    def chain(self) -> Chain:
        """The reduction alone."""
        return Chain(reduction=self, selection=MATRICES)

    def reduce(self, stack: Float[Tensor, "task d_out d_in"], state: object, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The sum, cut."""
        u = directions(stack.sum(0), self.rank)
        return u @ (u.T @ stack.sum(0))

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One decomposition."""
        return cost_of(shape)


@dataclass(frozen=True, kw_only=True)
class Streamed(Method, StreamReduction):
    """Task by task; memory does not grow with their number."""

    rank: Kept = 4

    def chain(self) -> Chain:
        """The reduction alone."""
        return Chain(reduction=self, selection=MATRICES)

    def init(self, d_out: int, d_in: int, tasks: int) -> Tensor:
        """No task yet."""
        return torch.zeros(d_out, d_in)

    def add(self, total: Tensor, vector: Float[Tensor, "d_out d_in"], site: Site) -> Tensor:
        """One task more."""
        return total + vector

    def result(self, total: Tensor, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The sum, cut."""
        u = directions(total, self.rank)
        return u @ (u.T @ total)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One decomposition."""
        return cost_of(shape)


@dataclass(frozen=True, kw_only=True)
class Projection(Transform):
    """Every task vector, on the leading directions of their sum."""

    access: ClassVar[Access] = "whole"
    per_task: ClassVar[bool] = False
    rank: int

    def apply(self, stack: Float[Tensor, "task d_out d_in"], state: object, site: Site) -> Float[Tensor, "task d_out d_in"]:
        """U Uᵀ τ_t."""
        u = directions(stack.sum(0), self.rank)
        return u @ (u.T @ stack)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One decomposition, and two products a task."""
        return cost_of(shape)


@dataclass(frozen=True, kw_only=True)
class Projected(Method):
    """A chain: project, then sum."""

    rank: Kept = 4

    def chain(self) -> Chain:
        """Transform, reduction."""
        return Chain(transforms=(Projection(rank=self.rank),), reduction=Sum(), selection=MATRICES)
