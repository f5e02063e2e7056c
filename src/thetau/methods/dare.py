"""DARE: drop entries at random and rescale, then sum, or merge with TIES.

Yu et al., ICML 2024, <https://arxiv.org/abs/2311.03099>. `dare_ties` is drop, then the whole of TIES with its trim, as in the authors'
code; mergekit's and PEFT's `dare_ties` have no trim (`density=1`).

mergekit's DARE is `drop = 1 - density` with `rescale="l1"` (`rescale: false`: `none`); its `weight` is λ_t in `dare_linear` and `weights` in
`dare_ties`, where it also has `density=1`, `cancelled="positive"` and `normalise=False`.

Use it where many small changes can go without loss, to make room for other tasks; one pass over the inputs, three for `dare_ties` with a
trim, one more with `l1`. It needs a base, and its result hangs on the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import (
    Cancelled,
    Coefficient,
    Coefficients,
    Densities,
    DropRate,
    Expectation,
    Normalise,
    Ranked,
    Total,
    Weights,
)
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.methods.sparse import consensus, refuse_patterns, rescaled
from thetau.parts import Chain, Method, Transform, Varying
from thetau.transforms import Drop, Trim

PAPER = "Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099"


@register("dare_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p}$ with random masks $m_t$ that are zero with probability $p$."""

    drop: DropRate = 0.9
    rescale: Expectation = "probability"
    scale: Coefficients = 0.3
    total: Total = None

    def chain(self) -> Chain:
        """Drop, weighted sum."""
        return Chain(transforms=(dropped(self.drop, self.rescale),), reduction=Sum(scale=self.scale, total=self.total))


@register("dare_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareTies(Method):
    r"""TIES over $\frac{m_t \odot \tau_t}{1 - p}$.

    - `density`: share that the trim keeps of each vector, dropped entries counted; 1 trims nothing, as mergekit and PEFT do.
    """

    drop: DropRate = 0.9
    rescale: Expectation = "probability"
    density: Densities = 0.2
    trim: Ranked = "vector"
    weights: Weights = 1.0
    normalise: Normalise = True
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_patterns(self, self.trim, density=self.density)

    def chain(self) -> Chain:
        """Drop, trim, weigh, elect, disjoint mean, scale."""
        return consensus(
            (dropped(self.drop, self.rescale), Trim(density=self.density, scope=self.trim)),
            weights=self.weights,
            normalise=self.normalise,
            cancelled=self.cancelled,
            scale=self.scale,
        )


def dropped(rate: Varying, rescale: str) -> Transform:
    """Entries dropped at random, and what stays rescaled as the field of that name says."""
    return rescaled(Drop(rate=rate, rescale=rescale == "probability"), rescale)
