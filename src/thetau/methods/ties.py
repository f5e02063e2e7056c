"""TIES-Merging: trim, elect a sign, average what agrees.

Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>. As in the authors' code, the trim ranks each *whole* task vector
(mergekit and PEFT: each tensor, `trim="tensor"`). Departs from that code once: entries whose kept deltas cancel exactly give 0, so that
negating every task negates the merge; `cancelled="majority"` is the code's way.

mergekit's TIES is `trim="tensor"`, `count="floor"`, `cancelled="positive"`, with its `weight` in `weights`, `normalize` in `normalise`,
`lambda` in `scale`, and `rescale: true` as `rescale="l1"`.

Use it where tasks disagree in sign and a plain sum loses; it takes two passes over the inputs (one more with `l1`), and needs a base.
"""

from __future__ import annotations

from dataclasses import dataclass

from thetau.methods.fields import Cancelled, Coefficient, Counted, Densities, Normalise, Ranked, Rescaled, Weights
from thetau.methods.registry import register
from thetau.methods.sparse import consensus, refuse_patterns, rescaled
from thetau.parts import Chain, Method
from thetau.transforms import Trim


@register("ties", paper="Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708")
@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    r"""$\tau = \lambda\,\mathrm{mean}\{\hat\tau_t : \mathrm{sgn}\,\hat\tau_t = \mathrm{sgn}\sum_s \hat\tau_s\}$ entrywise, $\hat\tau_t$ task $t$ trimmed.

    With weights the sum and the mean are weighted: signs are those of $\sum_s w_s \hat\tau_s$, and the mean is $\sum w_t \hat\tau_t / \sum w_t$.
    """

    density: Densities = 0.2
    trim: Ranked = "vector"
    count: Counted = "ceil"
    rescale: Rescaled = "none"
    weights: Weights = 1.0
    normalise: Normalise = True
    cancelled: Cancelled = "zero"
    scale: Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_patterns(self, self.trim, density=self.density)

    def chain(self) -> Chain:
        """Trim, weigh, elect, disjoint mean, scale."""
        trim = Trim(density=self.density, scope=self.trim, count=self.count, least=1)
        return consensus(
            (rescaled(trim, self.rescale, self.trim),),
            weights=self.weights,
            normalise=self.normalise,
            cancelled=self.cancelled,
            scale=self.scale,
        )
