"""TopK: the mean of the task vectors, each cut to its largest entries.

As in "Task vector bases" (Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Appendix C.5): 5 % are kept and the masks are divided by
the number of tasks.

Use it where the largest changes carry the task; the mean of so few entries is short, so raise `scale` with validation data. It costs
two passes over the inputs and needs a base.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Coefficient, Density, Ranked
from thetau.methods.reductions import Mean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method
from thetau.transforms import Trim


@register("topk", paper="Task vector bases, https://arxiv.org/abs/2502.01015")
@dataclass(frozen=True, kw_only=True)
class TopK(Method):
    r"""$\tau = \frac{\lambda}{K}\sum_t m_t \odot \tau_t$, $m_t$ keeping the largest entries of task $t$."""

    density: Density = 0.05
    trim: Ranked = "vector"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Trim, mean, scale."""
        return Chain(transforms=(Trim(density=self.density, scope=self.trim),), reduction=Mean(), post=(Scale(scale=self.scale),))
