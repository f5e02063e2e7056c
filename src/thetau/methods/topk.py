"""TopK: the mean of the task vectors, each cut to its largest entries.

As in "Task vector bases" (Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Appendix C.5): 5 % are kept and the masks are divided by
the number of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import Mean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying
from thetau.transforms import Trim


@register("topk", paper="Task vector bases, https://arxiv.org/abs/2502.01015")
@dataclass(frozen=True, kw_only=True)
class TopK(Method):
    r"""$\tau = \frac{\lambda}{K}\sum_t m_t \odot \tau_t$, $m_t$ keeping the largest entries of task $t$.

    - `density`: share of each task vector's entries that is kept, in (0, 1].
    - `trim`: what is ranked: the whole `vector`, or each `tensor`.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    density: float = 0.05
    trim: Literal["vector", "tensor"] = "vector"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        number("TopK", "density", self.density, "in (0, 1]", low=0, high=1, open_low=True)
        choice("TopK", "trim", self.trim, ("vector", "tensor"))
        varying("TopK", "scale", self.scale, tasks=False)

    def chain(self) -> Chain:
        """Trim, mean, scale."""
        return Chain(transforms=(Trim(density=self.density, scope=self.trim),), reduction=Mean(), post=(Scale(scale=self.scale),))
