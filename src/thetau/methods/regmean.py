r"""RegMean: each linear layer gives, on every task's own inputs, what the task's model gave, in the sense of least squares.

Jin et al., ICLR 2023, <https://arxiv.org/abs/2212.09849>: min Σ_i ‖X_i(W − W_i)ᵀ‖² has the solution Wᵀ = (Σ G_i)⁻¹ Σ G_iW_iᵀ with
G_i = X_iᵀX_i. As in the authors' code (bloomberg/dataless-model-merging 92247ae) G_i is divided by its number of rows, its off-diagonal
entries are multiplied by a factor below 1 (their configs have 0.9 or 0.1, most of them 0.1; ports 0.95), and what is no linear layer is averaged. At
factor 1 it is the exact minimiser, at 0 a weighted mean of the columns. Departs from that code in three things. It works on task vectors, which is the same
unless a direction of the inputs was never seen: there the code inverts a singular matrix, here the layer stays the base's (`unseen: base`) or
gets the mean. What is rounding in a sum of Gram matrices is told on the scale of its own diagonal, for inputs differ by orders of magnitude. And
fused q/k/v, convolutions (unfolded) and GPT-2's transposed layers count as the linear layers that they are.

Use it where some hundreds of unlabelled examples of each task are at hand. It costs a forward pass of those examples once, a file of one d_in × d_in
matrix a layer for each task, and then a Cholesky factor a matrix (an eigendecomposition at factor 1); matrices come task by task, so memory does not
grow with their number. The Gram matrices are evidence: `thetau evidence gram` collects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps
from thetau.methods.fields import Coefficient, Elsewhere, Tensors, Varies, Within, part_of
from thetau.methods.moments import check_moments, proportions
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Form, Method, Selection, Site, StreamReduction, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KIND = "gram"


@register("regmean", paper="Jin et al., ICLR 2023, https://arxiv.org/abs/2212.09849")
@dataclass(frozen=True, kw_only=True)
class RegMean(Method):
    r"""$\tau = \lambda \sum_i c_i \tau_i \hat G_i \left(\sum_i c_i \hat G_i\right)^{+}$, $\hat G_i$ the mean of $x x^\top$ over the inputs of task $i$'s layer.

    - `off_diagonal`: what the entries of G_i off its diagonal are multiplied by; 1 is the exact minimiser.
    - `coefficients`: c; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    - `unseen`: what directions of a layer's input that no task's examples have get: the `base` (no change) or the `mean` of the tasks.
    """

    off_diagonal: Annotated[float, Within("[0, 1]")] = 0.9
    coefficients: Annotated[Varying, Varies(task=True, pattern=True, each=Within("(0, inf)"))] = 1.0
    unseen: Literal["base", "mean"] = "base"
    scale: Coefficient = 1.0
    tensors: Tensors = "all"
    elsewhere: Elsewhere = "mean"

    def chain(self) -> Chain:
        """The least squares, then λ."""
        return Chain(
            reduction=LeastSquares(**part_of(LeastSquares, self)),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
        )


@dataclass(kw_only=True)
class Normal:
    """The normal equations τ A = B, float64, and the weighted sum of the tasks' vectors with its weight."""

    gram: Float[Tensor, "d_in d_in"]
    target: Float[Tensor, "d_out d_in"]
    total: Float[Tensor, "d_out d_in"]
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LeastSquares(StreamReduction):
    """The reduction of `RegMean`: A = Σ c_i G_i and B = Σ c_i τ_i G_i, and their solution."""

    needs: ClassVar[tuple[str, ...]] = (KIND,)
    forms: ClassVar[dict[str, Form]] = {KIND: "inputs"}
    off_diagonal: float = 0.9
    coefficients: Varying = 1.0
    unseen: Literal["base", "mean"] = "base"

    def weights(self, site: Site) -> list[float]:
        """The coefficients, so scaled that what is averaged elsewhere is their weighted mean."""
        return proportions(site, self.coefficients)

    def init(self, d_out: int, d_in: int, tasks: int) -> Normal:
        """Nothing yet."""
        square, long = (torch.zeros(shape, dtype=torch.float64) for shape in ((d_in, d_in), (d_out, d_in)))
        return Normal(gram=square, target=long, total=torch.zeros_like(long))

    def add(self, total: Normal, vector: Float[Tensor, "d_out d_in"], site: Site) -> Normal:
        """Take in one task.

        Raises:
            AlignmentError: its Gram matrix is none.
        """
        coefficient = site.of_task(self.coefficients)
        gram = site.evidence[KIND][0].to(vector.device, torch.float64)
        check_moments(gram, KIND, site)
        squares = gram.diagonal() * coefficient
        gram = gram * (self.off_diagonal * coefficient)
        gram.diagonal().copy_(squares)
        wide = vector.double()
        total.gram += gram
        total.target.addmm_(wide, gram)
        total.total.add_(wide, alpha=coefficient)
        total.weight += coefficient
        return total

    def result(self, total: Normal, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The solution, as a move from where unseen directions stay."""
        start = total.total / total.weight if self.unseen == "mean" else torch.zeros_like(total.total)
        residual = total.target.addmm_(start, total.gram, alpha=-1)
        return (start + solved(total.gram, residual, regular=1 - self.off_diagonal)).float()

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        exact = self.off_diagonal == 1
        solve = (14.0 if exact else 1 / 3) * d_in**3 + 4.0 * d_out * d_in**2
        held = (8 if exact else 4) * d_in**2 + 5 * d_out * d_in
        return Cost(flops=2.0 * (tasks + 1) * d_out * d_in**2 + solve, memory=8 * held)


def solved(
    gram: Float[Tensor, "d_in d_in"], residual: Float[Tensor, "d_out d_in"], *, regular: float = 0.0
) -> Float[Tensor, "d_out d_in"]:
    """R A⁺ in float64, for the sum A of Gram matrices whose entries are known to float32, and R of its range.

    On the scale of its diagonal A has ones there and entries known to ε, whose errors add up to an operator of √n ε: smaller eigenvalues are
    none. `regular` is a bound below on the eigenvalues on that scale, where one is known (1 − the off-diagonal factor).
    """
    size = gram.diagonal().sqrt()
    unit = torch.where(size > 0, 1 / size.clamp(min=torch.finfo(size.dtype).tiny), 0)
    scaled = gram * unit[:, None] * unit
    scaled.diagonal().copy_(torch.ones_like(unit))  # what has no inputs has no residual either
    cut = MARGIN * sqrt(len(gram)) * eps(torch.float32)
    right = residual * unit
    if regular > cut:
        lower, failed = torch.linalg.cholesky_ex(scaled)
        if int(failed) == 0:
            return torch.cholesky_solve(right.T, lower).T * unit
    values, vectors = torch.linalg.eigh(scaled)
    seen = (values > cut) & ((vectors * (size > 0)[:, None]).square().sum(0) > 0.5)
    kept = vectors[:, seen]
    change: Tensor = ((right @ kept) / values[seen]) @ kept.T * unit
    if int(seen.sum()) < len(gram):  # without what the scale put into directions that were never seen
        basis = torch.linalg.qr(kept * size[:, None]).Q
        change = change @ basis @ basis.T
    return change
