"""Coefficients by inverse norm: a short task vector counts as much as a long one.

An option of ours, without a paper: λ_t is proportional to 1/‖τ_t‖, so that every task moves the merged model equally far, and what the
coefficients add up to is `scale`. A task whose vector is all zero gets none.

Use it where tasks were trained for very different times or with different rates, and the longest vector would drown the others; it
costs two passes over the inputs, and needs a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.methods.fields import Coefficient, Ranked
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Op, Site
from thetau.statistics import SquaredNorms
from thetau.sums import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EqualLengths(BlockReduction):
    """Σ λ_t τ_t with λ_t ∝ 1/‖τ_t‖ and Σ λ_t = 1; lengths of whole vectors, or of each tensor."""

    per_tensor: bool

    def requires(self) -> SquaredNorms:
        """The lengths."""
        return SquaredNorms(per_tensor=self.per_tensor)

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> Any:
        """The coefficients, by tensor where lengths are."""
        return {name: shares(squares) for name, squares in result.items()} if self.per_tensor else shares(result)

    def reduce(self, stack: Float[Tensor, "task *block"], state: Any, site: Site) -> Float[Tensor, "*block"]:
        """The weighted sum of a block."""
        return weighted_sum(stack, self._of(state, site))

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: Any, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("sum", by_task=tuple(self._of(state, site)))]

    def _of(self, state: Any, site: Site) -> list[float]:
        found: list[float] = state[site.name] if self.per_tensor else state
        return found


def shares(squares: Float[Tensor, " task"]) -> list[float]:
    """1/‖τ_t‖ over their sum; 0 for a vector of no length, and for all where there is no other."""
    inverse = torch.where(squares > 0, squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
    total = inverse.sum()
    found: list[float] = (inverse / total if total > 0 else inverse).tolist()
    return found


@register("inverse_norm", paper="ours, after Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089")
@dataclass(frozen=True, kw_only=True)
class InverseNorm(Method):
    r"""$\tau = \lambda \sum_t \frac{1/\|\tau_t\|}{\sum_s 1/\|\tau_s\|} \tau_t$.

    - `lengths`: of what: of the whole `vector`, or of each `tensor`.
    - `scale`: λ, what the coefficients add up to; a number, or one a pattern of tensor names (`per_pattern`).
    """

    lengths: Ranked = "vector"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """A weighted sum, scale."""
        return Chain(reduction=EqualLengths(per_tensor=self.lengths == "tensor"), post=(Scale(scale=self.scale),))
