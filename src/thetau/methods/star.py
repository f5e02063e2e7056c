r"""STAR: keep the strong directions of each task vector, restore its nuclear norm, and average.

Spectral Truncation And Rescale, Lee et al., NAACL 2025, <https://arxiv.org/abs/2502.10339>. Of each τ_i the fewest leading singular values
that reach the share η of their sum stay, and are stretched to the sum of all. Ours is the authors' code (IBM/STAR) with a whole decomposition;
their way for LoRA, `known_rank`, draws an unseeded sketch, here (`rank`) the sketch is a function of task and tensor alone. As in other
authors' port (lyymuwu/SVC) a tensor that is no matrix is averaged, and an all-zero vector, where the code divides by zero, stays zero.

Use it for LoRA adapters and other vectors of low rank, where there is nothing to tune: η hardly matters. It costs one decomposition a
task and matrix, a cheap one where `rank` is given, and memory for one matrix, whatever the number of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.linalg.sketch import Bits
from thetau.linalg.svd import polar_flops, spectrum, truncated_svd
from thetau.methods.fields import Coefficient, Elsewhere, Portion, Rank, SplitFused, Tensors
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectra import rank_of, truncating
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(kw_only=True)
class Averaged:
    """Σ of the tasks' rescaled vectors, and how many there will be."""

    total: Tensor
    tasks: int


@register("star", paper="Lee et al., NAACL 2025, https://arxiv.org/abs/2502.10339")
@dataclass(frozen=True, kw_only=True)
class Star(Method, StreamReduction):
    r"""$\tau = \frac{\lambda}{K}\sum_i \frac{\|\tau_i\|_*}{\|\hat\tau_i\|_*}\hat\tau_i$, $\hat\tau_i$ of the least rank that keeps η of $\|\tau_i\|_*$.

    - `eta`: η, share of each vector's nuclear norm that is kept.
    - `rank`: rank of the vectors where it is known (LoRA's r), a number or a share of the smaller dimension; None for a whole decomposition.
    """

    eta: Portion = 0.4
    rank: Annotated[int | float | None, Rank()] = None
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False
    suits: ClassVar[tuple[str, ...]] = ("lora",)

    def chain(self) -> Chain:
        """Truncate and rescale each, average; then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Averaged:
        """Nothing yet."""
        return Averaged(total=torch.zeros(d_out, d_in), tasks=tasks)

    def add(self, state: Averaged, vector: Float[Tensor, "d_out d_in"], site: Site) -> Averaged:
        """Take in one task."""
        if bool(vector.any()):
            rank = None if self.rank is None else rank_of(self.rank, min(vector.shape), 1)
            state.total += strongest(vector, self.eta, rank, stream("star", *site.tasks, site.name))
        return state

    def result(self, state: Averaged, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The mean."""
        return state.total / state.tasks

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries, small = d_out * d_in, min(d_out, d_in)
        rank = small if self.rank is None else rank_of(self.rank, small, 1)
        one = (polar_flops(*shape) if self.rank is None else truncating(shape, rank)) + 4.0 * rank * entries
        return Cost(flops=tasks * one, memory=4 * (5 * entries + 4 * small**2))


def strongest(vector: Float[Tensor, "d_out d_in"], eta: float, rank: int | None, bits: Bits) -> Float[Tensor, "d_out d_in"]:
    """The fewest leading singular values that reach η of the nuclear norm, stretched to all of it. The vector must not be zero."""
    if rank is None:
        s, basis = spectrum(vector)
    else:
        u, s, v = truncated_svd(vector, rank, bits)
        s, basis = s.double(), u if len(vector) <= vector.shape[1] else v
    sums = s.cumsum(0)
    kept = min(len(s), int((sums < eta * sums[-1]).sum()) + 1)
    basis, stretch = basis[:, :kept].to(vector), float(sums[-1] / sums[kept - 1])
    if len(vector) <= vector.shape[1]:
        return (basis * stretch) @ (basis.T @ vector)
    return (vector @ (basis * stretch)) @ basis.T
