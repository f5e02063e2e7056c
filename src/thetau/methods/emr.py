r"""EMR-Merging: elect one vector, and for each task a mask and a rescaler.

Huang et al., NeurIPS 2024, <https://arxiv.org/abs/2405.17461>. The unified vector has the sign of the tasks' mean and the largest magnitude
among the tasks that have this sign; a task's mask is where it has this sign, its rescaler makes its masked vector as large as its own.
The paper divides sums of magnitudes over the whole vector (`rescale="sums"`); the authors' code, and FusionBench, add up the *means* of
every tensor, which gives a bias as much weight as a matrix and is the default here. As in the code, a mean of exactly 0 counts as
negative (`cancelled="zero"` leaves such entries out, so that negating every task negates the result), and every tensor takes part.
Departs from it for a task whose mask is empty, whose rescaler would be infinite or NaN: it is 1.

Use it to keep many fine-tuned models in little more than the room of two, when it is known at inference which task an input is of:
`thetau.outputs` gives each task's vector, `thetau vector compress --method emr` stores them all. It needs no data and nothing to tune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal

from thetau._lazy import torch
from thetau.methods.fields import Coefficient
from thetau.methods.masks import Masked
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Site, Statistic
from thetau.sums import sum_in_order

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Zero = Literal["negative", "zero"]
Rule = Literal["means", "sums", "none"]


def elected(stack: Float[Tensor, "task *block"], cancelled: Zero) -> tuple[Bool[Tensor, "task *block"], Float[Tensor, "*block"]]:
    """Where each task has the elected sign, and that sign times the largest magnitude that has it."""
    sign = sum_in_order(stack).sign_()
    if cancelled == "negative":
        sign.masked_fill_(sign == 0, -1)
    along = stack * sign  # what has the elected sign is positive
    return along > 0, along.amax(0).clamp_(min=0) * sign + 0.0  # no −0


@dataclass(frozen=True, kw_only=True)
class Magnitudes(Statistic):
    """Σ|τ_t| and Σ|mask_t ⊙ τ_u| of shape `[2, task]`, float64: over all entries, or of the means of every tensor.

    It stands after the reduction, so the stack's first row is the merged vector, which may be scaled: τ_u is made anew.
    """

    cancelled: Zero
    rule: Rule

    def add(
        self, total: Float[Tensor, "2 task"] | None, stack: Float[Tensor, "row *block"], site: Site, seen: None
    ) -> Float[Tensor, "2 task"]:
        """Add a block's magnitudes; the rows are the merged one and the tasks'."""
        vectors = stack[1:]
        agree, unified = elected(vectors, self.cancelled)
        pairs = (vectors.abs(), unified.abs().expand(agree.shape).masked_fill(~agree, 0))
        sums = torch.stack([one.reshape(len(one), -1).sum(1, dtype=torch.float64) for one in pairs])
        sums = sums / prod(site.shape) if self.rule == "means" else sums
        return sums if total is None else total + sums

    def fold(self, total: Float[Tensor, "2 task"], other: Float[Tensor, "2 task"]) -> Float[Tensor, "2 task"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Float[Tensor, "2 task"], seen: None) -> Float[Tensor, "2 task"]:
        """The sums themselves."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """Two numbers a task."""
        return 16 * tasks


@dataclass(frozen=True, kw_only=True)
class Modulated(Masked):
    """Each task's vector: the unified one where the task has its sign, rescaled."""

    cancelled: Zero
    rule: Rule

    def requires(self) -> Magnitudes | None:
        """The sums of magnitudes, where there is a rescaler."""
        return Magnitudes(cancelled=self.cancelled, rule=self.rule) if self.rule != "none" else None

    def prepare(self, result: Tensor | None, tasks: tuple[str, ...]) -> tuple[float, ...]:
        """The rescalers in float32, in the order of the tasks."""
        if result is None:
            return (1.0,) * len(tasks)
        own, masked = result
        ratios = torch.where(masked > 0, own / masked.clamp(min=torch.finfo(masked.dtype).tiny), 1.0)
        return tuple(ratios.float().tolist())

    def notes(self, state: Sequence[float]) -> list[str]:
        """The rescalers' range, for the summary."""
        return [f"emr: rescalers from {min(state):.3f} to {max(state):.3f}."] if self.rule != "none" else []

    def mask(
        self, task: int, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Bool[Tensor, "*block"]:
        """Where the task has the elected sign."""
        return elected(stack, self.cancelled)[0][task]

    def masks(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Bool[Tensor, "task *block"]:
        """All of them, elected once."""
        return elected(stack, self.cancelled)[0]

    def rescaler(self, task: int, state: Sequence[float]) -> float:
        """The task's own."""
        return state[task]


@register("emr", paper="Huang et al., NeurIPS 2024, https://arxiv.org/abs/2405.17461")
@dataclass(frozen=True, kw_only=True)
class Emr(Method, BlockReduction):
    r"""$\hat\tau_t = \gamma_t\, m_t \odot \tau_u$ for each task; merged alone it is $\tau_u$, the elected signs times the largest magnitudes.

    - `rescale`: $\gamma_t$: from the `means` of every tensor (the code), the `sums` over the whole vector (the paper), or `none`.
    - `cancelled`: the sign of entries whose deltas cancel exactly: `negative` (the code), or `zero`, which leaves them out.
    - `scale`: λ, of the unified vector and so of every output.
    """

    rescale: Annotated[Rule, "the rescalers."] = "means"
    cancelled: Annotated[Zero, "the sign of what cancels."] = "negative"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Elect, scale; then a vector for each task."""
        emit = Modulated(cancelled=self.cancelled, rule=self.rescale)
        return Chain(reduction=self, post=(Scale(scale=self.scale),), emit=emit)

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The unified vector at a block."""
        return elected(stack, self.cancelled)[1]
