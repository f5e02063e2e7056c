"""The elementwise ends of chains: weighted sum, mean, disjoint mean; and the scale after a reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from thetau.parts import BlockReduction, Op, PostStage, Site, Varying
from thetau.sums import sum_in_order, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Sum(BlockReduction):
    """Σ scale_t · τ_t; the scale varies by task or by pattern."""

    scale: Varying = 1.0

    def weights(self, site: Site) -> list[float]:
        """The tasks' scales, in whatever is summed or averaged elsewhere too."""
        return site.per_task(self.scale)

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The weighted sum of a block."""
        return weighted_sum(stack, site.per_task(self.scale))

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("sum", by_task=tuple(site.per_task(self.scale)))]


@dataclass(frozen=True, kw_only=True)
class Mean(BlockReduction):
    """Σ τ_t / K."""

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The mean of a block."""
        return sum_in_order(stack) / len(stack)

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("mean")]


@dataclass(frozen=True, kw_only=True)
class DisjointMean(BlockReduction):
    """The mean over the tasks whose entry is not zero; 0 where all are."""

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The disjoint mean of a block."""
        return sum_in_order(stack) / sum_in_order((stack != 0).to(stack.dtype)).clamp(min=1)

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("disjoint_mean")]


@dataclass(frozen=True, kw_only=True)
class Scale(PostStage):
    """λ · merged, everywhere: θ₀ + λ τ_m, whatever τ_m is outside the selection. The scale varies by pattern."""

    everywhere: ClassVar[bool] = True
    scale: Varying = 1.0

    def adjust(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"] | None, state: object, site: Site
    ) -> Float[Tensor, "*block"]:
        """A block, scaled."""
        scale = site.value(self.scale)
        return merged if scale == 1 else merged * scale

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        scale = site.value(self.scale)
        return [] if scale == 1 else [Op("scale", value=scale)]
