r"""DOGE-TA: task arithmetic on vectors that share one correction, made outside the space that all tasks use.

Wei et al., ICML 2025, <https://arxiv.org/abs/2501.01230>, read in FusionBench's `doge_ta` (54c9e8c). In each linear weight of the blocks, with
λ_i = η/‖τ_i‖, δ minimises Σ_j Σ_r ⟨v_jr, v_jr − Σ_i λ_i(v_ir + δ_r)⟩², v_jr being row r of τ_j, by 400 steps of Adam (lr 1e-4) from 0, each gradient
G replaced by G − PG: P projects on the leading min(d_out, d_in)/6 left singular vectors of [U_1 … U_K], U_i being the leading K-th part of those of τ_i.
Then τ = Σ λ_i mask_i ⊙ (τ_i + δ), the mask keeping the largest 30 % of |τ_i| over the whole vector. Everything else stays at θ₀.

The objective is a quadratic in every row of δ, whose gradient is a combination of the rows v_jr: it is written down here, and no step goes through
autograd. `solver: cg` goes to its minimum in the same space, by conjugate gradients instead of Adam.

Two scales are fixed, as in that code. λ_i divides by ‖τ_i‖, so that the size of a tensor's vectors does not reach Σ λ_i τ_i: η alone says how far
the merged model goes. And lr and η are absolute, so that scaling all vectors gives another δ. Departs from the code in that an all-zero τ_i, which it
would divide by, counts for nothing (but in K), singular vectors of zeros are left out of P, the mask keeps ⌈30 %⌉ of the entries (it: one
more than ⌊30 %⌋) and no zeros, and one task alone has its own leading vectors in P, where the code's choice among equal singular values is arbitrary.

Use it on several full fine-tunes of one base when task arithmetic interferes; it needs no data, and η or `scale` should be tuned on validation data. It
holds all task vectors of one matrix, and makes a singular value decomposition a task and 400 steps over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from thetau._lazy import torch
from thetau.linalg.descent import descend
from thetau.linalg.rounding import PIECE
from thetau.linalg.svd import seen, svd, truncated_flops, truncated_svd
from thetau.methods.fields import AtLeast, Coefficient, Density, Elsewhere, Positive, SplitFused, Tensors, Within
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Method, Selection, Site, WholeReduction
from thetau.random import stream
from thetau.statistics import MagnitudeQuantile
from thetau.statistics.gram import row_grams
from thetau.transforms import Trim

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("doge_ta", paper="Wei et al., ICML 2025, https://arxiv.org/abs/2501.01230")
@dataclass(frozen=True, kw_only=True)
class DogeTa(Method, WholeReduction):
    r"""$\tau = \lambda \sum_i \lambda_i\, m_i \odot (\tau_i + \delta)$ with $\lambda_i = \eta/\|\tau_i\|$, δ shared, $m_i$ the largest entries of $\tau_i$.

    - `density`: share of each whole task vector's entries that is kept.
    - `eta`: η, the norm to which each tensor of each task is scaled; it counts in δ, unlike `scale`.
    - `subspace`: P has the smaller dimension divided by this for its rank.
    - `solver`: `adam` (as FusionBench) or `cg` (conjugate gradients, to the minimum).
    - `steps`: steps of Adam, the most of conjugate gradients.
    - `lr`: Adam's lr, absolute.
    - `tolerance`: `cg` stops when the gradient is down to this share of its first norm.
    """

    density: Density = 0.3
    eta: Positive = 0.07
    subspace: Annotated[int, AtLeast(1)] = 6
    solver: Literal["adam", "cg"] = "adam"
    steps: Annotated[int, AtLeast(0)] = 400
    lr: Positive = 1e-4
    tolerance: Annotated[float, Within("[1e-6, 1]")] = 1e-3  # below, rounding leads conjugate gradients astray
    scale: Coefficient = 1.0
    tensors: Tensors = "linear"
    elsewhere: Elsewhere = "base"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """δ, masks and weighted sum, then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def requires(self) -> MagnitudeQuantile | None:
        """The cuts of the masks."""
        return self._trim.requires()

    def prepare(self, result: object, tasks: tuple[str, ...]) -> object:
        """The cuts by task."""
        return self._trim.prepare(result, tasks)

    def reduce(self, stack: Float[Tensor, "task *shape"], state: Any, site: Site) -> Float[Tensor, "*shape"]:
        """The merged tensor."""
        norms = [float(vector.double().norm()) for vector in stack]
        weights = [self.eta / norm if norm > 0 else 0.0 for norm in norms]
        if not any(weights):
            return torch.zeros_like(stack[0])
        matrices = stack.float().reshape(len(stack), stack.shape[1] if stack.ndim > 1 else 1, -1)
        problem = Rows.of(matrices, weights, self._projector(matrices, site))
        delta = problem.by_adam(self.steps, self.lr) if self.solver == "adam" else problem.by_cg(self.steps, self.tolerance)
        merged = torch.zeros_like(stack[0])
        for index, (task, weight) in enumerate(zip(site.tasks, weights, strict=True)):
            kept = self._trim.apply(stack[index : index + 1], state, replace(site, tasks=(task,)))[0] != 0
            merged.add_((stack[index] + delta.reshape(merged.shape)).mul_(kept), alpha=weight)
        return merged

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations, and memory for a copy of the stack, the decompositions, and δ with Adam's or the conjugate gradients' state."""
        d_out = shape[0] if shape else 1
        entries = int(torch.Size(shape).numel())
        d_in = entries // max(1, d_out)
        small = min(d_out, d_in)
        rank = small // self.subspace
        step = 4.0 * (tasks + rank) * entries + 20.0 * entries
        decompose = tasks * truncated_flops(d_out, d_in, max(1, small // tasks)) + 26.0 * d_out * small**2
        memory = (tasks + 9) * entries + 8 * small**2 + 4 * d_out * small
        return Cost(flops=decompose + self.steps * step, memory=4 * memory)

    @property
    def _trim(self) -> Trim:
        return Trim(density=self.density)

    def _projector(self, matrices: Float[Tensor, "task d_out d_in"], site: Site) -> Float[Tensor, "d_out rank"]:
        """An orthonormal basis of what P projects on."""
        d_out, d_in = matrices.shape[1:]
        each, rank = max(1, min(d_out, d_in) // len(matrices)), min(d_out, d_in) // self.subspace
        bases = []
        for task, matrix in zip(site.tasks, matrices, strict=True):
            if bool(matrix.any()):
                u, s, _ = truncated_svd(matrix, each, stream("doge_ta", task, site.name))
                bases.append(u[:, : seen(s, s, (d_out, d_in))])
        if len(bases) == 1:
            return bases[0][:, :rank]
        u, s, _ = svd(torch.cat(bases, 1))
        return u[:, : min(rank, seen(s, s, (d_out, d_in)))]


@dataclass(frozen=True)
class Rows:
    """DOGE's objective in δ `[d_out, d_in]`: Σ_r Σ_j (t_jr − Λ ⟨v_jr, δ_r⟩)², Λ being Σ λ_i.

    `rows` are the v_jr, by row; `target` t_jr = ⟨v_jr, v_jr − Σ_i λ_i v_ir⟩; `avoid` is an orthonormal basis of P.
    """

    rows: Float[Tensor, "d_out task d_in"]
    target: Float[Tensor, "d_out task"]
    total: float
    avoid: Float[Tensor, "d_out rank"]

    @staticmethod
    def of(matrices: Float[Tensor, "task d_out d_in"], weights: list[float], avoid: Float[Tensor, "d_out rank"]) -> Rows:
        """The objective for these task vectors and λ_i."""
        gram = torch.cat([row_grams(piece) for piece in torch.split(matrices, PIECE, dim=1)])
        target = gram.diagonal(dim1=1, dim2=2) - gram @ torch.tensor(weights, dtype=gram.dtype)
        return Rows(matrices.transpose(0, 1).contiguous(), target.float(), sum(weights), avoid)

    def by_adam(self, steps: int, lr: float) -> Float[Tensor, "d_out d_in"]:
        """δ after so many steps of Adam."""
        delta = torch.zeros(len(self.rows), self.rows.shape[2], requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=lr, fused=True)
        with torch.no_grad():
            for _ in range(steps):
                left = self.target - self.total * self.along(delta)
                delta.grad = self.outside(self.across(left)).mul_(-2 * self.total)
                optimiser.step()
        return delta.detach()

    def by_cg(self, steps: int, tolerance: float) -> Float[Tensor, "d_out d_in"]:
        """The shortest δ of the smallest objective, in what is left of the space without P."""
        return descend(
            lambda x: self.outside(self.across(self.along(x))),
            self.outside(self.across(self.target / self.total)),
            iterations=steps,
            tolerance=tolerance,
        )

    def along(self, delta: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out task"]:
        """⟨v_jr, δ_r⟩."""
        return torch.bmm(self.rows, delta[:, :, None])[:, :, 0]

    def across(self, coefficients: Float[Tensor, "d_out task"]) -> Float[Tensor, "d_out d_in"]:
        """Σ_j coefficient_jr v_jr, row by row."""
        return torch.bmm(coefficients[:, None, :], self.rows)[:, 0]

    def outside(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """G − PG."""
        return torch.addmm(gradient, self.avoid, self.avoid.T @ gradient, alpha=-1)
