"""DELLA: drop at random, small entries more often than large ones, rescale, then merge with TIES's election, or sum.

Deep et al. 2024, <https://arxiv.org/abs/2406.11617>. Follows the paper: ranks inside each row, probabilities p ± ε/2, every kept entry
divided by its own 1 − p_i. mergekit's `epsilon` is half of this one (its probabilities are density ± ε), and it does not divide by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from thetau.methods.fields import Cancelled, Coefficient, Coefficients, DropRate, NotNegative
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import Elect, RankDrop

PAPER = "Deep et al. 2024, https://arxiv.org/abs/2406.11617"
Spread = Annotated[
    NotNegative, "ε: from the smallest to the largest of a row the probability falls from p + ε/2 to p − ε/2; both in [0, 1)."
]
MeanRate = Annotated[DropRate, "p, the mean probability."]


def check_spread(owner: str, drop: float, epsilon: float) -> None:
    """The one rule that holds between two fields: every probability lies in [0, 1).

    Raises:
        ValueError: one does not.
    """
    reach = 2 * min(drop, 1 - drop)
    if epsilon > reach or drop + epsilon / 2 >= 1:
        raise ValueError(
            f"`{owner}(epsilon=...)` must leave drop ± epsilon/2 inside [0, 1): at most {reach:.4g} with drop = {drop:g}. Got {epsilon!r}."
        )


@register("della_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DellaLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p_t}$, masks zero with probabilities that fall with the rank in the row."""

    drop: MeanRate = 0.7
    epsilon: Spread = 0.2
    scale: Coefficients = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spread("DellaLinear", self.drop, self.epsilon)

    def chain(self) -> Chain:
        """Drop by rank, weighted sum."""
        return Chain(transforms=(RankDrop(rate=self.drop, epsilon=self.epsilon),), reduction=Sum(scale=self.scale))


@register("della", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Della(Method):
    r"""TIES's election and disjoint mean over $\frac{m_t \odot \tau_t}{1 - p_t}$."""

    drop: MeanRate = 0.7
    epsilon: Spread = 0.2
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spread("Della", self.drop, self.epsilon)

    def chain(self) -> Chain:
        """Drop by rank, elect, disjoint mean, scale."""
        return Chain(
            transforms=(RankDrop(rate=self.drop, epsilon=self.epsilon), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
