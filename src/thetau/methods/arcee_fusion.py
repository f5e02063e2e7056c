"""Arcee Fusion: take over from another model the entries that matter most, and leave the base elsewhere.

mergekit's `arcee_fusion`: an entry's importance is |θ₁ − θ₀| times the divergence KL(softmax θ₁ ‖ softmax θ₀) of what lies along its last
axis; entries of at least median + 1.5 · (third − first quartile), tensor by tensor, are taken over whole.

Departs from it twice. The quartiles are exact; there they come from a million entries drawn without a seed, where a tensor has more. And
a divergence below 0, which is rounding, counts as 0. Along a vector the divergence is one number for all entries and leaves their order
as it is, so that it is left out.

Use it to add the outstanding changes of one model to the base; it costs two passes over both. It takes one model besides the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.methods.fields import NotNegative
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Site
from thetau.statistics import DerivedQuantile
from thetau.statistics.quantile import Derived

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EPSILON = 1e-8  # added to probabilities
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Importance(Derived):
    """|θ₁ − θ₀| · KL(softmax θ₁ ‖ softmax θ₀), of a stack that holds the base first."""

    def values(self, stack: Float[Tensor, "2 *block"], site: Site) -> Float[Tensor, "*block"]:
        """A block's importances, in float32, as they are there: beside the cut one rounding decides."""
        base, other = stack.float()
        size: Tensor = (other - base).abs()
        if len(site.shape) < 2:
            return size
        p, q = (torch.softmax(model, -1) + EPSILON for model in (other, base))
        divergence: Tensor = (p * torch.log(p / q)).sum(-1, keepdim=True)
        return size * divergence.clamp(min=0)

    def ranks(self, count: int, positive: int) -> tuple[int, ...]:
        """Those of the quartiles: of n numbers in rising order the ⌊q (n − 1)⌋-th after the first."""
        return tuple(count - int(quartile * (count - 1)) for quartile in QUARTILES)


@register("arcee_fusion", paper="mergekit, https://github.com/arcee-ai/mergekit")
@dataclass(frozen=True, kw_only=True)
class ArceeFusion(Method, BlockReduction):
    r"""$\theta = \theta_0 + m \odot (\theta_1 - \theta_0)$ with $m$ marking the important entries."""

    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    reach: Annotated[NotNegative, "by how many quartile ranges above the median an importance must lie."] = 1.5

    def chain(self) -> Chain:
        """Models, the base first."""
        return Chain(reduction=self, models=True, with_base=True)

    def requires(self) -> DerivedQuantile:
        """The quartiles of each tensor's importances."""
        return DerivedQuantile(of=Importance())

    def prepare(self, result: Mapping[str, Float[Tensor, " 3"]], tasks: tuple[str, ...]) -> dict[str, float]:
        """The least importance that is taken over, by tensor."""
        return {name: float(median + self.reach * (third - first)) for name, (first, median, third) in result.items()}

    def reduce(self, stack: Float[Tensor, "2 *block"], state: Mapping[str, float], site: Site) -> Float[Tensor, "*block"]:
        """A block of the base with what is important."""
        base, other = stack
        taken = Importance().values(stack, site) >= state[site.name]
        fused: Tensor = base + (other - base) * taken
        return fused
