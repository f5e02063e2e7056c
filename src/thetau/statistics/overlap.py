"""How many of a task's changed entries other tasks changed too, and how many it changed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.parts import Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OverlapCounts(Statistic):
    """Int64 of shape `[task, 2]`, shared and unique, of entries that are not zero; `per_tensor` gives one such a tensor."""

    per_tensor: bool = False

    def add(
        self, total: Int[Tensor, "task 2"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: None
    ) -> Int[Tensor, "task 2"]:
        """Add a block's counts."""
        changed = (stack != 0).reshape(len(stack), -1)
        by_entry = changed.sum(0)
        counts = torch.stack([(changed & (by_entry > 1)).sum(1), (changed & (by_entry == 1)).sum(1)], 1)
        return counts if total is None else total + counts

    def fold(self, total: Int[Tensor, "task 2"], other: Int[Tensor, "task 2"]) -> Int[Tensor, "task 2"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Int[Tensor, "task 2"], seen: None) -> Int[Tensor, "task 2"]:
        """The sum itself."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """Two numbers a task, for each tensor if asked so."""
        return 16 * tasks * (512 if self.per_tensor else 1)
