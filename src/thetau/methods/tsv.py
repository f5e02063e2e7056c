r"""TSV-M: of each task a K-th of the singular vectors, made orthogonal to one another.

Task Singular Vectors, Gargiulo et al., CVPR 2025, <https://arxiv.org/abs/2412.00081>. With τ_i ≈ U_i S_i V_iᵀ of rank
⌊min(d_out, d_in) / K⌋, the columns of [U_1 … U_K] and [V_1 … V_K] are each replaced by the nearest orthonormal ones (orthogonal Procrustes,
through one more SVD), and the singular values are kept: Σ τ_i without interference. As in the authors' code, it acts on every tensor of two
dimensions, embeddings among them; all others are averaged, and α = 1. Departs from it for an all-zero task vector, whose singular vectors
would be arbitrary: it is left out, but counts in K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.svd import orthonormal, truncated_flops, truncated_svd
from thetau.methods.fields import Coefficient, Elsewhere, Rank, SplitFused, Tensors
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream


@dataclass(kw_only=True)
class Parts:
    """The tasks' truncated factors; with rank min / K they are together as large as two matrices, whatever K."""

    shape: tuple[int, int]
    rank: int
    left: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)


@register("tsv_m", paper="Gargiulo et al., CVPR 2025, https://arxiv.org/abs/2412.00081")
@dataclass(frozen=True, kw_only=True)
class TsvM(Method, StreamReduction):
    r"""$\tau = \lambda\,\hat U\,\mathrm{diag}(S_1, \dots, S_K)\,\hat V^\top$, $\hat U$ the nearest orthonormal matrix to $[U_1 \dots U_K]$, $\hat V$ likewise.

    - `rank`: singular vectors of each task: a number, a share of the smaller dimension, or None for its K-th part.
    """

    rank: Annotated[int | float | None, Rank()] = None
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

    def init(self, d_out: int, d_in: int, tasks: int) -> Parts:
        """Nothing yet."""
        return Parts(shape=(d_out, d_in), rank=rank_of(self.rank, min(d_out, d_in), tasks))

    def add(self, parts: Parts, vector: Float[Tensor, "d_out d_in"], site: Site) -> Parts:
        """Take in one task."""
        if bool(vector.any()):
            u, s, v = truncated_svd(vector, parts.rank, stream("tsv", *site.tasks, site.name))
            parts.left.append(u)
            parts.values.append(s)
            parts.right.append(v)
        return parts

    def result(self, parts: Parts, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The product of the orthogonalised factors."""
        if not parts.left:
            return torch.zeros(parts.shape)
        u, v = (orthonormal(torch.cat(side, 1)) for side in (parts.left, parts.right))
        return (u * torch.cat(parts.values)) @ v.T

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries, small = d_out * d_in, min(d_out, d_in)
        r = rank_of(self.rank, small, tasks)
        decompose = truncated_flops(d_out, d_in, r)
        width = tasks * r
        procrustes = 6.0 * width * small * (d_out + d_in) + 40.0 * min(width, small) ** 3
        memory = width * (d_out + d_in) + 6 * entries + 4 * small**2 + 2 * width**2
        return Cost(flops=tasks * decompose + procrustes + 2.0 * width * entries, memory=4 * memory)


def rank_of(rank: int | float | None, small: int, tasks: int) -> int:
    """Singular vectors of each task of a matrix with `small` as its smaller side: a number, a share of it, or by default its K-th part."""
    if rank is None:
        return max(1, small // tasks)
    return min(small, rank if isinstance(rank, int) else max(1, int(rank * small)))
