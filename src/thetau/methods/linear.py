"""Linear: the weighted mean of models, or their weighted sum.

Model soups, Wortsman et al., ICML 2022, <https://arxiv.org/abs/2203.05482>, with weights; mergekit's `linear` (`weight` is `weights`,
`normalize` is `normalise`). Departs from it once: weights that add up to 0 cannot be normalised and are refused.

Use it to average models of one architecture, with or without a common base; it costs one pass over the inputs and needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from thetau.methods.fields import Shares
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method


@register("linear", paper="Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482")
@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    r"""$\theta = \sum_t w_t \theta_t / \sum_t w_t$."""

    weights: Shares = 1.0
    normalise: Annotated[bool, "divide by the sum of the weights."] = True

    def chain(self) -> Chain:
        """A weighted sum of models."""
        total = 1.0 if self.normalise else None
        return Chain(reduction=Sum(scale=self.weights, total=total, zero_sums=False), models=True)
