r"""CART: centre the models at their mean, keep the strong directions of each residual, and add them back.

Revisiting Weight Averaging for Model Merging, Choi et al. 2024, <https://arxiv.org/abs/2412.12153>:
θ̄ + λ Σ_i SVD_k(θ_i − θ̄), where k is 8 % of full rank. Residuals of all tasks cancel one another; their leading directions do not. Ours follows
the authors of Core Space (apanariello4/core-space-merging, with k = 4 % rounded up and λ = 0.1), since the paper's own code cannot be had and λ
is not told; another port takes 50 % and 0.5. With λ = 1, ours, every residual comes in as large as it is, as `tsv_m` has it: tune `residual`. What
is no matrix is averaged, which is the same formula without a residual.

Use it for fully fine-tuned models where plain averaging is nearly good enough and λ can be tuned on held-out data. It costs one truncated
decomposition a task and matrix, and holds all tasks' vectors of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Annotated

from thetau._lazy import torch
from thetau.linalg.svd import truncated_svd
from thetau.methods.fields import Coefficient, Elsewhere, Rank, SplitFused, Tensors
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectra import rank_of, truncating
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(kw_only=True)
class Held:
    """Every task's vector by the task's name, since the mean is known only when all are there; zeros as None."""

    shape: tuple[int, int]
    vectors: dict[str, Tensor | None] = field(default_factory=dict)


@register("cart", paper="Choi et al. 2024, https://arxiv.org/abs/2412.12153")
@dataclass(frozen=True, kw_only=True)
class Cart(Method, StreamReduction):
    r"""$\tau = \lambda\,(\bar\tau + \lambda_r \sum_i \mathrm{SVD}_k(\tau_i - \bar\tau))$, $\bar\tau$ the mean of the task vectors.

    - `rank`: k, singular vectors of each residual: a number, a share of the smaller dimension, or None for its K-th part.
    - `residual`: λ_r, what the sum of the low-rank residuals is multiplied by; the paper's λ.
    """

    rank: Annotated[int | float | None, Rank()] = 0.08
    residual: float = 1.0
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """Centre, truncate, add; then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Held:
        """Nothing yet."""
        return Held(shape=(d_out, d_in))

    def add(self, held: Held, vector: Float[Tensor, "d_out d_in"], site: Site) -> Held:
        """Take in one task."""
        (task,) = site.tasks
        held.vectors[task] = vector.clone() if bool(vector.any()) else None
        return held

    def result(self, held: Held, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The mean and the low-rank residuals."""
        mean = torch.zeros(held.shape)
        for vector in held.vectors.values():
            if vector is not None:
                mean += vector / len(held.vectors)
        total = torch.zeros(held.shape)
        rank = rank_of(self.rank, min(held.shape), len(held.vectors), ceil)
        for task, vector in held.vectors.items():
            centred = -mean if vector is None else vector - mean
            if bool(centred.any()):
                u, s, v = truncated_svd(centred, rank, stream("cart", task, site.name))
                total += (u * s) @ v.T
        return mean.add_(total, alpha=self.residual)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries, small = d_out * d_in, min(d_out, d_in)
        rank = rank_of(self.rank, small, tasks, ceil)
        flops = tasks * (truncating(shape, rank) + 2.0 * rank * entries)
        return Cost(flops=flops, memory=4 * ((tasks + 6) * entries + 4 * small**2))
