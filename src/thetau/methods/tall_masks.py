r"""TALL masks: one merged vector and a bit an entry for each task, from which every task's model comes back.

Wang et al., ICML 2024, <https://arxiv.org/abs/2405.07813>. The merged vector is the sum of the task vectors, or TIES with a sum at its
end (`dis-sum`, 20 % kept) as in the authors' code; `thetau.methods.masks` has the masks. Every tensor takes part, and the coefficient of
the merged vector is 1. The paper chooses λ_t for each task on held-out data; 0.4 is for where there is none.

Use it to keep many fine-tuned models in little more than the room of two, when it is known at inference which task an input is of:
`thetau.outputs` gives each task's vector, `thetau vector compress --method tall` stores them all. It needs no data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from thetau.methods.fields import Cancelled, Coefficient
from thetau.methods.masks import PAPER, Masked, Selectivity, TrimTo, signed_sum, tall_mask
from thetau.methods.nested import over_whole_vectors
from thetau.methods.reductions import Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Site, Varying

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TallMask(Masked):
    """Each task's vector as its TALL mask leaves the merged one."""

    selectivity: Varying

    def mask(
        self, task: int, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Bool[Tensor, "*block"]:
        """Where the task is nearer to the merged vector than to zero."""
        return tall_mask(stack[task], merged, site.per_task(self.selectivity)[task])


@register("tall_masks", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class TallMasks(Method):
    r"""$\hat\tau_t = m_t \odot \tau_m$ for each task, $m_t = [\,|\tau_t| > \lambda_t |\tau_m - \tau_t|\,]$; merged alone it is $\tau_m$.

    - `vector`: $\tau_m$: the sum of the task vectors (`task_arithmetic`), or of what TIES keeps of them (`ties`).
    - `density`: share of each task vector's entries that `ties` keeps.
    - `scale`: coefficient of $\tau_m$; the masks are made from the scaled one.
    """

    vector: Annotated[Literal["task_arithmetic", "ties"], "the merged vector."] = "task_arithmetic"
    density: TrimTo = 0.2
    cancelled: Cancelled = "zero"
    selectivity: Selectivity = 0.4
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Sum or TIES, scale; then a vector for each task."""
        ties = self.vector == "ties"
        inner = signed_sum(self.density, self.cancelled) if ties else Chain(reduction=Sum())
        whole = over_whole_vectors(inner, "TallMasks")
        return replace(whole, post=(Scale(scale=self.scale),), emit=TallMask(selectivity=self.selectivity))
