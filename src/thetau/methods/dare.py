"""DARE: drop entries at random and rescale, then sum, or merge with TIES.

Yu et al., ICML 2024, <https://arxiv.org/abs/2311.03099>. `dare_ties` is drop, then the whole of TIES with its trim, as in the authors'
code; mergekit's and PEFT's `dare_ties` have no trim (`density=1`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying
from thetau.transforms import Drop, Elect, Trim

PAPER = "Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099"


@register("dare_linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareLinear(Method):
    r"""$\tau = \sum_t \lambda_t \frac{m_t \odot \tau_t}{1 - p}$ with random masks $m_t$ that are zero with probability $p$.

    - `drop`: p, in [0, 1).
    - `scale`: λ; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    """

    drop: float = 0.9
    scale: Varying = 0.3

    def __post_init__(self) -> None:
        number("DareLinear", "drop", self.drop, "in [0, 1)", low=0, high=1, open_high=True)
        varying("DareLinear", "scale", self.scale)

    def chain(self) -> Chain:
        """Drop, weighted sum."""
        return Chain(transforms=(Drop(rate=self.drop),), reduction=Sum(scale=self.scale))


@register("dare_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DareTies(Method):
    r"""TIES over $\frac{m_t \odot \tau_t}{1 - p}$.

    - `drop`: p, in [0, 1).
    - `density`: share that the trim keeps of each vector, dropped entries counted, in (0, 1]; 1 trims nothing, as mergekit and PEFT do.
    - `trim`: what is ranked: the whole `vector`, or each `tensor`.
    - `cancelled`: entries whose kept deltas cancel exactly: `zero`, or the `majority` sign of all entries.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    drop: float = 0.9
    density: float = 0.2
    trim: Literal["vector", "tensor"] = "vector"
    cancelled: Literal["zero", "majority"] = "zero"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        number("DareTies", "drop", self.drop, "in [0, 1)", low=0, high=1, open_high=True)
        number("DareTies", "density", self.density, "in (0, 1]", low=0, high=1, open_low=True)
        choice("DareTies", "trim", self.trim, ("vector", "tensor"))
        choice("DareTies", "cancelled", self.cancelled, ("zero", "majority"))
        varying("DareTies", "scale", self.scale, tasks=False)

    def chain(self) -> Chain:
        """Drop, trim, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Drop(rate=self.drop), Trim(density=self.density, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
