r"""Iso-C and Iso-CTS: give the sum of the task vectors a flat spectrum.

Isotropic merging, Marczak et al., ICML 2025, <https://arxiv.org/abs/2502.04959>. Iso-C replaces every singular value of Σ τ_i by their mean.
Iso-CTS keeps the leading share of the sum's singular vectors (0.8), fills the rest in equal parts with the leading singular vectors of what
each τ_i has outside that common space, makes both sides orthonormal as TSV-M does, and flattens the spectrum. As in the authors' code, both
act on every tensor of two dimensions, and all others are averaged; their λ is chosen on validation data (published tables: about 1 to 2).
Departs from it where the sum has no full rank, as with LoRA: directions that no task has keep the singular value 0 instead of arbitrary
vectors of the mean one, which is still taken over all of min(d_out, d_in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.svd import decomposed, orthonormal, polar, polar_flops, seen
from thetau.methods.fields import Coefficient, Elsewhere, Portion, SplitFused, Tensors
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectra import polar_cost, procrustes
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("iso_c", paper="Marczak et al., ICML 2025, https://arxiv.org/abs/2502.04959")
@dataclass(frozen=True, kw_only=True)
class IsoC(Method, StreamReduction):
    r"""$\tau = \lambda\,\bar\sigma\,U V^\top$ with $\sum_i \tau_i = U\,\mathrm{diag}(\sigma)\,V^\top$ and $\bar\sigma$ the mean of σ.

    Use it where a few directions that all tasks share drown the others, and λ can be tuned (published tables take 1.5 where they fix it). It
    costs one eigendecomposition of the smaller side a matrix, whatever the number of tasks.
    """

    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """Sum, flatten; then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Tensor:
        """Nothing yet."""
        return torch.zeros(d_out, d_in)

    def add(self, total: Tensor, vector: Float[Tensor, "d_out d_in"], site: Site) -> Tensor:
        """Take in one task."""
        total += vector
        return total

    def result(self, total: Tensor, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The flattened sum."""
        return flattened(total)

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        return polar_cost(shape)


@dataclass(kw_only=True)
class Summed:
    """Σ τ_i; the tasks' vectors too where the common space is not everything, since it is known only when all are there."""

    total: Tensor
    tasks: int
    kept: list[Tensor] = field(default_factory=list)


@register("iso_cts", paper="Marczak et al., ICML 2025, https://arxiv.org/abs/2502.04959")
@dataclass(frozen=True, kw_only=True)
class IsoCts(Method, StreamReduction):
    r"""$\tau = \lambda\,\bar\sigma\,\hat U \hat V^\top$, $\hat U$ and $\hat V$ from the common space of $\sum_i \tau_i$ and each task's own part outside it.

    Use it instead of `iso_c` for many or very different tasks, whose own directions their sum hides. It costs an eigendecomposition
    of the smaller side a task and matrix and three more, and holds all tasks' vectors of a matrix.

    - `common`: share of the singular vectors that the common space keeps.
    """

    common: Portion = 0.8
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """Common space, the tasks' own, flatten; then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Summed:
        """Nothing yet."""
        return Summed(total=torch.zeros(d_out, d_in), tasks=tasks)

    def add(self, state: Summed, vector: Float[Tensor, "d_out d_in"], site: Site) -> Summed:
        """Take in one task."""
        state.total += vector
        if self._own(min(vector.shape), state.tasks) and bool(vector.any()):
            state.kept.append(vector.clone())
        return state

    def result(self, state: Summed, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The flattened sum of what the tasks share and what each has alone."""
        own = self._own(min(state.total.shape), state.tasks)
        if own == 0 or not bool(state.total.any()):
            return flattened(state.total)
        small = min(state.total.shape)
        common = max(0, small - own * state.tasks)
        u, s, v = (part.to(state.total) for part in decomposed(state.total, max(1, common)))
        top, (u, s, v) = s[:1], (u[:, :common], s[:common], v[:, :common])
        left, values, right = [u], [s], [v]
        for vector in state.kept:
            a, b, c = (part.to(vector) for part in decomposed(vector - u @ (u.T @ vector), own))
            rank = seen(b, top, vector.shape)
            left.append(a[:, :rank])
            values.append(b[:rank])
            right.append(c[:, :rank])
        flat = float(torch.cat(values).sum()) / small
        return flat * orthonormal(torch.cat(left, 1)) @ orthonormal(torch.cat(right, 1)).T

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        entries, small = shape[0] * shape[1], min(shape)
        if not self._own(small, tasks):
            return polar_cost(shape)
        flops = (tasks + 1) * polar_flops(*shape) + procrustes(shape, small) + 4.0 * (tasks + 1) * small * entries
        return Cost(flops=flops, memory=4 * ((tasks + 8) * entries + 12 * small**2))

    def _own(self, small: int, tasks: int) -> int:
        """Singular vectors of each task's own part."""
        return round((small - int(small * self.common)) / tasks)


def flattened(total: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The mean singular value in every direction that is there."""
    if not bool(total.any()):
        return torch.zeros_like(total)
    nearest, s = polar(total)
    return nearest.mul_(float(s.double().sum()) / min(total.shape))
