r"""SWUDI and SWUDI-A: WUDI's minimum in one eigendecomposition, approached along the strong eigenvectors alone.

Spectral WUDI (2026, <https://arxiv.org/abs/2606.07289>), read in the authors' code (WalkerWorldPeace/MLLMerging 5f8a458, where SWUDI-A is
`aswudi`). With A = Σ τ_iᵀτ_i/‖τ_i‖² = VΛVᵀ and B = Σ τ_iτ_iᵀτ_i/‖τ_i‖², τ = τ₀ − τ₀ V f Vᵀ + B V (f/λ) Vᵀ from τ₀ = Σ τ_i. SWUDI:
f = 1 − e^{−Tλ} on the ⌈r · d_in⌉ largest eigenvalues, 0 below. SWUDI-A: f = 1 on as many as an effective rank of the spectrum says, so that
nothing is left to tune. Directions that are cut keep the start, not zero. Both are fields of `wudi`'s `solver: gradient_flow`.

The repository disagrees with itself on SWUDI's defaults: T = 300 and no cut in its function (called `iwudi` on its own), 300 and r = 0.65 in
the standalone copy, 1300 and 0.65 in the configuration that its ViT-B/32 figures stand beside, which is ours; 1800 and 0.65 for ViT-B/16, 300 and
0.85 for Llama, 1300 and 0.01 with `scale` 0.2 for Qwen2-VL's adapters, 300 and 0.65 with 0.1 for InternVL. T is absolute, and the
eigenvalues of A sum to the number of tasks K: T is 2 · time · d_in / K in units of `wudi`'s `time`, so that one T goes less far in wider layers. For
SWUDI-A the authors advise `gavish_donoho` for fully fine-tuned language models. The paper itself could be read as an abstract only.

Departs from the code in what is rounding: an eigenvalue below the rounding of A is zero and its direction keeps the start (the code divides
by 1e-8 there), and an effective rank that rounding alone lifts above an integer is that integer. An all-zero task vector is dropped. The
code leaves out `lm_head` (here: `exclude`), and its scripts for vision-language models the visual tower, embeddings, norms and biases, the rest at θ₀:
`tensors: linear, elsewhere: base`.

Use it where `wudi` would be used and its last point counts: `swudi_a` has nothing to tune, `swudi` has T and r. The cost is that of one
eigendecomposition of d_in × d_in a matrix; no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from thetau.methods.fields import Coefficient, Elsewhere, Portion, Positive, SplitFused, Tensors
from thetau.methods.quadratic import Start
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.spectral_filter import Ruled
from thetau.methods.wudi_solvers import Interference
from thetau.parts import Chain, Method, Selection

PAPER = "2026, https://arxiv.org/abs/2606.07289"
Begun = Annotated[Start, "τ₀: the `sum` or the `mean` of the task vectors, or `zero`; directions that are cut keep it."]


@register("swudi", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Swudi(Method):
    r"""$\tau = \tau_0 - \tau_0 V f V^\top + B V \frac{f}{\lambda} V^\top$ with $f = 1 - e^{-T\lambda}$ on the top share of A's eigenvectors, else 0."""

    suits: ClassVar[tuple[str, ...]] = ("lora",)
    exp_time: Annotated[Positive, "T, where the flow stops; absolute."] = 1300.0
    keep: Annotated[Portion, "r, the share of A's eigenvectors that move."] = 0.65
    start: Begun = "sum"
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """WUDI's gradient flow with a cut, then λ."""
        part = Interference(solver="gradient_flow", exp_time=self.exp_time, keep=self.keep, start=self.start)
        return Chain(
            reduction=part,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )


@register("swudi_a", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class SwudiA(Method):
    r"""$\tau = \tau_0 - \tau_0 V_k V_k^\top + B V_k \Lambda_k^{-1} V_k^\top$, $V_k$ being A's first k eigenvectors, k by `rank`."""

    suits: ClassVar[tuple[str, ...]] = ("lora",)
    rank: Ruled = "participation_sqrt"
    keep: Annotated[Portion, "the most of A's d_in eigenvectors that move, as a share; of Σλ under `variance`."] = 1.0
    start: Begun = "sum"
    scale: Coefficient = 1.0
    tensors: Tensors = "matrices"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """WUDI's minimum in a part of the spectrum, then λ."""
        part = Interference(solver="gradient_flow", filter="cut", rank=self.rank, keep=self.keep, start=self.start)
        return Chain(
            reduction=part,
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )
