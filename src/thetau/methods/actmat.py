r"""ACTMat and TACT: the mean of the task vectors, each weighed by its own covariance.

ACTMat (2026, <https://arxiv.org/abs/2604.01329>), read in the authors' code (marawangamal/actmat 42292c7): RegMean with τ_iᵀτ_i for the second
moment of task i's inputs, so that no data is needed. It is WUDI's closed form without the weights 1/‖τ_i‖²; `balance: norm` puts them
back, and `covariance` divides by ‖τ_iᵀτ_i‖²_F, an option of that code. TACT, of the same authors and in the same code, is `trim: 0.5`: the
covariance comes from the half of each matrix's entries that is largest, what is merged from all of them. It was read there alone; its paper was not.

As in that code, it acts on every tensor of two dimensions, all others are averaged, and nothing is rescaled. Departs from it in four things.
Products and inverse are in float64: a float32 Gram matrix squares the condition before `pinv` makes its cut. Equal magnitudes at
the cut of `trim` all stay. `ridge` is relative to the spectrum. The code averages `text_projection` and matrices with a side of 20,000 or more,
its vision scripts split fused q/k/v (`split_fused`), and a port leaves out embeddings and heads: here all are matrices; `tensors: linear`
leaves them to the average.

Use it where `wudi` would be used and large task vectors should count for more than small ones, or as a strong method without any setting. The
cost is one eigendecomposition in float64 of d_in × d_in a matrix; no data. On vectors of nearly low rank (adapters, `trim` on them above all) add a
`ridge` of 1e-3: weak directions enlarge noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.methods.fields import Coefficient, Elsewhere, NotNegative, Portion, SplitFused, Tensors
from thetau.methods.quadratic import Quadratic, Sizes
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Method, Selection, Site, StreamReduction
from thetau.transforms.trim import strongest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("actmat", paper="2026, https://arxiv.org/abs/2604.01329")
@dataclass(frozen=True, kw_only=True)
class ActMat(Method, StreamReduction):
    r"""$\tau = \lambda \sum_i w_i \tau_i C_i \left(\sum_i w_i C_i\right)^+$ with $C_i = \hat\tau_i^\top\hat\tau_i$, $\hat\tau_i$ being $\tau_i$ trimmed.

    - `trim`: share of each matrix's entries that its covariance is made of; 1 is ACTMat, 0.5 TACT.
    - `balance`: w_i: `none` (1), `norm` (1/‖τ_i‖², WUDI's) or `covariance` (1/‖C_i‖²).
    - `ridge`: what is added to the diagonal, in units of the sum's mean eigenvalue; it shrinks the result.
    """

    suits: ClassVar[tuple[str, ...]] = ("lora",)
    trim: Portion = 1.0
    balance: Annotated[Literal["none", "norm", "covariance"], "w_i."] = "none"
    ridge: NotNegative = 0.0
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

    def init(self, d_out: int, d_in: int, tasks: int) -> Quadratic:
        """Nothing yet."""
        return Quadratic.empty(d_out, d_in, tasks * d_out, torch.float64)

    def add(self, total: Quadratic, vector: Float[Tensor, "d_out d_in"], site: Site) -> Quadratic:
        """Take in one task; an all-zero one counts for nothing."""
        if bool(vector.any()):
            rows = strongest(vector, self.trim)
            total.take(vector, rows, self._weight(vector, rows))
        return total

    def result(self, total: Quadratic, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The weighted mean, as a move from Σ τ_i where that has no part outside the covariances' range, else from zero.

        The two are the same then, and the former returns the sum itself where the tasks' inputs do not meet.
        """
        if total.tasks == 0:
            return total.total
        start = total.start("sum" if self.trim == 1 and self.ridge == 0 else "zero").double()
        shift = self.ridge * total.trace() / start.shape[1]
        return total.moved(start, total.inverted(total.residual(start), shift)).float()

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        return Sizes(d_out, d_in, tasks, d_out, doubled=True).inverse(regular=self.ridge > 0)

    def _weight(self, vector: Tensor, rows: Tensor) -> float:
        """w_i of one task."""
        if self.balance == "none":
            return 1.0
        if self.balance == "norm":
            return 1 / float(vector.double().square().sum())
        thin = rows.double() if rows.shape[0] <= rows.shape[1] else rows.double().T
        return 1 / float((thin @ thin.T).square().sum())
