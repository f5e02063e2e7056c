"""DARE: drop entries at random and rescale, then sum, or merge with TIES.

Yu et al., ICML 2024, <https://arxiv.org/abs/2311.03099>. `dare_ties` is drop, then the whole of TIES with its trim, as in the authors'
code; mergekit's and PEFT's `dare_ties` have no trim (`density=1`).
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Cancelled, Coefficient, Coefficients, Density, DropRate, Ranked
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import Drop, Elect, Trim

PAPER = "Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099"


@register("dare_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p}$ with random masks $m_t$ that are zero with probability $p$."""

    drop: DropRate = 0.9
    scale: Coefficients = 0.3

    def chain(self) -> Chain:
        """Drop, weighted sum."""
        return Chain(transforms=(Drop(rate=self.drop),), reduction=Sum(scale=self.scale))


@register("dare_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareTies(Method):
    r"""TIES over $\frac{m_t \odot \tau_t}{1 - p}$.

    - `density`: share that the trim keeps of each vector, dropped entries counted; 1 trims nothing, as mergekit and PEFT do.
    """

    drop: DropRate = 0.9
    density: Density = 0.2
    trim: Ranked = "vector"
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Drop, trim, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Drop(rate=self.drop), Trim(density=self.density, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
