"""Squared norms of the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.engine.kernels import Result
from thetau.parts import Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SquaredNorms(Statistic):
    """‖τ_t‖² of shape `[task]`, float64; `per_tensor` gives one vector of norms a tensor."""

    per_tensor: bool = False

    def add(
        self, total: Float[Tensor, " task"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: None
    ) -> Float[Tensor, " task"]:
        """Add a block's squares."""
        squares = stack.reshape(stack.shape[0], -1).double().square().sum(1)
        return squares if total is None else total + squares

    def fold(self, total: Float[Tensor, " task"], other: Float[Tensor, " task"]) -> Float[Tensor, " task"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Float[Tensor, " task"], seen: None) -> Float[Tensor, " task"]:
        """The sum itself."""
        return total

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round: squared norms are the diagonal of the Gram matrix."""
        return ("gram",)

    def from_compiled(self, result: Result, site: Site, seen: None) -> Float[Tensor, " task"]:
        """A tensor's total."""
        assert result.gram is not None
        return torch.from_numpy(result.gram).diagonal().clone()

    def memory(self, tasks: int, elements: int) -> int:
        """K numbers, for each tensor if asked so."""
        return 8 * tasks * (512 if self.per_tensor else 1)
