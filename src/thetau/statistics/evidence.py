"""Sums of squares of a kind of evidence, over everything that a chain acts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.parts import Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EvidenceSquares(Statistic):
    """Σ e² of each task and the number of its entries, float64 `[task, 2]`."""

    kind: str

    def add(
        self, total: Float[Tensor, "task 2"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: None
    ) -> Float[Tensor, "task 2"]:
        """Add a block's squares."""
        entries = site.evidence[self.kind].reshape(len(site.tasks), -1)
        squares = entries.double().square().sum(1)
        found = torch.stack([squares, torch.full_like(squares, entries.shape[1])], 1)
        return found if total is None else total + found

    def fold(self, total: Float[Tensor, "task 2"], other: Float[Tensor, "task 2"]) -> Float[Tensor, "task 2"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Float[Tensor, "task 2"], seen: None) -> Float[Tensor, "task 2"]:
        """The sums themselves."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """Two numbers a task."""
        return 16 * tasks
