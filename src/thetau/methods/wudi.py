"""WUDI-Merging: let each task's vector stand in for its inputs.

Cheng et al., ICML 2025, <https://arxiv.org/abs/2503.08099>: for each linear layer minimise
Σ_i ‖(τ_m − τ_i) τ_iᵀ‖² / ‖τ_i‖² (Eq. 21) from τ_m = Σ τ_i. The authors run 300 Adam steps through autograd; here the gradient is written down:
with A = Σ τ_iᵀτ_i/‖τ_i‖² and B = Σ τ_iτ_iᵀτ_i/‖τ_i‖² it is exactly 2(τ_m A − B), one product a step whatever the number of tasks.

Variants. `adam` is the paper; its lr of 1e-5 belongs to CLIP's scale of task vectors (rms 2.4e-4), so by default lr and ε follow the
rms of the tensor's entries, which makes the result scale with the vectors; `lr_absolute` is the paper's. `closed_form` is Eq. 20 with the
numerator as Eq. 19 gives it, Σ (τ_iτ_iᵀτ_i + ω τ_i)/‖τ_i‖² (the appendix is misprinted), ω being given relative to the spectrum (`ridge`) or as
it is (`omega`). `gradient_flow`, ours, is gradient descent in continuous time from Σ τ_i, stopped at t: exact in the eigenbasis of A. As in
the authors' code, it acts on the linear weights of the blocks and everything else stays at θ₀ (FusionBench averages it: `elsewhere="mean"`).
Nothing is rescaled afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from thetau.methods.fields import (
    AtLeast,
    Coefficient,
    Elsewhere,
    NotNegative,
    Portion,
    Positive,
    SplitFused,
    Tensors,
    Within,
    part_of,
)
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.wudi_solvers import Interference
from thetau.parts import Chain, Method, Selection

RIDGE = 1e-3


@register("wudi", paper="Cheng et al., ICML 2025, https://arxiv.org/abs/2503.08099")
@dataclass(frozen=True, kw_only=True)
class Wudi(Method):
    r"""$\tau = \arg\min_{\tau_m} \sum_i \|(\tau_m - \tau_i)\,\tau_i^\top\|_F^2 / \|\tau_i\|_F^2$ for each linear layer, approached from $\sum_i \tau_i$.

    - `solver`: `adam` (the paper), `closed_form` (Eq. 20) or `gradient_flow` (ours: exact, scale-free, one eigendecomposition).
    - `steps`: Adam steps.
    - `lr`: Adam's lr at the paper's scale (rms 2.4e-4); it follows the rms of the tensor's entries.
    - `lr_absolute`: use `lr` as it is, as the paper does.
    - `ridge`: ω of the closed form, as a share of the mean eigenvalue of A; 0 gives the minimiser nearest to Σ τ_i (by pseudo-inverse).
    - `omega`: ω of Eq. 20 as it is (the authors' code takes 1e-5), instead of `ridge`; it does not follow the scale of the vectors.
    - `time`: where the gradient flow stops, in units of 1 / mean eigenvalue of A.
    - `balance`: divide each task's loss by ‖τ_i‖² (Table 7 switches it off).
    - `rows`: share of each τ_i's rows that stand in for its inputs (Fig. 6).
    - `reference`: what stands in for the inputs: the task's `own` vector, or `random` Gaussian rows of its mean and deviation (Eq. 22).
    - `scale`: ε, the rescaling of Fig. 5; a number, or one a pattern of tensor names.
    """

    solver: Literal["adam", "closed_form", "gradient_flow"] = "adam"
    steps: Annotated[int, AtLeast(0)] = 300
    lr: Positive = 1e-5
    lr_absolute: bool = False
    ridge: NotNegative = RIDGE
    omega: Annotated[float | None, Within("(0, inf)", none="for `ridge`")] = None
    time: NotNegative = 1.0
    balance: bool = True
    rows: Portion = 1.0
    reference: Literal["own", "random"] = "own"
    scale: Coefficient = 1.0
    tensors: Tensors = "linear"
    elsewhere: Elsewhere = "base"
    split_fused: SplitFused = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.omega is not None:
            if self.ridge != RIDGE:
                raise ValueError(
                    "`Wudi(omega=...)` is ω itself, and `ridge` is ω as a share of the spectrum: give one of them. "
                    f"Got omega={self.omega!r} and ridge={self.ridge!r}."
                )
            if self.solver != "closed_form":
                raise ValueError(f"`Wudi(omega=...)` belongs to `solver='closed_form'`. Got solver={self.solver!r}.")

    def chain(self) -> Chain:
        """The minimisation as a streaming reduction, then ε."""
        return Chain(
            reduction=Interference(**part_of(Interference, self)),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )
