"""The median of the task vectors, entry by entry: one task that went astray moves it little.

Coordinate-wise median, Yin et al., ICML 2018, <https://arxiv.org/abs/1803.01498>, there of gradients. With an even number of tasks it is
the mean of the two in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from thetau.methods import register
from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Scale
from thetau.parts import BlockReduction, Chain, Method, Site


@register("median", paper="Yin et al., ICML 2018, https://arxiv.org/abs/1803.01498")
@dataclass(frozen=True, kw_only=True)
class Median(Method, BlockReduction):
    r"""$\tau = \lambda\,\mathrm{median}_t\,\tau_t$, entrywise."""

    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """The median, then λ."""
        return Chain(reduction=self, post=(Scale(scale=self.scale),))

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The median of a block."""
        ranked = stack.sort(0).values
        return (ranked[(len(stack) - 1) // 2] + ranked[len(stack) // 2]) / 2
