r"""Bilateral merging: let each task's vector stand in for its inputs or for its output gradients, by what its matrix does.

Ours; WUDI (Cheng et al., ICML 2025, <https://arxiv.org/abs/2503.08099>) is p = 0, q = 1. A task vector is a sum of (output
gradient)(input)ᵀ, so its rows stand in for a layer's inputs and its columns for the output gradients. Weighing interference with both is the
second-order change of the loss in the Kronecker-factored form of Martens and Grosse (K-FAC, ICML 2015,
<https://arxiv.org/abs/1503.05671>), with both factors read off the task vector alone: H_i = U s^{2p} Uᵀ, G_i = V s^{2q} Vᵀ with τ_i = U s Vᵀ
and ‖s‖ = 1. By default every matrix is weighed on one side, the one whose coordinates its block's function fixes (`sides="by_role"`): an MLP's
hidden layer, and the residual stream around attention. That costs what WUDI's gradient flow does; `sides="both"` is the product. See
docs/bilateral.md for the derivation, what it assumes, where it fails, and what was measured.

The factors are estimates, so the minimum itself is not wanted: gradient descent in continuous time starts from Σ τ_i and stops at a time in
the loss's own scale (`flow`), or conjugate gradients stop once the residual is down to a share of what it was (`cg`); neither needs data or
has a unit. A power of 0 is the identity, on the whole space. `rank` truncates the factors and never the vectors; what it leaves out counts
by its share. By default it follows each task's spectrum (docs/sketches.md); what docs/bilateral.md reports was measured
with `rank="full"`. It acts on the linear weights of the blocks and everything else stays at θ₀, as in WUDI.

Use it where `wudi` would be used, for full fine-tunes that are to become one model with no data and nothing to tune; not for LoRA
adapters, whose rows are no sample of inputs (docs/adapters.md). It costs a few products with the leading directions of each task, or
one eigendecomposition a matrix with `rank="full"`, and needs a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from thetau.methods.bilateral_solvers import TwoSided
from thetau.methods.fields import AtLeast, Coefficient, Elsewhere, NotNegative, Rank, SplitFused, Tensors, Within, part_of
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Selection


@register("bilateral", paper="ours, after Cheng et al., ICML 2025, https://arxiv.org/abs/2503.08099")
@dataclass(frozen=True, kw_only=True)
class Bilateral(Method):
    r"""$\tau = \arg\min_{\tau_m} \sum_i w_i \|(\tau_i\tau_i^\top)^{p/2} (\tau_m - \tau_i) (\tau_i^\top\tau_i)^{q/2}\|_F^2$, from $\sum_i \tau_i$.

    - `p`: power of the left factor, which stands in for the output gradients; 0 leaves it out.
    - `q`: power of the right factor, which stands in for the inputs; 0 leaves it out.
    - `sides`: `by_role` (one factor a matrix: the left one where it widens an MLP or writes attention's output, the right one elsewhere) or `both`.
    - `solver`: `flow` (gradient descent in continuous time, stopped at `time`) or `cg` (conjugate gradients).
    - `iterations`: the most that `cg` makes.
    - `tolerance`: `cg` stops when the residual is down to this share of its first norm.
    - `time`: where `flow` stops, in units of 1 / mean non-zero eigenvalue of the one side; with both, of 1 / Rayleigh quotient of the first residual.
    - `rank`: singular vectors of each task that its factors keep: a number, a share of the smaller dimension, as many as its spectrum asks for
      (`auto`, where one side counts alone), or all (`full`, or None); take 0.25 where both sides count.
    - `tail`: what the other singular vectors weigh: all the same (`flat`), by what they hold of ‖τ_i‖², or nothing (`drop`).
    - `balance`: the tasks' weights: ‖s‖ = 1 (`norm`, WUDI's), `loss` (leaving a task out costs 1), `trace` (of its factors) or `none` (of τ as it is).
    - `start`: where the descent begins: the `sum` or the `mean` of the task vectors.
    - `precondition`: `cg` with the inverse of the mean factors; for going to the minimum, as it changes the way there.
    - `reference`: whose singular vectors the factors have: the task's `own`, or random ones on both sides or one (an ablation).
    - `scale`: ε, a rescaling of the result; a number, or one a pattern of tensor names.
    """

    p: NotNegative = 1.0
    q: NotNegative = 1.0
    sides: Literal["by_role", "both"] = "by_role"
    solver: Literal["cg", "flow"] = "flow"
    iterations: Annotated[int, AtLeast(0)] = 60
    tolerance: Annotated[float, Within("[0, 1]")] = 0.01
    time: NotNegative = 1.0
    rank: Annotated[int | float | str | None, Rank(("auto", "full"))] = "auto"
    tail: Literal["flat", "drop"] = "flat"
    balance: Literal["norm", "loss", "trace", "none"] = "norm"
    start: Literal["sum", "mean"] = "sum"
    precondition: bool = False
    reference: Literal["own", "random", "random_left", "random_right"] = "own"
    scale: Coefficient = 1.0
    tensors: Tensors = "linear"
    elsewhere: Elsewhere = "base"
    split_fused: SplitFused = False

    def reduction(self) -> TwoSided:
        """The minimisation, fed task by task."""
        return TwoSided(**part_of(TwoSided, self))

    def chain(self) -> Chain:
        """The minimisation as a streaming reduction, then ε."""
        return Chain(
            reduction=self.reduction(),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )
