r"""The masks of TALL: which entries of a merged vector serve a task.

Wang et al., ICML 2024, <https://arxiv.org/abs/2405.07813>, Section 4: task t keeps an entry where $|\tau_t| > \lambda_t |\tau_m - \tau_t|$,
that is, where its own model is nearer to the merged one than to the base, weighed by λ_t. The inequality is strict, so an entry that a
task did not change is never in its mask. Both sides are differences of models; FusionBench's port puts the base's own weights on the left.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.fields import AtLeast, Varies, Within
from thetau.methods.fields import Density
from thetau.methods.reductions import Sum
from thetau.parts import Chain, Emit, PostStage, Site, State, Varying
from thetau.sums import masked
from thetau.transforms import Elect, Trim

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

PAPER = "Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813"
Selectivity = Annotated[
    Varying,
    Varies(task=True, pattern=True, each=Within("[0, inf)")),
    "λ_t of the masks; a larger one keeps fewer entries. The paper chooses among 0.2 … 0.6 for each task, by accuracy on held-out data.",
]
Least = Annotated[int, AtLeast(0), "tasks whose masks must have an entry for it to stay; 0 keeps every entry."]
TrimTo = Annotated[Density, "share of each task vector's entries that TIES keeps."]
Cancel = Literal["zero", "majority", "positive"]


def signed_sum(density: float, cancelled: Cancel) -> Chain:
    """TIES whose last step is a sum instead of a mean (`dis-sum` in the authors' code)."""
    return Chain(transforms=(Trim(density=density), Elect(cancelled=cancelled)), reduction=Sum())


def tall_mask(vector: Float[Tensor, "*block"], merged: Float[Tensor, "*block"], selectivity: float) -> Bool[Tensor, "*block"]:
    """Where one task's vector is nearer to the merged one than to zero."""
    return vector.abs() > (merged - vector).abs() * selectivity


@dataclass(frozen=True, kw_only=True)
class Agreement(PostStage):
    """Keeps the merged entries that lie in at least so many tasks' masks."""

    reads_stack: ClassVar[bool] = True
    selectivity: Varying
    least: int

    def adjust(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"] | None, state: object, site: Site
    ) -> Float[Tensor, "*block"]:
        """Zero what too few tasks use."""
        assert stack is not None
        counts = torch.zeros(merged.shape, dtype=torch.int32)
        for row, selectivity in zip(stack, site.per_task(self.selectivity), strict=True):
            counts += tall_mask(row, merged, selectivity)
        return merged.masked_fill(counts < self.least, 0)


class Masked(Emit):
    """One output a task: the merged vector where the task's mask is set, times the task's rescaler; what a bit an entry can keep."""

    def names(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks themselves."""
        return tasks

    @abstractmethod
    def mask(
        self, task: int, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Bool[Tensor, "*block"]:
        """The mask of the task with this number, at a block."""

    def masks(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Bool[Tensor, "task *block"]:
        """Every task's mask at a block."""
        return torch.stack([self.mask(task, merged, stack, site) for task in range(len(stack))])

    def rescaler(self, task: int, state: State) -> float:
        """What its masked entries are multiplied by, a float32 number."""
        return 1.0

    def emit(
        self, name: str, merged: Float[Tensor, "*block"] | None, stack: Float[Tensor, "task *block"], state: State, site: Site
    ) -> Float[Tensor, "*block"]:
        """A block of one task's vector."""
        assert merged is not None
        task = site.tasks.index(name)
        return masked(merged, self.mask(task, merged, stack, site), self.rescaler(task, state))
