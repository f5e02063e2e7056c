"""SCE: select the entries in which tasks differ most, calculate weights from what is left, erase what disagrees.

FuseChat, Wan et al. 2024, <https://arxiv.org/abs/2408.07990>; mergekit's `sce`. In each tensor the ⌊share · n⌋ entries of largest variance
over the tasks stay, n counting those whose variance is not 0; a task's weight is the share of its squares in all of them; entries whose
sign is that of the sum over the tasks (+ where it is 0) are averaged by these weights. mergekit weighs all tasks the same where the
mean squares add up to less than 1e-6 (`even_below=1e-6`), which they always do at the scale of CLIP's fine-tuning; here by default only
where all are 0. Entries that equal the cut are all kept.

Use it where tasks changed a tensor by different amounts and the larger change should lead; two passes over the inputs, four with a
selection. It needs a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.methods.fields import Coefficient, NotNegative, Within
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Op, Site, Transform
from thetau.statistics import DerivedQuantile, SquaredNorms
from thetau.statistics.quantile import Derived
from thetau.sums import sum_in_order, weighted_sum
from thetau.transforms import Elect

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LEAST = 1e-6  # weights of what agrees that add up to less are divided by it


@dataclass(frozen=True, kw_only=True)
class Variance(Derived):
    """The variance of an entry over the tasks, and the cut above which `share` of those that are not 0 lie."""

    share: float

    def values(self, stack: Float[Tensor, "task *block"], site: Site) -> Float[Tensor, "*block"]:
        """A block's variances, in float32; exactly 0 where all tasks have one value."""
        wide = stack.double()
        mean = sum_in_order(wide) / len(wide)
        return (sum_in_order((wide - mean).square()) / len(wide)).float()

    def ranks(self, count: int, positive: int) -> tuple[int, ...]:
        """That of the last one which stays, the product as float32 has it; 0 where none does."""
        return (int(torch.tensor(positive) * self.share),)


@dataclass(frozen=True, kw_only=True)
class Select(Transform):
    """Keeps, in each tensor and for all tasks, the entries of largest variance over the tasks."""

    share: float
    per_task: ClassVar[bool] = False

    def requires(self) -> DerivedQuantile:
        """The cuts."""
        return DerivedQuantile(of=Variance(share=self.share))

    def prepare(self, result: Mapping[str, Float[Tensor, " 1"]], tasks: tuple[str, ...]) -> dict[str, float]:
        """The least variance that stays, by tensor."""
        return {name: float(cut) for name, cut in result.items()}

    def apply(self, stack: Float[Tensor, "task *block"], state: Mapping[str, float], site: Site) -> Float[Tensor, "task *block"]:
        """A block without the rest."""
        return stack.masked_fill(Variance(share=self.share).values(stack, site) < state[site.name], 0)


@dataclass(frozen=True, kw_only=True)
class ElectedMean(BlockReduction):
    """Σ w τ / Σ w over the tasks with the elected sign, w being a task's share of all squares in the tensor."""

    even_below: float

    def requires(self) -> SquaredNorms:
        """Squares by tensor."""
        return SquaredNorms(per_tensor=True)

    def prepare(self, result: Mapping[str, Tensor], tasks: tuple[str, ...]) -> Mapping[str, Tensor]:
        """The squares themselves."""
        return result

    def reduce(self, stack: Float[Tensor, "task *block"], state: Mapping[str, Tensor], site: Site) -> Float[Tensor, "*block"]:
        """The mean of a block."""
        weights = self._weights(state, site)
        kept = torch.stack([row * weight for row, weight in zip(ELECT.apply(stack, 1.0, site), weights, strict=True)])
        return sum_in_order(kept) / weighted_sum((kept != 0).to(stack.dtype), weights).clamp(min=LEAST)

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: Mapping[str, Tensor], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        weights = tuple(self._weights(state, site))
        return [
            *ELECT.program(1.0, site, element),
            Op("weigh", by_task=weights),
            Op("disjoint_mean", value=LEAST, by_task=weights),
        ]

    def _weights(self, state: Mapping[str, Tensor], site: Site) -> list[float]:
        means = state[site.name] / max(1, prod(site.shape))
        total = float(means.sum())
        if total == 0 or total < self.even_below:
            return [1 / len(means)] * len(means)
        shares: list[float] = (means / total).tolist()
        return shares


ELECT = Elect(cancelled="positive")


@register("sce", paper="Wan et al. 2024, https://arxiv.org/abs/2408.07990")
@dataclass(frozen=True, kw_only=True)
class Sce(Method):
    r"""$\tau = \lambda \frac{\sum_t w_t e_t \tau_t}{\sum_t w_t e_t}$ entrywise, $e_t$ marking the elected sign.

    $w_t = \|\tau_t\|^2 / \sum_s \|\tau_s\|^2$ in each tensor.
    """

    select_topk: Annotated[float, Within("(0, 1]"), "share of the entries that differ between tasks which is kept."] = 1.0
    even_below: Annotated[NotNegative, "mean squares that add up to less count as equal (mergekit: 1e-6)."] = 0.0
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Select, elect and average, scale."""
        select = (Select(share=self.select_topk),) if self.select_topk < 1 else ()
        return Chain(transforms=select, reduction=ElectedMean(even_below=self.even_below), post=(Scale(scale=self.scale),))
