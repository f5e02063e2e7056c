"""The Gram matrix of the task vectors, ⟨τ_i, τ_j⟩, of whole vectors or of each tensor, accumulated in float64."""

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
class Gram(Statistic):
    """G of shape `[task, task]`, float64; `per_tensor` gives one a tensor.

    Exactness: products of two float32 numbers are exact in float64, so only the sum rounds.
    """

    per_tensor: bool = False

    def add(
        self, total: Float[Tensor, "task task"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: None
    ) -> Float[Tensor, "task task"]:
        """Add a block's inner products."""
        rows = stack.reshape(stack.shape[0], -1).double()
        gram = rows @ rows.T
        return gram if total is None else total + gram

    def fold(self, total: Float[Tensor, "task task"], other: Float[Tensor, "task task"]) -> Float[Tensor, "task task"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Float[Tensor, "task task"], seen: None) -> Float[Tensor, "task task"]:
        """Symmetric to the last bit."""
        return (total + total.T) / 2

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round."""
        return ("gram",)

    def from_compiled(self, result: Result, site: Site, seen: None) -> Float[Tensor, "task task"]:
        """A tensor's total, from the loop's upper triangle."""
        assert result.gram is not None
        upper = torch.from_numpy(result.gram)
        return upper + upper.T - torch.diag(upper.diagonal())

    def memory(self, tasks: int, elements: int) -> int:
        """K² numbers, for each tensor if asked so."""
        return 8 * tasks * tasks * (512 if self.per_tensor else 1)


def row_grams(stack: Float[Tensor, "task row *rest"]) -> Float[Tensor, "row task task"]:
    """One Gram matrix an output row, in float64."""
    rows = stack.reshape(stack.shape[0], stack.shape[1], -1).double().transpose(0, 1)
    return rows @ rows.transpose(1, 2)


def cosines(gram: Float[Tensor, "*batch task task"]) -> Float[Tensor, "*batch task task"]:
    """Cosine similarities from a Gram matrix; a zero vector has cosine 0 with all others."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
    return (gram * scale[..., :, None] * scale[..., None, :]).clamp(-1, 1)
