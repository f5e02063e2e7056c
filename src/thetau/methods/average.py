"""Simple averaging of models: θ₀ plus the mean of the task vectors.

Model soups, Wortsman et al., ICML 2022, <https://arxiv.org/abs/2203.05482> (uniform soup).

Use it for several fine-tunings on one task, or as the yardstick that nothing should fall below; different tasks shrink to a K-th of their
change each. It costs one pass over the inputs and has nothing to tune.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Mean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method


@register("average", paper="Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482")
@dataclass(frozen=True, kw_only=True)
class Average(Method):
    r"""$\tau = \frac{\lambda}{K}\sum_t \tau_t$; with λ = 1 the mean of the models."""

    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Mean, then scale."""
        return Chain(reduction=Mean(), post=(Scale(scale=self.scale),))
