r"""DC-Merge: write all tasks in one pair of orthonormal bases, and let the strongest entries there agree on a sign.

Improving Model Merging with Directional Consistency, Zhang et al., CVPR 2026, <https://arxiv.org/abs/2603.06242>. As in TSV-M each τ_i keeps
⌊min(d_out, d_in) / K⌋ singular vectors, and those of all tasks are made orthonormal: P and Q. Then M_i = Pᵀ τ_i Q, of which the largest entries
stay; entry by entry the sign of the sum is elected and the entries that agree are averaged; of the result the K diagonal blocks, a task's own
directions each, give τ = P M Qᵀ. Before that the singular values may be smoothed: the authors do so for LoRA (`average`, or `linear` with ρ = 5,
the better of the two by backbone: linear for ViT-B/32, average for B/16 and L/14), and not for full fine-tuning.

Ours is the authors' code (Tobeginwith/DC-Merge; there rank 16 stands for LoRA) with one departure. It keeps 0.1 % of the (K r)² entries, which
is exactly r at its LoRA setting (K = 8, r = 16) and 6 r for ViT-B/32, but a single entry of a small matrix: here never fewer than r, so that
one task alone comes back whole. All-zero vectors are left out, but count in K. Another port under this name whitens instead: another method.

Use it for LoRA adapters with `rank` at theirs and `smoothing="average"`, or for fully fine-tuned models as it is; λ is meant to be searched on
validation data (the authors: 0.1 to 3). It costs what `tsv_m` costs, and K small matrices more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.methods.fields import Coefficient, Elsewhere, Rank, SplitFused, Tensors, Within
from thetau.methods.reductions import DisjointMean, Scale
from thetau.methods.registry import register
from thetau.methods.spectra import Factors, begun, factoring, factoring_memory, procrustes
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream
from thetau.transforms import Elect

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHARE = 1e-3  # of the entries of M_i, as the authors have it


@register("dc_merge", paper="Zhang et al., CVPR 2026, https://arxiv.org/abs/2603.06242")
@dataclass(frozen=True, kw_only=True)
class DcMerge(Method, StreamReduction):
    r"""$\tau = \lambda\,P\,\mathrm{blockdiag}_K(M)\,Q^\top$, $M$ the elected mean of the largest entries of all $P^\top \hat\tau_i Q$.

    - `rank`: r, singular vectors of each task: the smaller dimension's K-th part (`full`; None says the same), as many of those as its
      spectrum asks for (`auto`), a number, or a share of the smaller dimension.
    - `smoothing`: what becomes of a task's singular values, their sum kept: `none`, all alike (`average`), or falling evenly (`linear`).
    - `rho`: ρ, the largest ratio of the first to the last singular value under `linear`.
    - `keep`: entries of each M_i that are kept, in units of r; None for 0.1 % of all, but at least r.
    """

    rank: Annotated[int | float | str | None, Rank(("auto", "full"))] = None
    smoothing: Literal["none", "average", "linear"] = "none"
    rho: Annotated[float, Within("[1, inf)")] = 5.0
    keep: Annotated[float | None, Within("(0, inf)", none="for 0.1 % of all")] = None
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False
    suits: ClassVar[tuple[str, ...]] = ("lora",)

    def chain(self) -> Chain:
        """Truncate, cover, elect in the covers; then λ."""
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
        factors.take(vector, stream("dc", *site.tasks, site.name))
        return factors

    def result(self, factors: Factors, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The elected mean of the tasks in their covers."""
        if not factors.left:
            return torch.zeros(factors.shape)
        p, q = factors.covers()
        seen = torch.stack(
            [
                strongest((p.T @ u * smoothed(s, self.smoothing, self.rho)) @ (q.T @ v).T, self._kept(p.shape[1], len(s)))
                for u, s, v in zip(factors.left, factors.values, factors.right, strict=True)
            ]
        )
        merged = DisjointMean().reduce(Elect().apply(seen, 0.0, site), None, site)
        return p @ (merged * blocks([len(s) for s in factors.values])) @ q.T

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries = d_out * d_in
        build, width = factoring((d_out, d_in), self.rank, tasks)
        cores = 2.0 * width**2 * (d_out + d_in + width)
        flops = build + procrustes(shape, width) + cores + 2.0 * width * (entries + width * d_out)
        memory = 5 * width * (d_out + d_in) + 3 * entries + factoring_memory(shape, self.rank, width) + (3 * tasks + 4) * width**2
        return Cost(flops=flops, memory=4 * memory)

    def _kept(self, width: int, rank: int) -> int:
        """Entries of a matrix of that width."""
        count = max(rank, int(SHARE * width**2)) if self.keep is None else max(1, int(self.keep * rank))
        return min(width**2, count)


def smoothed(values: Float[Tensor, " r"], smoothing: str, rho: float) -> Float[Tensor, " r"]:
    """Singular values with the same sum and another fall."""
    match smoothing:
        case "average":
            return values.mean().expand_as(values)
        case "linear":
            ratio = min(rho, float(values[0] / values[-1])) if float(values[-1]) > 0 else rho
            fall = torch.linspace(ratio, 1, len(values), dtype=values.dtype)
            return values.sum() * fall / fall.sum()
        case _:
            return values


def strongest(matrix: Float[Tensor, "a b"], count: int) -> Float[Tensor, "a b"]:
    """The entries that are at least as large as the `count` largest, zeros elsewhere."""
    cut = matrix.abs().flatten().topk(count).values[-1]
    return matrix.where(matrix.abs() >= cut, 0)


def blocks(sizes: list[int]) -> Float[Tensor, "all all"]:
    """Ones in square blocks along the diagonal."""
    of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (of[:, None] == of).float()
