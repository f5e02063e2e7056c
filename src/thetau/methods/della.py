"""DELLA: drop at random, small entries more often than large ones, rescale, then merge with TIES's election, or sum.

Deep et al. 2024, <https://arxiv.org/abs/2406.11617>. Follows the paper: ranks inside each row, probabilities p ± ε/2, every kept entry
divided by its own 1 − p_i. mergekit's `epsilon` is half of this one (its probabilities are density ± ε), and it does not divide by them:
its DELLA is `drop = 1 - density`, `epsilon` twice its own, `rescale="l1"` (`rescale: false`: `none`), its `weight` λ_t in `della_linear` and
`weights` in `della`, `cancelled="positive"`, `total: 1` or `normalise` for `normalize: true`.

Use it as DARE, where large changes should stay likelier than small ones; it ranks the rows of every tensor, seven times the work of a
sum. It needs a base, and its result hangs on the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated

from thetau.fields import each_number
from thetau.methods.fields import (
    Cancelled,
    Coefficient,
    Coefficients,
    DropRate,
    Expectation,
    Normalise,
    Total,
    Varies,
    Weights,
    Within,
)
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.methods.sparse import consensus, rescaled
from thetau.parts import Chain, Method, PerPattern, PerTask, Transform, Varying
from thetau.transforms import RankDrop

PAPER = "Deep et al. 2024, https://arxiv.org/abs/2406.11617"
Spread = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    Within("[0, inf)"),
    "ε: from the smallest to the largest of a row the probability falls from p + ε/2 to p − ε/2; both in [0, 1). It varies as `drop` may.",
]
MeanRate = Annotated[
    DropRate, "p, the mean probability, by task and by pattern of names too; with 0 nothing is dropped, whatever ε."
]


def check_spread(owner: str, drop: Varying, epsilon: Varying) -> None:
    """The one rule that holds between two fields: every probability lies in [0, 1).

    Where both vary by patterns, and the patterns are not the same ones, it is asked of every pair of their numbers.

    Raises:
        ValueError: one does not.
    """
    for rate, spread in pairs(drop, epsilon):
        reach = 2 * min(rate, 1 - rate)
        if rate and (spread > reach or rate + spread / 2 >= 1):
            raise ValueError(
                f"`{owner}(epsilon=...)` must leave drop ± epsilon/2 inside [0, 1): at most {reach:.4g} with drop = {rate:g}. Got {spread!r}."
            )


def pairs(first: Varying, second: Varying) -> Iterator[tuple[float, float]]:
    """The numbers of two varying fields that can meet at a task and a tensor."""
    one, other = _by_task(first), _by_task(second)
    if one is not None and other is not None:
        for task in one.keys() & other.keys():  # names against places of a tuple: checked once the places have names
            yield from pairs(one[task], other[task])
    elif one is not None:
        for number in one.values():
            yield from pairs(number, second)
    elif other is not None:
        for number in other.values():
            yield from pairs(first, number)
    elif isinstance(first, PerPattern) and isinstance(second, PerPattern) and list(first.values) == list(second.values):
        yield from zip(first.values.values(), second.values.values(), strict=True)
    else:
        yield from product(each_number(first), each_number(second))


def _by_task(value: Varying) -> Mapping[object, Varying] | None:
    if isinstance(value, PerTask):
        return {task: number for task, number in value.values.items()}  # noqa: C416  a mapping of a wider type
    return dict(enumerate(value)) if isinstance(value, tuple) else None


def _rank_drop(method: Della | DellaLinear) -> Transform:
    part = RankDrop(rate=method.drop, epsilon=method.epsilon, rescale=method.rescale == "probability")
    return rescaled(part, method.rescale)


@register("della_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DellaLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p_t}$, masks zero with probabilities that fall with the rank in the row."""

    drop: MeanRate = 0.7
    epsilon: Spread = 0.2
    rescale: Expectation = "probability"
    scale: Coefficients = 0.3
    total: Total = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spread("DellaLinear", self.drop, self.epsilon)

    def chain(self) -> Chain:
        """Drop by rank, weighted sum."""
        return Chain(transforms=(_rank_drop(self),), reduction=Sum(scale=self.scale, total=self.total))


@register("della", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Della(Method):
    r"""TIES's election and disjoint mean over $\frac{m_t \odot \tau_t}{1 - p_t}$."""

    drop: MeanRate = 0.7
    epsilon: Spread = 0.2
    rescale: Expectation = "probability"
    weights: Weights = 1.0
    normalise: Normalise = True
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spread("Della", self.drop, self.epsilon)

    def chain(self) -> Chain:
        """Drop by rank, weigh, elect, disjoint mean, scale."""
        return consensus(
            (_rank_drop(self),), weights=self.weights, normalise=self.normalise, cancelled=self.cancelled, scale=self.scale
        )
