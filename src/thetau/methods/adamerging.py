r"""AdaMerging: a sum of task vectors whose coefficients, one a task and tensor, were learned on unlabelled examples.

Yang et al., ICLR 2024, <https://arxiv.org/abs/2310.02575>: the coefficients minimise the entropy of what the merged model says of unlabelled
examples of each task. They are evidence: `thetau evidence adamerging` learns them once with a live model, and every merge after that needs
neither model nor data. AdaMerging++ is the same over task vectors that TIES trimmed and whose signs it elected: `then: {name: ties, density: 0.2}`.
Of `then` only the transforms count, whatever it does after them, so that `then: awd` is AWD-AdaMerging (<https://arxiv.org/abs/2411.18729>). What
`then` does not select stays the base's.

Use it where some unlabelled examples of each task and the time for some hundreds of steps of the merged model are at hand: it is the most that data
without labels has given in the papers. The merge costs what task arithmetic costs; the learning costs a forward and a backward pass of
the merged model a task and step, and memory for three models whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from thetau._lazy import torch
from thetau.errors import AlignmentError
from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import BlockReduction, Chain, Form, Method, Selection, Site
from thetau.sums import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KIND = "coefficients"


@register("adamerging", paper="Yang et al., ICLR 2024, https://arxiv.org/abs/2310.02575")
@dataclass(frozen=True, kw_only=True)
class AdaMerging(Method):
    r"""$\tau = \lambda \sum_t \lambda_{t,l} \hat\tau_{t,l}$ at each tensor $l$, with learned $\lambda_{t,l}$ and $\hat\tau_t$ after the transforms of `then`.

    - `then`: the method whose transforms stand before the sum; it must be the one over which the coefficients were learned.
    - `scale`: λ, which multiplies the learned coefficients; a number, or one a pattern of tensor names.
    """

    scale: Coefficient = 1.0
    then: Method = field(default_factory=TaskArithmetic)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.then.chain()
        if inner.models or inner.needs:
            what = "merges models" if inner.models else f"needs the evidence `{inner.needs[0]}`"
            raise ValueError(
                f"`AdaMerging(then=...)` must be a method of task vectors without data. Got {self.then!r}, which {what}."
            )

    def chain(self) -> Chain:
        """The other method's transforms, and the learned sum."""
        inner = self.then.chain()
        return replace(
            inner,
            reduction=LearnedSum(),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=inner.selection.tensors, elsewhere="base"),
            split_fused=False,
            emit=None,
        )


@dataclass(frozen=True, kw_only=True)
class LearnedSum(BlockReduction):
    """The reduction of `AdaMerging`: Σ λ τ with each task's own λ at each tensor."""

    needs: ClassVar[tuple[str, ...]] = (KIND,)
    forms: ClassVar[Mapping[str, Form]] = {KIND: "number"}

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The weighted sum of a block.

        Raises:
            AlignmentError: a coefficient is not finite.
        """
        given = site.evidence[KIND]
        if not bool(torch.isfinite(given).all()):
            raise AlignmentError(f"{site.name!r}: a coefficient is NaN or infinite. Learn them again.")
        return weighted_sum(stack, given.tolist())
