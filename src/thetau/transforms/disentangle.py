"""Disentangle: subtract one redundant vector δ from all task vectors, so that they become more orthogonal.

Adaptive Weight Disentanglement (AWD), Xiong et al. 2024, <https://arxiv.org/abs/2411.18729>, Eqs. 11 to 14: δ minimises
mean_{i≠j} |cos(τ_i − δ, τ_j − δ)| + α‖δ‖ from δ = 0. A descent along the gradient, as the paper's (Algorithm 1), stays in
span(τ_1..τ_K), so with δ = Σ c_k τ_k the problem is one in K numbers and the K×K Gram matrix (`awd_gram`). Elementwise-adaptive optimisers
such as Adam leave the span and land elsewhere: `solver="adam"` is that, in full dimension and with all vectors in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from thetau._lazy import torch
from thetau.parts import Cost, Op, Site, Transform
from thetau.statistics import Collect, Gram
from thetau.statistics.gram import row_grams
from thetau.sums import weighted_sum
from thetau.transforms.awd_adam import FullDelta, full_dimension
from thetau.transforms.awd_gram import Disentangled, solve, solve_batch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Disentangle(Transform):
    """τ̂_i = τ_i − δ. An all-zero task vector stays zero and takes no part in δ.

    - `alpha`: weight of ‖δ‖ (the paper tunes it in 1e-2 … 1e-6).
    - `scope`: one δ for the whole `vector` (the paper), or with its own objective for each `tensor` or output `row`.
    - `solver`: `gram` or `adam`; `steps` and `lr` belong to `adam`, the lr in units of the entries' rms.
    - `reverse`: make the vectors *less* orthogonal (Tables 6 and 7).
    """

    alpha: float = 1e-3
    scope: Literal["vector", "tensor", "row"] = "vector"
    solver: Literal["gram", "adam"] = "gram"
    reverse: bool = False
    steps: int = 200
    lr: float = 0.01
    per_task: ClassVar[bool] = False

    def requires(self) -> Gram | Collect | None:
        """The Gram matrix; nothing by row, where a block holds all that counts; everything for Adam."""
        if self.solver == "adam":
            return Collect()
        return None if self.scope == "row" else Gram(per_tensor=self.scope == "tensor")

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """δ: its K coefficients (by tensor), or its entries by tensor."""
        if self.solver == "adam":
            assert isinstance(result, dict)
            return full_dimension(result, alpha=self.alpha, scope=self.scope, reverse=self.reverse, steps=self.steps, lr=self.lr)
        if isinstance(result, dict):
            return {name: solve(gram, self.alpha, reverse=self.reverse) for name, gram in result.items()}
        return solve(result, self.alpha, reverse=self.reverse) if isinstance(result, torch.Tensor) else None

    def solving(self, tasks: int, elements: Sequence[int]) -> Cost:
        """Adam in full dimension goes over all vectors in every step, and holds them, their copy and two gradients at once."""
        if self.solver != "adam":
            return Cost()
        count = sum(elements) if self.scope == "vector" else max(elements, default=0)
        flops = self.steps * sum(elements) * (6.0 * tasks**2 + 200.0 * tasks)  # elementwise work is far slower than products
        return Cost(flops=flops, memory=4 * count * (6 * tasks + 4))

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One small problem a row: some 60 damped steps, from three starts, over matrices of K × K pairs."""
        if self.scope != "row" or self.solver == "adam":
            return Cost()
        rows = shape[0] if shape else 1
        return Cost(flops=3 * 60.0 * rows * 40.0 * tasks**3, memory=8 * rows * 6 * tasks**3)

    def compiles(self, site: Site) -> bool:
        """Where δ is one combination of the vectors for the whole tensor."""
        return self.solver == "gram" and self.scope != "row"

    def program(self, state: object, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        found = state[site.name] if isinstance(state, Mapping) else state
        assert isinstance(found, Disentangled)
        return [Op("disentangle", by_task=tuple(found.coefficients), keys=tuple(map(int, found.alive)))]

    def apply(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "task *block"]:
        """Subtract δ from every task that is not zero."""
        if self.solver == "adam":
            assert isinstance(state, FullDelta)
            delta = state.entries[site.name][site.start : site.start + stack.shape[1]]
            mask = state.alive[site.name]  # [task, 1], or [task, row]
            mask = mask if mask.shape[1] == 1 else mask[:, site.start : site.start + stack.shape[1]]
            return torch.where(mask.reshape(*mask.shape, *[1] * (stack.ndim - 2)), stack - delta, stack)
        if self.scope == "row":
            return self._by_row(stack)
        found = state[site.name] if isinstance(state, Mapping) else state
        assert isinstance(found, Disentangled)
        delta = weighted_sum(stack, found.coefficients)
        out = stack.clone()
        for row, alive in zip(out, found.alive, strict=True):
            if alive:
                row -= delta
        return out

    def notes(self, state: object) -> list[str]:
        """What δ brought, for the summary. A shared δ cannot make every pair orthogonal: mean and largest |cos| say how near it came."""
        if isinstance(state, Disentangled):
            return [
                f"AWD: mean |cos| {state.mean_before:.4f} → {state.mean_after:.4f}, "
                f"largest {state.max_before:.4f} → {state.max_after:.4f}, ‖δ‖ = {state.norm:.4g}."
            ]
        if isinstance(state, Mapping):
            found = [part for part in state.values() if isinstance(part, Disentangled)]
            before, after = (sum(getattr(part, key) for part in found) / len(found) for key in ("mean_before", "mean_after"))
            return [f"AWD: mean |cos| {before:.4f} → {after:.4f}, averaged over {len(found)} tensors."]
        return []

    def _by_row(self, stack: Float[Tensor, "task *block"]) -> Float[Tensor, "task *block"]:
        rows = stack.reshape(*stack.shape[:2], -1)
        gram = row_grams(rows)
        coefficients = solve_batch(gram, self.alpha, reverse=self.reverse)
        delta = torch.einsum("rk,krn->rn", coefficients.to(rows.dtype), rows)
        alive = (gram.diagonal(dim1=1, dim2=2) > 0).T[:, :, None]
        return torch.where(alive, rows - delta, rows).reshape(stack.shape)
