"""WUDI-Merging: let each task's vector stand in for its inputs.

Cheng et al., ICML 2025, <https://arxiv.org/abs/2503.08099>: for each linear layer minimise
Σ_i ‖(τ_m − τ_i) τ_iᵀ‖² / ‖τ_i‖² (Eq. 21) from τ_m = Σ τ_i. The authors run 300 Adam steps through autograd; here the gradient is written down:
with A = Σ τ_iᵀτ_i/‖τ_i‖² and B = Σ τ_iτ_iᵀτ_i/‖τ_i‖² it is exactly 2(τ_m A − B), one product a step whatever the number of tasks.

Variants. `adam` is the paper; its lr of 1e-5 belongs to CLIP's scale of task vectors (rms 2.4e-4), so by default lr and ε follow the
rms of the tensor's entries, which makes the result scale with the vectors; `lr_absolute` is the paper's. `closed_form` is Eq. 20 with the
numerator as Eq. 19 gives it, Σ (τ_iτ_iᵀτ_i + ω τ_i)/‖τ_i‖² (the appendix is misprinted), ω being given relative to the spectrum (`ridge`) or as
it is (`omega`). `gradient_flow` is gradient descent in continuous time from Σ τ_i, stopped at t: exact in the eigenbasis of A. We found it on
our own; its published form is SWUDI before its cut (2026, <https://arxiv.org/abs/2606.07289>), and with `rank`, `keep`, `filter` and `start`
it is SWUDI and SWUDI-A themselves, which `swudi` and `swudi_a` have with their authors' defaults. Their time T is absolute (`exp_time`);
ours is in units of 1 / mean eigenvalue, T = 2 · time · d_in / tr A, where tr A is the number of tasks: a fixed T is another time in every width. As in
the authors' code, it acts on the linear weights of the blocks and everything else stays at θ₀ (FusionBench averages it: `elsewhere="mean"`).
Nothing is rescaled afterwards.

Use it when several full fine-tunes are to become one model, without data and with nothing to tune; not for LoRA adapters, whose rows are no
sample of inputs (docs/adapters.md), though its authors restored adapters for it. `solver: gradient_flow` gives as good a result as the paper's
Adam for a few products with the leading directions of each task (`directions`, docs/sketches.md), or with `directions: full` for one
eigendecomposition of d_in × d_in a matrix, instead of 300 products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

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
from thetau.methods.quadratic import Start
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.methods.sketched import Counted as Directed
from thetau.methods.sketched import Tail
from thetau.methods.spectral_filter import Alpha, Filter, Horizon, Kept, Ruled, SpectralFilter
from thetau.methods.wudi_solvers import Interference, Solver
from thetau.parts import Chain, Method, Selection

RIDGE = 1e-3
WHOLE = (("filter", "flow"), ("rank", "share"), ("keep", 1.0), ("reference", "own"), ("rows", 1.0))  # what a sketch goes with
FILTERS = ("exp_time", "filter", "alpha", "rank", "keep")  # fields of the gradient flow alone


@register("wudi", paper="Cheng et al., ICML 2025, https://arxiv.org/abs/2503.08099")
@dataclass(frozen=True, kw_only=True)
class Wudi(Method):
    r"""$\tau = \arg\min_{\tau_m} \sum_i \|(\tau_m - \tau_i)\,\tau_i^\top\|_F^2 / \|\tau_i\|_F^2$ for each linear layer, approached from $\sum_i \tau_i$.

    - `solver`: `adam` (the paper), `closed_form` (Eq. 20) or `gradient_flow` (exact, scale-free, one eigendecomposition).
    - `steps`: Adam steps, or those of `filter: landweber`.
    - `lr`: Adam's lr at the paper's scale (rms 2.4e-4); it follows the rms of the tensor's entries.
    - `lr_absolute`: use `lr` as it is, as the paper does.
    - `ridge`: ω of the closed form, as a share of the mean eigenvalue of A; 0 gives the minimiser nearest to Σ τ_i (by pseudo-inverse).
    - `omega`: ω of Eq. 20 as it is (the authors' code takes 1e-5), instead of `ridge`; it does not follow the scale of the vectors.
    - `time`: where the gradient flow stops, in units of 1 / mean eigenvalue of A.
    - `start`: where it all begins: the `sum` (the paper) or the `mean` of the task vectors, or `zero`.
    - `balance`: divide each task's loss by ‖τ_i‖² (Table 7 switches it off).
    - `rows`: share of each τ_i's rows that stand in for its inputs (Fig. 6).
    - `reference`: what stands in for the inputs: the task's `own` vector, or `random` Gaussian rows of its mean and deviation (Eq. 22).
    - `directions`: right singular directions of each task that stand in for its inputs, but for `adam`: a number, as many as its spectrum asks
      for (`auto`), or all (`full`).
    - `tail`: what the other directions weigh: all the same (`flat`), by what they hold of ‖τ_i‖², or nothing (`drop`).
    - `scale`: ε, the rescaling of Fig. 5; a number, or one a pattern of tensor names.
    """

    suits: ClassVar[tuple[str, ...]] = ("lora",)
    solver: Solver = "adam"
    steps: Annotated[int, AtLeast(0)] = 300
    lr: Positive = 1e-5
    lr_absolute: bool = False
    ridge: NotNegative = RIDGE
    omega: Annotated[float | None, Within("(0, inf)", none="for `ridge`")] = None
    time: NotNegative = 1.0
    exp_time: Horizon = None
    filter: Filter = "flow"
    alpha: Alpha = 1e-2
    rank: Ruled = "share"
    keep: Kept = 1.0
    start: Start = "sum"
    balance: bool = True
    rows: Portion = 1.0
    reference: Literal["own", "random"] = "own"
    directions: Directed = "auto"
    tail: Tail = "flat"
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
        if self.exp_time is not None and self.time != 1:
            raise ValueError(
                "`Wudi(exp_time=...)` is T itself, and `time` is in units of the spectrum: give one of them. "
                f"Got exp_time={self.exp_time!r} and time={self.time!r}."
            )
        changed = [name for name in FILTERS if self.__dict__[name] != SpectralFilter().__dict__[name]]
        if changed and self.solver != "gradient_flow":
            raise ValueError(f"`Wudi({changed[0]}=...)` belongs to `solver='gradient_flow'`. Got solver={self.solver!r}.")
        if isinstance(self.directions, int):
            whole = [
                name
                for name, plain in (*WHOLE, ("solver", self.solver if self.solver != "adam" else ""))
                if self.__dict__[name] != plain
            ]
            if whole:
                raise ValueError(
                    f"`Wudi(directions=...)` is for `gradient_flow` without a cut and for `closed_form`, over the tasks' own whole vectors; "
                    f"leave it at 'auto'. Got directions={self.directions!r} and {whole[0]}={self.__dict__[whole[0]]!r}."
                )

    def chain(self) -> Chain:
        """The minimisation as a streaming reduction, then ε."""
        return Chain(
            reduction=Interference(**part_of(Interference, self)),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )
