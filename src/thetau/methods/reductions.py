"""The elementwise ends of chains: weighted sum, mean, disjoint mean; and the scale after a reduction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, ClassVar

from thetau.errors import RecipeError
from thetau.parts import BlockReduction, Op, PerTask, PostStage, Site, Varying
from thetau.statistics import Gram
from thetau.sums import sum_in_order, weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NOTHING = 1e-8  # weights whose sum is smaller are not divided by it


@dataclass(frozen=True, kw_only=True)
class Sum(BlockReduction):
    """Σ scale_t · τ_t; the scale varies by task or by pattern.

    With `total` the scales are first multiplied until they add up to it at each tensor; where they add up to less than 1e-8 they are
    multiplied by `total` itself, as in mergekit, or refused without `zero_sums`.
    """

    scale: Varying = 1.0
    total: Varying | None = None
    zero_sums: bool = True

    def check(self, site: Site) -> None:
        """Scales that add up to 0 cannot be made to add up to anything else."""
        if self.total is not None and not self.zero_sums and abs(fsum(site.per_task(self.scale))) < NOTHING:
            raise RecipeError(
                [
                    f"the weights add up to 0 at {site.name!r}, so they cannot be normalised. Change one, or do not normalise. "
                    f"Got {', '.join(f'{weight:g}' for weight in site.per_task(self.scale))}."
                ],
                "weights",
            )

    def weights(self, site: Site) -> list[float]:
        """The tasks' scales, in whatever is summed or averaged elsewhere too."""
        scales = site.per_task(self.scale)
        if self.total is None:
            return scales
        whole = fsum(scales)
        factor = site.value(self.total) / (whole if abs(whole) >= NOTHING else 1.0)
        return [scale * factor for scale in scales]

    def combination(self, tasks: Sequence[str]) -> dict[str, float] | None:
        """The scales, where they are the same at every tensor."""
        by_task = self.scale.values if isinstance(self.scale, PerTask) else dict.fromkeys(tasks, self.scale)
        plain = {task: float(one) for task in tasks if isinstance(one := by_task.get(task), int | float)}
        return plain if self.total is None and len(plain) == len(tasks) else None

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The weighted sum of a block."""
        return weighted_sum(stack, self.weights(site))

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("sum", by_task=tuple(self.weights(site)))]


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
    """The mean over the tasks whose entry is not zero; 0 where all are.

    Of a stack that was multiplied by `counting`, the weights of a `Weigh`, it is the weighted mean, Σ w τ / Σ w over those tasks; a divisor of exactly 0
    counts as 1. Without `normalise` it is the sum.
    """

    counting: Varying = 1.0
    normalise: bool = True

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The disjoint mean of a block."""
        total = sum_in_order(stack)
        if not self.normalise:
            return total
        there = (stack != 0).to(stack.dtype)
        weights = site.per_task(self.counting)
        if set(weights) == {1.0}:
            return total / sum_in_order(there).clamp(min=1)
        return total / nonzero(weighted_sum(there, weights))

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        weights = site.per_task(self.counting)
        if not self.normalise:
            return [Op("sum", by_task=(1.0,) * len(weights))]
        return [Op("disjoint_mean", by_task=() if set(weights) == {1.0} else tuple(weights))]


def nonzero(divisor: Float[Tensor, "*block"]) -> Float[Tensor, "*block"]:
    """The same tensor with 1 where it was exactly 0."""
    return divisor.masked_fill_(divisor == 0, 1)


class InSpan(BlockReduction):
    """Σ c_t x_t with coefficients that follow from the inner products of the whole x_t, tensor by tensor.

    Geodesics, means on the sphere and their kin all end in the span of their inputs: the Gram matrix, in float64, is all that they need,
    every iteration runs over K numbers, and the tensors are read twice, in blocks.
    """

    @abstractmethod
    def coefficients(self, gram: Float[Tensor, "task task"], name: str, tasks: tuple[str, ...]) -> list[float]:
        """One number a task, at the tensor of that name."""

    def requires(self) -> Gram:
        """Inner products, tensor by tensor."""
        return Gram(per_tensor=True)

    def prepare(self, result: Mapping[str, Tensor], tasks: tuple[str, ...]) -> dict[str, list[float]]:
        """The coefficients by tensor."""
        return {name: self.coefficients(gram, name, tasks) for name, gram in result.items()}

    def reduce(
        self, stack: Float[Tensor, "task *block"], state: Mapping[str, list[float]], site: Site
    ) -> Float[Tensor, "*block"]:
        """The weighted sum of a block."""
        return weighted_sum(stack, state[site.name])

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: Mapping[str, list[float]], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("sum", by_task=tuple(state[site.name]))]


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
