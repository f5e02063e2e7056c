"""Model Breadcrumbs: leave out each task vector's outliers and its smallest entries, then sum, or merge with TIES.

Davari and Belilovsky, ECCV 2024, <https://arxiv.org/abs/2312.06795>. As there, and in mergekit, each *tensor* is ranked
(`trim="vector"` ranks the whole task vector). mergekit's `breadcrumbs_ties` is the same band followed by TIES's sign election; its mask
of a tensor with fewer than 1/γ entries has no outliers, and neither has ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying
from thetau.transforms import Elect, Trim

PAPER = "Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795"


def _check(owner: str, density: float, gamma: float, trim: str) -> None:
    number(owner, "density", density, "in (0, 1]", low=0, high=1, open_low=True)
    number(owner, "gamma", gamma, "in [0, 1)", low=0, high=1, open_high=True)
    choice(owner, "trim", trim, ("vector", "tensor"))


@register("breadcrumbs", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    r"""$\tau = \sum_t \lambda_t\, m_t \odot \tau_t$, $m_t$ leaving out the largest and the smallest entries of each tensor of task $t$.

    - `density`: share of the entries that is kept, in (0, 1]; 1 keeps everything, outliers too.
    - `gamma`: share of the largest entries that goes first, in [0, 1); fewer where `density` would not be reached.
    - `trim`: what is ranked: each `tensor`, or the whole `vector`.
    - `scale`: λ; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    """

    density: float = 0.9
    gamma: float = 0.01
    trim: Literal["tensor", "vector"] = "tensor"
    scale: Varying = 0.3

    def __post_init__(self) -> None:
        _check("Breadcrumbs", self.density, self.gamma, self.trim)
        varying("Breadcrumbs", "scale", self.scale)

    def chain(self) -> Chain:
        """Band, weighted sum."""
        return Chain(transforms=(Trim(density=self.density, gamma=self.gamma, scope=self.trim),), reduction=Sum(scale=self.scale))


@register("breadcrumbs_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Method):
    r"""TIES over $m_t \odot \tau_t$, with the masks of `breadcrumbs` in place of the trim.

    - `density`: share of the entries that is kept, in (0, 1]; 1 keeps everything, outliers too.
    - `gamma`: share of the largest entries that goes first, in [0, 1); fewer where `density` would not be reached.
    - `trim`: what is ranked: each `tensor`, or the whole `vector`.
    - `cancelled`: entries whose kept deltas cancel exactly: `zero`, or the `majority` sign of all entries.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    density: float = 0.9
    gamma: float = 0.01
    trim: Literal["tensor", "vector"] = "tensor"
    cancelled: Literal["zero", "majority"] = "zero"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        _check("BreadcrumbsTies", self.density, self.gamma, self.trim)
        choice("BreadcrumbsTies", "cancelled", self.cancelled, ("zero", "majority"))
        varying("BreadcrumbsTies", "scale", self.scale, tasks=False)

    def chain(self) -> Chain:
        """Band, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Trim(density=self.density, gamma=self.gamma, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
