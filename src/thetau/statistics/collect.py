"""The whole stack, kept: for solvers that work in full dimension. It needs all task vectors in memory, and the plan says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.parts import Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Collect(Statistic):
    """Every tensor's stack `[task, *shape]`, by name."""

    per_tensor: bool = True

    def add(self, total: list[Tensor] | None, stack: Float[Tensor, "task *block"], site: Site, seen: None) -> list[Tensor]:
        """Keep a block."""
        return [*(total or []), stack.clone()]

    def fold(self, total: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: list[Tensor], seen: None) -> Tensor:
        """The blocks of one tensor, joined."""
        return torch.cat(total, dim=1) if total[0].ndim > 1 else total[0]

    def memory(self, tasks: int, elements: int) -> int:
        """The blocks of one tensor, and what they are joined to."""
        return 4 * tasks * elements * 2

    def held(self, tasks: int, elements: Sequence[int]) -> int:
        """Everything."""
        return 4 * tasks * sum(elements)
