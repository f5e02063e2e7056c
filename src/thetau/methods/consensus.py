r"""Consensus merging: leave out of a merged vector what serves one task alone, or none.

Wang et al., ICML 2024, <https://arxiv.org/abs/2405.07813>: merge, make each task's TALL mask (`thetau.methods.masks`), keep the entries
that at least two masks have, multiply by α. As in the authors' code, the masks are made from the whole task vectors and a merged one with
coefficient 1, TIES ends with a sum in place of its mean (`dis-sum`), and every tensor takes part. The paper tunes λ_t and α on held-out
data (α in 0.1 … 1); the defaults, λ_t = 0.4 and task arithmetic's 0.3, are for where nothing can be tuned. Entries whose kept deltas
cancel exactly are as in `ties`.

Use it in place of task arithmetic or TIES when there are many tasks, whose private changes crowd each other out; it needs no data, and no
pass more than the method it filters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from thetau.methods.fields import Cancelled, Coefficient
from thetau.methods.masks import PAPER, Agreement, Least, Selectivity, TrimTo, signed_sum
from thetau.methods.nested import over_whole_vectors
from thetau.methods.reductions import Scale, Sum
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Chain, Method


def agreed(inner: Chain, owner: str, selectivity: Selectivity, least: int, scale: Coefficient) -> Chain:
    """A chain, then the entries that enough masks have, then α."""
    whole = over_whole_vectors(inner, owner)
    return replace(whole, post=(*whole.post, Agreement(selectivity=selectivity, least=least), Scale(scale=scale)))


@register("consensus_ta", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class ConsensusTa(Method):
    r"""$\tau = \alpha\, m \odot \sum_t \tau_t$, $m$ keeping what at least `least` TALL masks have.

    - `scale`: α, which multiplies what is kept.
    """

    selectivity: Selectivity = 0.4
    least: Least = 2
    scale: Coefficient = 0.3

    def chain(self) -> Chain:
        """Sum, consensus, scale."""
        return agreed(Chain(reduction=Sum()), "ConsensusTa", self.selectivity, self.least, self.scale)


@register("consensus_ties", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class ConsensusTies(Method):
    r"""$\tau = \alpha\, m \odot \tau_\mathrm{TIES}$, the TIES vector a sum, $m$ keeping what at least `least` TALL masks have.

    - `scale`: α, which multiplies what is kept.
    """

    density: TrimTo = 0.2
    cancelled: Cancelled = "zero"
    selectivity: Selectivity = 0.4
    least: Least = 2
    scale: Coefficient = 0.3

    def chain(self) -> Chain:
        """Trim, elect, sum; consensus, scale."""
        inner = signed_sum(self.density, self.cancelled)
        return agreed(inner, "ConsensusTies", self.selectivity, self.least, self.scale)


@register("consensus", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Consensus(Method):
    r"""$\tau = \alpha\, m \odot \tau_m$, $\tau_m$ merged by any method, $m$ keeping what at least `least` TALL masks have.

    Where that method acts on some tensors only, so does the mask.

    - `then`: the method whose merged vector is filtered; its own coefficient counts in the masks.
    - `scale`: α, which multiplies what is kept.
    """

    scale: Coefficient = 0.3
    then: Method = field(default_factory=lambda: TaskArithmetic(scale=1.0))
    selectivity: Selectivity = 0.4
    least: Least = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        over_whole_vectors(self.then.chain(), "Consensus")

    def chain(self) -> Chain:
        """The method, consensus, scale."""
        return agreed(self.then.chain(), "Consensus", self.selectivity, self.least, self.scale)
