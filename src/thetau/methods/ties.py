"""TIES-Merging: trim, elect a sign, average what agrees.

Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>. As in the authors' code, the trim ranks each *whole* task vector
(mergekit and PEFT: each tensor, `trim="tensor"`). Departs from that code once: entries whose kept deltas cancel exactly give 0, so that
negating every task negates the merge; `cancelled="majority"` is the code's way.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Cancelled, Coefficient, Density, Ranked
from thetau.methods.reductions import DisjointMean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import Elect, Trim


@register("ties", paper="Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708")
@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    r"""$\tau = \lambda\,\mathrm{mean}\{\hat\tau_t : \mathrm{sgn}\,\hat\tau_t = \mathrm{sgn}\sum_s \hat\tau_s\}$ entrywise, $\hat\tau_t$ task $t$ trimmed."""

    density: Density = 0.2
    trim: Ranked = "vector"
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Trim, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Trim(density=self.density, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
