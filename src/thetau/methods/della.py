"""DELLA: drop at random, small entries more often than large ones, rescale, then merge with TIES's election, or sum.

Deep et al. 2024, <https://arxiv.org/abs/2406.11617>. Follows the paper: ranks inside each row, probabilities p ± ε/2, every kept entry
divided by its own 1 − p_i. mergekit's `epsilon` is half of this one (its probabilities are density ± ε), and it does not divide by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying
from thetau.transforms import Elect, RankDrop

PAPER = "Deep et al. 2024, https://arxiv.org/abs/2406.11617"


def _check(owner: str, drop: float, epsilon: float) -> None:
    number(owner, "drop", drop, "in [0, 1)", low=0, high=1, open_high=True)
    reach = 2 * min(drop, 1 - drop)
    number(
        owner, "epsilon", epsilon, f"at least 0, with drop ± epsilon/2 inside [0, 1): at most {reach:.4g} here", low=0, high=reach
    )
    if drop + epsilon / 2 >= 1:
        raise ValueError(f"`{owner}(epsilon=...)` must leave drop + epsilon/2 below 1. Got {drop} and {epsilon}.")


@register("della_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DellaLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p_t}$, masks zero with probabilities that fall with the rank in the row.

    - `drop`: p, the mean probability, in [0, 1).
    - `epsilon`: ε: from the smallest to the largest of a row the probability falls from p + ε/2 to p − ε/2.
    - `scale`: λ; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    """

    drop: float = 0.7
    epsilon: float = 0.2
    scale: Varying = 0.3

    def __post_init__(self) -> None:
        _check("DellaLinear", self.drop, self.epsilon)
        varying("DellaLinear", "scale", self.scale)

    def chain(self) -> Chain:
        """Drop by rank, weighted sum."""
        return Chain(transforms=(RankDrop(rate=self.drop, epsilon=self.epsilon),), reduction=Sum(scale=self.scale))


@register("della", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Della(Method):
    r"""TIES's election and disjoint mean over $\frac{m_t \odot \tau_t}{1 - p_t}$.

    - `drop`: p, the mean probability, in [0, 1).
    - `epsilon`: ε: from the smallest to the largest of a row the probability falls from p + ε/2 to p − ε/2.
    - `cancelled`: entries whose kept deltas cancel exactly: `zero`, or the `majority` sign of all entries.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    drop: float = 0.7
    epsilon: float = 0.2
    cancelled: Literal["zero", "majority"] = "zero"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        _check("Della", self.drop, self.epsilon)
        choice("Della", "cancelled", self.cancelled, ("zero", "majority"))
        varying("Della", "scale", self.scale, tasks=False)

    def chain(self) -> Chain:
        """Drop by rank, elect, disjoint mean, scale."""
        return Chain(
            transforms=(RankDrop(rate=self.drop, epsilon=self.epsilon), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
