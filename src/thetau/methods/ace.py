r"""ACE-Merging: the mean of the task vectors, each weighed by the covariance of its centred rows, with a ridge and a prior.

CVPR 2026, <https://arxiv.org/abs/2603.02945>, read in the authors' code (unravel-xu/ACE-Merging 22d9dfe); the paper itself could be read as an
abstract only. W_i is τ_i minus the mean of its rows, Σ_i = W_iᵀW_i, and W₀ = Σ_i W_i(Σ_i + εI) [Σ_i (Σ_i + εI) + 1cᵀ]⁻¹, where the prior
c is the mean row of ΣΣ_i, added to every row. Where the tasks' norms differ much, γ = var(log‖τ_i‖²)/mean(log‖τ_i‖²)² > 0.3, each task's Σ_i and
ε are divided by ‖W_i‖² and c by the mean ‖τ_i‖², and what is merged is F = W₀ + Σ_i τ_i(Σ_i − mean of all Σ_i + εI) beside W₀:
W₀ + σ̄ U_kV_kᵀ, with the first k = 30 % of F's singular vectors and σ̄ the mean of their values.

**The default is that algorithm in a unit of its own** (`relative`): as if all vectors were first scaled so that the mean eigenvalue of τ_iᵀτ_i
is 1, averaged over tasks. The code takes ε, γ and c as they come, so its result depends on the scale of the vectors: on CLIP ViT-B/32 (entries
of 2.4e-4) its ε of 1e-2 lies above every eigenvalue, and what comes out is near the average; and γ grows without bound where
the mean of the logarithms is near 0. `relative: false` is the authors' code, number by number.

As in that code, the centring takes the mean row out of everything but F: it never reaches W₀. ACTMat's authors read the paper otherwise and merge
the whole τ_i with the covariances of the centred rows; `target: whole` is that. It acts on every tensor of two dimensions, all
others are averaged, and nothing is rescaled (the code averages `text_projection` too: `exclude` or `tensors`). Departs from it in that an
all-zero task vector is dropped, products and inverse are in float64, the prior is added by its rank-one formula, and k is at least 1.

Use it where the tasks' vectors differ much in size, which its second form is for; elsewhere it is near ACTMat with a ridge. It costs one
Cholesky decomposition in float64 of d_in × d_in a matrix (and one singular value decomposition in the second form); no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING, Annotated, Literal

from thetau._lazy import torch
from thetau.linalg.svd import svd
from thetau.methods.fields import Coefficient, Elsewhere, NotNegative, Portion, SplitFused, Tensors
from thetau.methods.quadratic import Quadratic, Sizes
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TINY = 1e-12  # beside logarithms, in the authors' code


@dataclass(kw_only=True)
class Sums:
    """The quadratic of the centred rows in either form, or in both while γ is not known.

    Their last row is the mean row μ_i of each τ_i, merged with the same covariances: so what the centring took out can be put back.
    """

    plain: Quadratic | None
    normalised: Quadratic | None
    traces: list[float] = field(default_factory=list)


@register("ace", paper="CVPR 2026, https://arxiv.org/abs/2603.02945")
@dataclass(frozen=True, kw_only=True)
class Ace(Method, StreamReduction):
    r"""$\tau = \sum_i W_i(\Sigma_i + \epsilon I)\,\left[\sum_i (\Sigma_i + \epsilon I) + \mathbf{1}c^\top\right]^{-1}$, $\Sigma_i = W_i^\top W_i$.

    W_i is τ_i with centred rows.

    - `epsilon`: ε, a share of the mean eigenvalue of τ_iᵀτ_i over all tasks.
    - `relative`: measure ε, γ and the prior in units of that eigenvalue; off, as they are, as the authors do.
    - `balance`: divide each Σ_i by ‖W_i‖² and add the leading part of F: where γ is above `threshold`, `always` or `never`.
    - `threshold`: what γ must exceed.
    - `leading`: k, the share of F's singular vectors that is added.
    - `prior`: whether c is added.
    - `target`: what is merged: the `centred` rows, or the `whole` τ_i.
    """

    epsilon: NotNegative = 1e-2
    relative: bool = True
    balance: Literal["by_gamma", "always", "never"] = "by_gamma"
    threshold: NotNegative = 0.3
    leading: Annotated[Portion, "k."] = 0.3
    prior: bool = True
    target: Literal["centred", "whole"] = "centred"
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """The weighted mean, then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Sums:
        """Nothing yet."""

        def empty() -> Quadratic:
            return Quadratic.empty(d_out + 1, d_in, tasks * d_out, torch.float64, anchored=True)

        return Sums(plain=empty() if self.balance != "always" else None, normalised=empty() if self.balance != "never" else None)

    def add(self, sums: Sums, vector: Float[Tensor, "d_out d_in"], site: Site) -> Sums:
        """Take in one task."""
        trace = float(vector.double().square().sum())
        if trace == 0:
            return sums
        sums.traces.append(trace)
        mean = vector.mean(0, keepdim=True)
        centred = vector - mean
        both, own = torch.cat([centred, mean]), float(centred.double().square().sum())
        if sums.plain is not None:
            sums.plain.take(both, centred, 1.0)
        if sums.normalised is not None:
            sums.normalised.take(both, centred, 1 / own if own > 0 else 0.0)
        return sums

    def result(self, sums: Sums, site: Site) -> Float[Tensor, "d_out d_in"]:
        """W₀, or W₀ and the leading part of F."""
        total = sums.plain or sums.normalised
        assert total is not None
        d_in = total.total.shape[1]
        if not sums.traces:
            return total.total[:-1]
        unit = sum(sums.traces) / len(sums.traces) / d_in if self.relative else 1.0
        traces = [trace / unit for trace in sums.traces]
        normal = sums.plain is None or (sums.normalised is not None and spread(traces) > self.threshold)
        if normal:
            assert sums.normalised is not None
            total = sums.normalised
        shift = self.epsilon * unit * total.weight
        if total.trace() == 0 and shift == 0:
            return torch.zeros_like(total.total[:-1])
        prior = (len(traces) / sum(traces) if normal else 1.0) if self.prior else 0.0
        solved = self._solved(total, shift, prior)
        w = solved[:-1] + solved[-1] if self.target == "whole" else solved[:-1]
        if not normal:
            return w.float()
        total_sum, numerator = ((part[:-1] + part[-1]).double() for part in (total.total, total.numerator()))
        mean = total.moved(shift * total_sum, total.through(total_sum)) / len(traces)  # Σ τ_i · (A + shift) / K
        u, s, vt = svd(w + numerator - mean)
        k = max(1, int(len(s) * self.leading))
        return (w + s[:k].mean() * u[:, :k] @ vt[:k]).float()

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        sizes = Sizes(d_out + 1, d_in, tasks, d_out, doubled=True)
        solve = sizes.inverse(regular=self.epsilon > 0)
        flops, memory = solve.flops, solve.memory + 16 * sizes.entries  # centred rows and their mean
        if self.balance == "by_gamma":
            flops, memory = flops + sizes.cost(0.0, 0).flops, memory + 8 * (d_in**2 + sizes.entries)  # A and B in either form
        if self.balance != "never":  # F and its singular value decomposition
            small = min(shape)
            flops += 6.0 * sizes.entries * small + 20.0 * small**3
            memory += 24 * sizes.entries + 16 * small**2
        return Cost(flops=flops, memory=memory)

    def _solved(self, total: Quadratic, shift: float, prior: float) -> Float[Tensor, "rows d_in"]:
        """(B + shift · mean)(A + shift + prior · 1cᵀ)⁻¹ in float64, c being the mean row of A.

        With M = A + shift and qᵀ = 1ᵀAM⁻¹, c is Aᵀ1/n, and the inverse less that of M has rank one (Sherman and Morrison):
        X = (B + shift · mean)M⁻¹ becomes X − X1 · prior qᵀ/n / (1 + prior qᵀ1/n).
        """
        assert total.anchor is not None
        start = total.anchor.double() / total.weight if total.weight else total.anchor.double()
        ones = torch.ones(1, start.shape[1], dtype=torch.float64)
        change = total.inverted(torch.cat([total.residual(start), total.through(ones)]), shift)
        x = total.moved(start, change[:-1])
        if prior == 0:
            return x
        q = total.moved(torch.zeros_like(ones), change[-1:]) * (prior / start.shape[1])
        return x - x.sum(1, keepdim=True) * q / (1 + q.sum())


def spread(traces: list[float]) -> float:
    """γ: the sample variance of the logarithms over the square of their mean; 0 for one task alone."""
    logs = [log(trace + TINY) for trace in traces]
    mean = sum(logs) / len(logs)
    if len(logs) < 2:
        return 0.0
    return sum((one - mean) ** 2 for one in logs) / (len(logs) - 1) / (mean**2 + TINY)
