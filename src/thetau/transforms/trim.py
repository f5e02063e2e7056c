"""Trim: keep a band of each task's entries by magnitude, zero the rest.

Without `gamma` the first step of TIES-Merging, Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>: the largest stay. The
authors' code ranks the *whole* task vector; mergekit and PEFT rank each tensor. With `gamma` the masks of Model Breadcrumbs, Davari and
Belilovsky, ECCV 2024, <https://arxiv.org/abs/2312.06795>: the largest go too. Entries that equal a cut are all kept, so a vector with
many equal entries (differences of bfloat16 numbers) can keep more than its share. mergekit rounds the number of kept entries down
(`count="floor"`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thetau._lazy import torch
from thetau.fields import each_number
from thetau.parts import Op, Site, Transform, Varying
from thetau.statistics import MagnitudeQuantile
from thetau.statistics.quantile import Count, kept_count

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Band = tuple[float, float]
Cuts = Mapping[str, Band] | Mapping[str, Mapping[str, Band]]


@dataclass(frozen=True, kw_only=True)
class Trim(Transform):
    """Drops the ⌊gamma · n⌋ entries of largest magnitude and keeps the ⌈density · n⌉ next ones, n counting the whole vector or one tensor.

    `count` and `least` say how the number of kept entries is rounded (`MagnitudeQuantile`).
    """

    density: Varying
    gamma: Varying = 0.0
    scope: Literal["vector", "tensor"] = "vector"
    count: Count = "ceil"
    least: int = 0

    def requires(self) -> MagnitudeQuantile | None:
        """The exact cuts; none where everything is kept."""
        if all(density >= 1 for density in each_number(self.density)):
            return None
        return MagnitudeQuantile(
            density=self.density, gamma=self.gamma, per_tensor=self.scope == "tensor", count=self.count, least=self.least
        )

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """Smallest and largest kept magnitude by task, in each tensor where the scope is one tensor."""
        if isinstance(result, dict):
            return {name: dict(zip(tasks, map(tuple, cuts.tolist()), strict=True)) for name, cuts in result.items()}
        return dict(zip(tasks, map(tuple, result.tolist()), strict=True)) if isinstance(result, torch.Tensor) else None

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        if not isinstance(state, Mapping):
            return []
        cuts = state[site.name] if self.scope == "tensor" else state
        low, high = zip(*(cuts[task] for task in site.tasks), strict=True)
        return [Op("band", by_task=(*low, *high)) if self._outliers else Op("trim", by_task=low)]

    def apply(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "task *block"]:
        """Zero what lies outside the cuts."""
        if not isinstance(state, Mapping):
            return stack
        cuts = state[site.name] if self.scope == "tensor" else state
        out = stack.clone()
        for row, task in zip(out, site.tasks, strict=True):
            low, high = cuts[task]
            size = row.float().abs()
            row.masked_fill_((size < low) | (size > high) if self._outliers else size < low, 0)
        return out

    @property
    def _outliers(self) -> bool:
        return any(each_number(self.gamma))


def strongest(values: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """A whole tensor with its ⌈density · n⌉ entries of largest magnitude and zeros elsewhere; equal ones at the cut all stay."""
    kept = kept_count(density, values.numel())
    if kept in (0, values.numel()):
        return values
    size = values.abs()
    cut = size.flatten().kthvalue(values.numel() - kept + 1).values
    return values.masked_fill(size < cut, 0)
