"""Rescale: after a masking transform, each task's entries are enlarged until the sum of their magnitudes is what it was before.

As mergekit rescales (`rescale: true`): by Σ|τ| / Σ|m ⊙ τ|, a task and a tensor at a time, and not at all where either sum is below 1e-7.
DARE's own 1/(1 − p) keeps every entry's expectation instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thetau._lazy import torch
from thetau.parts import Cost, Op, Site, Transform
from thetau.statistics import MaskedSums
from thetau.statistics.masking import Masked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LEAST = 1e-7  # a sum of magnitudes below it is not divided by


@dataclass(frozen=True)
class Factors:
    """The masking's state, and the factors by task, in each tensor where they are by tensor."""

    masking: Any
    by_task: Mapping[str, float] | Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Rescale(Transform):
    """Masks with `masking`, a transform that treats each task alone, and multiplies what is left by Σ|τ| / Σ|m ⊙ τ|.

    The sums go over a `tensor` or over the whole `vector`; a masking that looks at whole vectors needs the latter.
    """

    masking: Transform
    scope: Literal["vector", "tensor"] = "tensor"

    def requires(self) -> MaskedSums:
        """Both sums, after what the masking asks for."""
        return MaskedSums(masking=self.masking, per_tensor=self.scope == "tensor")

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> Factors:
        """The masking's state, and the factors."""
        if isinstance(result, Masked):
            return Factors(self.masking.prepare(result.found, tasks), _factors(result, tasks))
        found = {name: masked.found for name, masked in result.items()} if self.masking.requires() is not None else None
        return Factors(self.masking.prepare(found, tasks), {name: _factors(masked, tasks) for name, masked in result.items()})

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """That of the masking."""
        return self.masking.cost(shape, tasks)

    def compiles(self, site: Site) -> bool:
        """Where the masking does."""
        return self.masking.compiles(site)

    def program(self, state: Factors, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [*self.masking.program(state.masking, site, element), Op("weigh", by_task=tuple(self._of(state, site)))]

    def apply(self, stack: Float[Tensor, "task *block"], state: Factors, site: Site) -> Float[Tensor, "task *block"]:
        """A block, masked and rescaled."""
        masked = self.masking.apply(stack, state.masking, site)
        return torch.stack([row * factor for row, factor in zip(masked, self._of(state, site), strict=True)])

    def _of(self, state: Factors, site: Site) -> list[float]:
        """The factors at a tensor."""
        factors: Any = state.by_task[site.name] if self.scope == "tensor" else state.by_task
        return [factors[task] for task in site.tasks]


def _factors(masked: Masked, tasks: tuple[str, ...]) -> dict[str, float]:
    """By task; 1 where a sum is too small to tell."""
    assert masked.sums is not None
    return {
        task: before / after if min(before, after) >= LEAST else 1.0
        for task, (before, after) in zip(tasks, masked.sums.tolist(), strict=True)
    }
