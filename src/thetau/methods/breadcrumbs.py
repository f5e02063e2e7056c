"""Model Breadcrumbs: leave out each task vector's outliers and its smallest entries, then sum, or merge with TIES.

Davari and Belilovsky, ECCV 2024, <https://arxiv.org/abs/2312.06795>. As there, and in mergekit, each *tensor* is ranked
(`trim="vector"` ranks the whole task vector). mergekit's `breadcrumbs_ties` is the same band followed by TIES's sign election; its mask
of a tensor with fewer than 1/γ entries has no outliers, and neither has ours. It rounds the number of kept entries down
(`count="floor"`), so that of a tensor with one entry nothing is left; ours rounds up.

mergekit's `weight` is λ_t in `breadcrumbs` and `weights` in `breadcrumbs_ties`, where it also has `cancelled="positive"` and
`normalise=False`; its `normalize: true` is `total: 1` there and `normalise=True` here, its `rescale: true` is `rescale="l1"`.

Use it where a few very large changes of a task drown the others; two passes over the inputs (one more with `l1`), and a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from thetau.methods.fields import (
    Cancelled,
    Coefficient,
    Coefficients,
    Counted,
    Densities,
    Normalise,
    Ranked,
    Rescaled,
    Total,
    Varies,
    Weights,
    Within,
)
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.methods.sparse import consensus, refuse_patterns, rescaled
from thetau.parts import Chain, Method, Transform, Varying
from thetau.transforms import Trim

PAPER = "Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795"
Band = Annotated[
    Densities,
    "share of the entries that is kept, by task too, and by pattern of names where `trim` is `tensor`; 1 keeps everything, outliers too.",
]
Outliers = Annotated[
    Varying,
    Varies(task=True, pattern=True),
    Within("[0, 1)"),
    "share of the largest entries that goes first, varying as `density` may; fewer where `density` would not be reached.",
]


@register("breadcrumbs", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    r"""$\tau = \sum_t \lambda_t\, m_t \odot \tau_t$, $m_t$ leaving out the largest and the smallest entries of each tensor of task $t$."""

    density: Band = 0.9
    gamma: Outliers = 0.01
    trim: Ranked = "tensor"
    count: Counted = "ceil"
    rescale: Rescaled = "none"
    scale: Coefficients = 0.3
    total: Total = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_patterns(self, self.trim, density=self.density, gamma=self.gamma)

    def chain(self) -> Chain:
        """Band, weighted sum."""
        return Chain(transforms=(_band(self),), reduction=Sum(scale=self.scale, total=self.total))


@register("breadcrumbs_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Method):
    r"""TIES over $m_t \odot \tau_t$, with the masks of `breadcrumbs` in place of the trim."""

    density: Band = 0.9
    gamma: Outliers = 0.01
    trim: Ranked = "tensor"
    count: Counted = "ceil"
    rescale: Rescaled = "none"
    weights: Weights = 1.0
    normalise: Normalise = True
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_patterns(self, self.trim, density=self.density, gamma=self.gamma)

    def chain(self) -> Chain:
        """Band, weigh, elect, disjoint mean, scale."""
        return consensus(
            (_band(self),), weights=self.weights, normalise=self.normalise, cancelled=self.cancelled, scale=self.scale
        )


def _band(method: Breadcrumbs | BreadcrumbsTies) -> Transform:
    trim = Trim(density=method.density, gamma=method.gamma, scope=method.trim, count=method.count)
    return rescaled(trim, method.rescale, method.trim)
