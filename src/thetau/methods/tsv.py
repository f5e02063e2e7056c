r"""TSV-M: of each task a K-th of the singular vectors, made orthogonal to one another.

Task Singular Vectors, Gargiulo et al., CVPR 2025, <https://arxiv.org/abs/2412.00081>. With τ_i ≈ U_i S_i V_iᵀ of rank
⌊min(d_out, d_in) / K⌋, the columns of [U_1 … U_K] and [V_1 … V_K] are each replaced by the nearest orthonormal ones (orthogonal Procrustes,
their polar factors), and the singular values are kept: Σ τ_i without interference. As in the authors' code, it acts on every tensor of two
dimensions, embeddings among them; all others are averaged, and α = 1. Departs from it for an all-zero task vector, whose singular vectors
would be arbitrary: it is left out, but counts in K. Directions that a vector, or all of them together, do not have are left out likewise.

Departs from the paper by default: a task whose leading vectors hold 70 % of its energy gives no more than those, found by a random sketch in
a few products; one of low rank, as LoRA's, gives all (`rank: auto`, no worse where it was measured: docs/sketches.md). `rank: full` is the paper's.

Use it for fully fine-tuned models of one base where tasks disturb one another and nothing can be tuned: λ = 1 is meant. With `full` it costs
one eigendecomposition of the smaller side a task and matrix, and two more of the vectors together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from thetau._lazy import torch
from thetau.methods.fields import Coefficient, Elsewhere, Rank, SplitFused, Tensors
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectra import Factors, begun, factoring, factoring_memory, procrustes
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("tsv_m", paper="Gargiulo et al., CVPR 2025, https://arxiv.org/abs/2412.00081")
@dataclass(frozen=True, kw_only=True)
class TsvM(Method, StreamReduction):
    r"""$\tau = \lambda\,\hat U\,\mathrm{diag}(S_1, \dots, S_K)\,\hat V^\top$, $\hat U$ the nearest orthonormal matrix to $[U_1 \dots U_K]$, $\hat V$ likewise.

    - `rank`: singular vectors of each task: the smaller dimension's K-th part (`full`, as the paper has it; None says the same), as many of
      those as its spectrum asks for (`auto`), a number, or a share of the smaller dimension.
    """

    rank: Annotated[int | float | str | None, Rank(("auto", "full"))] = "auto"
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """Truncate, orthogonalise, multiply; then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Factors:
        """Nothing yet."""
        return begun((d_out, d_in), self.rank, tasks)

    def add(self, factors: Factors, vector: Float[Tensor, "d_out d_in"], site: Site) -> Factors:
        """Take in one task."""
        factors.take(vector, stream("tsv", *site.tasks, site.name))
        return factors

    def result(self, factors: Factors, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The product of the orthogonalised factors."""
        if not factors.left:
            return torch.zeros(factors.shape)
        u, v = factors.covers()
        return (u * torch.cat(factors.values)) @ v.T

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries = d_out * d_in
        build, width = factoring((d_out, d_in), self.rank, tasks)
        memory = 4 * width * (d_out + d_in) + 3 * entries + factoring_memory(shape, self.rank, width)
        flops = build + procrustes(shape, width) + 2.0 * width * entries
        return Cost(flops=flops, memory=4 * memory)
