"""Model Breadcrumbs: leave out each task vector's outliers and its smallest entries, then sum, or merge with TIES.

Davari and Belilovsky, ECCV 2024, <https://arxiv.org/abs/2312.06795>. As there, and in mergekit, each *tensor* is ranked
(`trim="vector"` ranks the whole task vector). mergekit's `breadcrumbs_ties` is the same band followed by TIES's sign election; its mask
of a tensor with fewer than 1/γ entries has no outliers, and neither has ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from thetau.methods.fields import Cancelled, Coefficient, Coefficients, Density, Ranked, Within
from thetau.methods.reductions import DisjointMean, Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import Elect, Trim

PAPER = "Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795"
Band = Annotated[Density, "share of the entries that is kept; 1 keeps everything, outliers too."]
Outliers = Annotated[
    float, Within("[0, 1)"), "share of the largest entries that goes first; fewer where `density` would not be reached."
]


@register("breadcrumbs", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    r"""$\tau = \sum_t \lambda_t\, m_t \odot \tau_t$, $m_t$ leaving out the largest and the smallest entries of each tensor of task $t$."""

    density: Band = 0.9
    gamma: Outliers = 0.01
    trim: Ranked = "tensor"
    scale: Coefficients = 0.3

    def chain(self) -> Chain:
        """Band, weighted sum."""
        return Chain(transforms=(Trim(density=self.density, gamma=self.gamma, scope=self.trim),), reduction=Sum(scale=self.scale))


@register("breadcrumbs_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Method):
    r"""TIES over $m_t \odot \tau_t$, with the masks of `breadcrumbs` in place of the trim."""

    density: Band = 0.9
    gamma: Outliers = 0.01
    trim: Ranked = "tensor"
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Band, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Trim(density=self.density, gamma=self.gamma, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
