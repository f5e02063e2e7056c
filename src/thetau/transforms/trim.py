"""Trim: keep each task's largest entries by magnitude, zero the rest.

The first step of TIES-Merging, Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>. The authors' code ranks the *whole* task
vector; mergekit and PEFT rank each tensor. Entries that equal the cut are all kept, as in the authors' code, so a vector with
many equal entries (differences of bfloat16 numbers) can keep more than its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from thetau.engine.types import Op, Site
from thetau.statistics import MagnitudeQuantile

Cuts = Mapping[str, float] | Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Trim:
    """Keeps the ⌈density · n⌉ entries of largest magnitude, n counting the whole vector or one tensor."""

    density: float
    scope: Literal["vector", "tensor"] = "vector"
    per_task: bool = True

    def requires(self) -> MagnitudeQuantile | None:
        """The exact cut; none where everything is kept."""
        return MagnitudeQuantile(density=self.density, per_tensor=self.scope == "tensor") if self.density < 1 else None

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """Cuts by task, in each tensor where the scope is one tensor."""
        if isinstance(result, dict):
            return {name: dict(zip(tasks, cuts.tolist(), strict=True)) for name, cuts in result.items()}
        return dict(zip(tasks, result.tolist(), strict=True)) if isinstance(result, Tensor) else None

    def fuse(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        if not isinstance(state, Mapping):
            return []
        cuts = state[site.name] if self.scope == "tensor" else state
        return [Op("trim", by_task=tuple(cuts[task] for task in site.tasks))]

    def apply(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "task *block"]:
        """Zero what lies below the cut."""
        if not isinstance(state, Mapping):
            return stack
        cuts = state[site.name] if self.scope == "tensor" else state
        out = stack.clone()
        for row, task in zip(out, site.tasks, strict=True):
            row.masked_fill_(row.float().abs() < cuts[task], 0)
        return out
