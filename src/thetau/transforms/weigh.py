"""Weigh: each task's entries by a number of its own, before tasks are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.parts import Op, Site, Transform, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Weigh(Transform):
    """Multiplies task t's entries by w_t; the weights vary by task and by pattern."""

    weights: Varying = 1.0

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        weights = site.per_task(self.weights)
        return [] if set(weights) == {1.0} else [Op("weigh", by_task=tuple(weights))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """A block, weighted."""
        weights = site.per_task(self.weights)
        if set(weights) == {1.0}:
            return stack
        return torch.stack([row * weight for row, weight in zip(stack, weights, strict=True)])
