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
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.svd import svd
from thetau.methods.checks import flag, number, varying
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.tsv import orthonormal
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction, Varying, check_selection

EPS = torch.finfo(torch.float32).eps


@register("iso_c", paper="Marczak et al., ICML 2025, https://arxiv.org/abs/2502.04959")
@dataclass(frozen=True, kw_only=True)
class IsoC(Method):
    r"""$\tau = \lambda\,\bar\sigma\,U V^\top$ with $\sum_i \tau_i = U\,\mathrm{diag}(\sigma)\,V^\top$ and $\bar\sigma$ the mean of σ.

    - `scale`: λ; a number, or one a pattern of tensor names.
    - `tensors`: what it acts on: `matrices` (tensors of two dimensions), `linear` (weights of the blocks), `all`, or patterns of names.
    - `elsewhere`: what other tensors get: `base` (θ₀), `mean` or `sum` of the task vectors.
    - `split_fused`: merge fused q/k/v as the three matrices that they are.
    """

    scale: Varying = 1.0
    tensors: str | tuple[str, ...] = "matrices"
    elsewhere: Literal["base", "mean", "sum"] = "mean"
    split_fused: bool = False

    def __post_init__(self) -> None:
        varying("IsoC", "scale", self.scale, tasks=False)
        check_selection("IsoC", self.tensors, self.elsewhere)
        flag("IsoC", "split_fused", self.split_fused)

    def chain(self) -> Chain:
        """Sum, flatten; then λ."""
        return Chain(
            reduction=Isotropic(),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )


@register("iso_cts", paper="Marczak et al., ICML 2025, https://arxiv.org/abs/2502.04959")
@dataclass(frozen=True, kw_only=True)
class IsoCts(Method):
    r"""$\tau = \lambda\,\bar\sigma\,\hat U \hat V^\top$, $\hat U$ and $\hat V$ from the common space of $\sum_i \tau_i$ and each task's own part outside it.

    - `common`: share of the singular vectors that the common space keeps, in (0, 1].
    - `scale`: λ; a number, or one a pattern of tensor names.
    - `tensors`: what it acts on: `matrices` (tensors of two dimensions), `linear` (weights of the blocks), `all`, or patterns of names.
    - `elsewhere`: what other tensors get: `base` (θ₀), `mean` or `sum` of the task vectors.
    - `split_fused`: merge fused q/k/v as the three matrices that they are.
    """

    common: float = 0.8
    scale: Varying = 1.0
    tensors: str | tuple[str, ...] = "matrices"
    elsewhere: Literal["base", "mean", "sum"] = "mean"
    split_fused: bool = False

    def __post_init__(self) -> None:
        number("IsoCts", "common", self.common, "in (0, 1]", low=0, high=1, open_low=True)
        varying("IsoCts", "scale", self.scale, tasks=False)
        check_selection("IsoCts", self.tensors, self.elsewhere)
        flag("IsoCts", "split_fused", self.split_fused)

    def chain(self) -> Chain:
        """Common space, the tasks' own, flatten; then λ."""
        return Chain(
            reduction=Isotropic(common=self.common),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )


@dataclass(kw_only=True)
class Summed:
    """Σ τ_i; the tasks' vectors too where the common space is not everything, since it is known only when all are there."""

    total: Tensor
    tasks: int
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Isotropic(StreamReduction):
    """The reduction of `IsoC` (`common` None) and of `IsoCts`."""

    common: float | None = None

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
        """The flattened sum."""
        u, s, vt = svd(state.total)
        seen = int((s > s[0] * max(state.total.shape) * EPS).sum())
        own = self._own(len(s), state.tasks)
        if own == 0:
            merged: Tensor = (s.mean() * u[:, :seen]) @ vt[:seen]
            return merged
        common = min(seen, len(s) - own * state.tasks)
        u, v = u[:, :common], vt[:common].T
        left, values, right = [u], [s[:common]], [v]
        for vector in state.kept:
            a, b, ct = svd(vector - u @ (u.T @ vector))
            rank = min(own, int((b > s[0] * max(vector.shape) * EPS).sum()))
            left.append(a[:, :rank])
            values.append(b[:rank])
            right.append(ct[:rank].T)
        flat = float(torch.cat(values).sum()) / len(s)
        return flat * orthonormal(torch.cat(left, 1)) @ orthonormal(torch.cat(right, 1)).T

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        entries, small = d_out * d_in, min(d_out, d_in)
        svd = 6.0 * entries * small + 20.0 * small**3
        own = self._own(small, tasks)
        memory = 4 * entries + 4 * small**2 + (tasks * entries if own else 0)
        return Cost(flops=svd * (tasks + 3 if own else 1) + 2.0 * small * entries, memory=4 * memory)

    def _own(self, small: int, tasks: int) -> int:
        """Singular vectors of each task's own part."""
        return 0 if self.common is None else round((small - int(small * self.common)) / tasks)
