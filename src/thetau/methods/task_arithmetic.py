"""Task arithmetic: θ₀ + λ Σ τ_t.

Ilharco et al., ICLR 2023, <https://arxiv.org/abs/2212.04089>. The paper chooses λ on held-out data; the default of 0.3 is for where nothing
can be tuned. mergekit's `weight` is λ_t here (times its `lambda`), and its `normalize: true` is `total: 1` (or its `lambda`).

Use it as the first thing to try, and wherever task vectors hardly interfere; it costs one pass over the inputs and needs a base.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Coefficients, Total
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method


@register("task_arithmetic", paper="Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    r"""$\tau = \sum_t \lambda_t \tau_t$."""

    scale: Coefficients = 0.3
    total: Total = None

    def chain(self) -> Chain:
        """A weighted sum."""
        return Chain(reduction=Sum(scale=self.scale, total=self.total))
