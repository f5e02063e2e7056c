"""TIES-Merging: trim, elect a sign, average what agrees.

Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>. As in the authors' code, the trim ranks each *whole* task vector
(mergekit and PEFT: each tensor, `trim="tensor"`). Departs from that code once: entries whose kept deltas cancel exactly give 0, so that
negating every task negates the merge; `cancelled="majority"` is the code's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thetau.methods.checks import choice, number, varying
from thetau.methods.reductions import DisjointMean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying
from thetau.transforms import Elect, Trim


@register("ties", paper="Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708")
@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    r"""$\tau = \lambda\,\mathrm{mean}\{\hat\tau_t : \mathrm{sgn}\,\hat\tau_t = \mathrm{sgn}\sum_s \hat\tau_s\}$ entrywise, $\hat\tau_t$ being task $t$ trimmed.

    - `density`: share of each task vector's entries that is kept, in (0, 1].
    - `trim`: what is ranked: the whole `vector`, or each `tensor`.
    - `cancelled`: entries whose kept deltas cancel exactly: `zero`, or the `majority` sign of all entries.
    - `scale`: λ; a number, or one a pattern of tensor names.
    """

    density: float = 0.2
    trim: Literal["vector", "tensor"] = "vector"
    cancelled: Literal["zero", "majority"] = "zero"
    scale: Varying = 1.0

    def __post_init__(self) -> None:
        number("Ties", "density", self.density, "in (0, 1]", low=0, high=1, open_low=True)
        choice("Ties", "trim", self.trim, ("vector", "tensor"))
        choice("Ties", "cancelled", self.cancelled, ("zero", "majority"))
        varying("Ties", "scale", self.scale, tasks=False)

    def chain(self) -> Chain:
        """Trim, elect, disjoint mean, scale."""
        return Chain(
            transforms=(Trim(density=self.density, scope=self.trim), Elect(cancelled=self.cancelled)),
            reduction=DisjointMean(),
            post=(Scale(scale=self.scale),),
        )
