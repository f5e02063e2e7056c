r"""OptMerge: WUDI with each task's vector cut to its K-th of the singular values, for multimodal language models.

Wei et al. 2025, <https://arxiv.org/abs/2505.19892>, read in the authors' code (WalkerWorldPeace/MLLMerging 5f8a458, where it is `wudi_merging2`):
minimise Σ_i ‖(τ − T_i) L_iᵀ‖²/‖τ_i‖² with L_i = S_rV_rᵀ of τ_i and r = ⌊min(d_out, d_in)/K⌋ in 300 steps. Two algorithms have that name:

- `full`, of the script for fully fine-tuned InternVL and of the authors' port to FusionBench, is the default: T_i = τ̄ + the rank-r part of τ_i − τ̄,
  from Σ τ_i, by Adam with lr 1e-5;
- `lora`, of the script for Qwen2-VL's adapters: T_i is the rank-r part of τ_i, from the mean τ̄, by SGD with lr 1e-4 and momentum 0.9.

As in those scripts, it acts on the linear weights of the blocks and everything else stays at θ₀ (the scripts leave out the visual tower by name:
`exclude`; the port averages: `tensors: matrices, elsewhere: mean`). Departs from them in that everything is in float32 (the `lora` script works in the
checkpoint's float16 after the SVD, where ‖τ_i‖² underflows); r is at least 1; Adam's lr and ε follow the rms of the tensor's entries as in `wudi`
(`lr_absolute` is theirs); large matrices are truncated by a random sketch; an all-zero task vector is dropped, but counts in K. The gradient is
2(τA − B), so that `wudi`'s other solvers of the same objective are here too.

Use it for adapters or fine-tunes of large models whose task vectors are nearly of low rank. It costs a singular value decomposition a task beside WUDI's
steps, and `full` keeps all task vectors of one matrix in memory, since their mean comes first; no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.linalg.svd import truncated_flops, truncated_svd
from thetau.methods.fields import AtLeast, Coefficient, Elsewhere, NotNegative, Rank, SplitFused, Tensors, Within
from thetau.methods.quadratic import Quadratic, Sizes
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectra import rank_of
from thetau.methods.spectral_filter import SpectralFilter
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.random import stream
from thetau.sums import sum_in_order

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MOMENTUM = 0.9


@dataclass(kw_only=True)
class Parts:
    """The quadratic so far; the vectors themselves, with their names, where their mean must be known first."""

    quadratic: Quadratic
    rank: int
    kept: list[tuple[Site, Tensor]] = field(default_factory=list)


@register("optmerge", paper="Wei et al. 2025, https://arxiv.org/abs/2505.19892")
@dataclass(frozen=True, kw_only=True)
class OptMerge(Method, StreamReduction):
    r"""$\tau = \arg\min_{\tau_m} \sum_i \|(\tau_m - T_i) L_i^\top\|_F^2 / \|\tau_i\|_F^2$, $L_i = S_r V_r^\top$ of $\tau_i$.

    - `variant`: `full` (centred targets, from the sum, Adam) or `lora` (targets of rank r, from the mean, SGD).
    - `solver`: the variant's `steps`, the `closed_form` nearest to its start, or the `gradient_flow` from there.
    - `steps`: steps of the optimiser.
    - `lr`: its step size; None for the variant's.
    - `lr_absolute`: use Adam's lr as it is, as the authors do; otherwise it follows the rms of the tensor's entries.
    - `time`: where the gradient flow stops, in units of 1 / mean eigenvalue of A.
    - `rank`: r, singular values of each task: a number, a share of the smaller dimension, or None for its K-th part.
    """

    suits: ClassVar[tuple[str, ...]] = ("lora",)
    variant: Literal["full", "lora"] = "full"
    solver: Literal["steps", "closed_form", "gradient_flow"] = "steps"
    steps: Annotated[int, AtLeast(0)] = 300
    lr: Annotated[float | None, Within("(0, inf)", none="for 1e-5 of `full` and 1e-4 of `lora`")] = None
    lr_absolute: bool = False
    time: NotNegative = 1.0
    rank: Annotated[int | float | None, Rank()] = None
    scale: Coefficient = 1.0
    tensors: Tensors = "linear"
    elsewhere: Elsewhere = "base"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """The minimisation, then λ."""
        return Chain(
            reduction=self,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )

    def init(self, d_out: int, d_in: int, tasks: int) -> Parts:
        """Nothing yet."""
        rank = rank_of(self.rank, min(d_out, d_in), tasks)
        exact = torch.float64 if self.solver == "closed_form" else torch.float32
        return Parts(quadratic=Quadratic.empty(d_out, d_in, tasks * rank, exact), rank=rank)

    def add(self, parts: Parts, vector: Float[Tensor, "d_out d_in"], site: Site) -> Parts:
        """Take in one task."""
        if bool(vector.any()):
            if self.variant == "full":
                parts.kept.append((site, vector.clone()))
            else:  # L_i sees the same of τ_i as of its rank-r part
                self._take(parts, site, vector, vector)
        return parts

    def result(self, parts: Parts, site: Site) -> Float[Tensor, "d_out d_in"]:
        """Where the solver ends."""
        total = parts.quadratic
        if parts.kept:
            mean = sum_in_order(torch.stack([vector for _, vector in parts.kept])) / len(parts.kept)
            for one, vector in parts.kept:
                u, s, v = truncated_svd(vector - mean, parts.rank, stream("optmerge", *one.tasks, one.name, "target"))
                self._take(parts, one, vector, mean + (u * s) @ v.T)
            parts.kept.clear()
        start = total.start("sum" if self.variant == "full" else "mean")
        if total.trace() == 0:
            return start
        if self.solver == "closed_form":
            return total.moved(start.double(), total.inverted(total.residual(start), 0.0)).float()
        if self.solver == "gradient_flow":
            return SpectralFilter(time=self.time).moved(total, start)
        if self.variant == "full":
            return total.by_adam(start, self.steps, self.lr or 1e-5, absolute=self.lr_absolute, balanced=True)
        return total.stepped(start, self.steps, lambda values: torch.optim.SGD(values, lr=self.lr or 1e-4, momentum=MOMENTUM))

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        rank = rank_of(self.rank, min(shape), tasks)
        sizes = Sizes(d_out, d_in, tasks, rank, doubled=self.solver == "closed_form")
        solve = {
            "steps": sizes.steps(self.steps),
            "closed_form": sizes.inverse(regular=False),
            "gradient_flow": sizes.spectrum(),
        }[self.solver]
        each, held = (2, 2 * tasks * sizes.entries) if self.variant == "full" else (1, 0)  # the vectors, stacked for their mean
        held += 4 * sizes.entries + 4 * min(shape) ** 2
        flops = solve.flops + tasks * each * truncated_flops(d_out, d_in, rank)
        return Cost(flops=flops, memory=solve.memory + 4 * held)

    def _take(self, parts: Parts, site: Site, vector: Tensor, target: Tensor) -> None:
        """Feed one task to the quadratic: L_i, and 1/‖τ_i‖² for its weight."""
        _, s, v = truncated_svd(vector, parts.rank, stream("optmerge", *site.tasks, site.name))
        parts.quadratic.take(vector, s[:, None] * v.T, 1 / float(vector.double().square().sum()), target)
