"""Model Stock: the mean of the models, pulled towards the base by the angle between them.

Jang et al., ECCV 2024, <https://arxiv.org/abs/2403.19522>, tensor by tensor, as there and in mergekit, whose rule is `clamp=False`.

Use it to average fine-tuned models of one task, where few of them should do the work of many; two passes over the inputs, and a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Mean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import StockRatio


@register("model_stock", paper="Jang et al., ECCV 2024, https://arxiv.org/abs/2403.19522")
@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    r"""$\tau = \frac{\lambda t}{K}\sum_i \tau_i$ with $t = \frac{K\cos\theta}{1 + (K-1)\cos\theta}$ in each tensor, clamped to [0, 1]."""

    clamp: Annotated[
        bool, "keep t in [0, 1]; without it t can be negative, or large, where tasks oppose each other (mergekit)."
    ] = True
    filter_wise: Annotated[bool, "one t for each row, what lies along the last axis, instead of each tensor."] = False
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Ratio, mean, scale."""
        return Chain(
            transforms=(StockRatio(clamp=self.clamp, filter_wise=self.filter_wise),),
            reduction=Mean(),
            post=(Scale(scale=self.scale),),
        )
