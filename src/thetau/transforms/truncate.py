"""Truncate: keep the largest singular values of each task's matrices."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from thetau._lazy import torch
from thetau.linalg.svd import sketched, truncated_svd
from thetau.parts import Cost, Site, Transform
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Truncate(Transform):
    """Keeps ⌊share · min(rows, columns)⌋ singular values of every tensor of two or more axes, at least one; others stay whole.

    More than two axes count as rows × the rest.
    """

    share: float
    access: ClassVar = "whole"

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """A decomposition for each task; the memory of one."""
        if len(shape) < 2 or not prod(shape):
            return Cost()
        rows, columns = shape[0], prod(shape[1:])
        small, rank = min(rows, columns), self.rank(shape)
        flops = 20.0 * rank * rows * columns if sketched(rows, columns, rank) else 6.0 * rows * columns * small + 20.0 * small**3
        return Cost(flops=tasks * flops, memory=4 * (4 * rows * columns + 4 * small**2))

    def apply(self, stack: Float[Tensor, "task *shape"], state: object, site: Site) -> Float[Tensor, "task *shape"]:
        """Every task's tensor at its rank."""
        if len(site.shape) < 2 or not prod(site.shape):
            return stack
        return torch.stack([self.truncated(row, task, site) for row, task in zip(stack, site.tasks, strict=True)])

    def truncated(self, tensor: Float[Tensor, "rows *rest"], task: str, site: Site) -> Float[Tensor, "rows *rest"]:
        """One tensor at its rank; all-zero ones, whose singular vectors are arbitrary, as they are."""
        if not bool(tensor.any()):
            return tensor
        u, s, v = truncated_svd(tensor.reshape(len(tensor), -1), self.rank(site.shape), stream("truncate", task, site.name))
        return ((u * s) @ v.T).reshape(tensor.shape)

    def rank(self, shape: tuple[int, ...]) -> int:
        """How many singular values are kept."""
        return max(1, int(self.share * min(shape[0], prod(shape[1:]))))
