r"""K-FAC merging: the mean of the models, each layer weighed by both Kronecker factors of its Fisher information.

Fisher merging (Matena and Raffel, NeurIPS 2022, <https://arxiv.org/abs/2111.09832>) with F_i = A_i ⊗ S_i in the place of its diagonal (Martens and
Grosse, ICML 2015, <https://arxiv.org/abs/1503.05671>): A_i = E[x xᵀ] of a layer's inputs and S_i = E[g gᵀ] of the gradients of its output. The
minimum of Σ_i tr(S_i (τ − τ_i) A_i (τ − τ_i)ᵀ) solves Σ S_i τ A_i = Σ S_i τ_i A_i. RegMean is the case in which all S_i are equal. Merging
with such factors, and the linear system solved by conjugate gradients, is Tam et al.'s (MaTS, TMLR 2024, <https://arxiv.org/abs/2312.04339>);
here they start from the mean of the tasks, and the solver is ours.

Conjugate gradients are preconditioned with the factors' weighted means, damped; they stop once the residual is down to a share of what it was. A
direction that no task's data see stays near the mean.

Use it where RegMean would be used and its outputs matter unequally: beside the inputs it needs a backward pass of each example and class. It costs two
files a task, two eigendecompositions a matrix and some dozens of products with all tasks' factors, which are in memory together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.linalg.descent import descend
from thetau.linalg.kronecker import damped_inverse
from thetau.methods.fields import AtLeast, Coefficient, Elsewhere, Positive, Tensors, Varies, Within, part_of
from thetau.methods.moments import check_moments, proportions
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Form, Method, Selection, Site, StreamReduction, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

INPUTS, OUTPUTS = "gram", "gradients"


@register("kfac", paper="Tam et al., TMLR 2024, https://arxiv.org/abs/2312.04339")
@dataclass(frozen=True, kw_only=True)
class Kfac(Method):
    r"""$\tau = \lambda \arg\min_\tau \sum_i c_i \operatorname{tr}(S_i (\tau - \tau_i) A_i (\tau - \tau_i)^\top)$, $A_i$ of inputs, $S_i$ of gradients.

    - `coefficients`: c; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    - `iterations`: the most that conjugate gradients make.
    - `tolerance`: they stop when the residual is down to this share of its first norm.
    - `damping`: of the preconditioner, as a share of the largest eigenvalue of each mean factor; it changes the way and not the end.
    """

    coefficients: Annotated[Varying, Varies(task=True, pattern=True, each=Within("(0, inf)"))] = 1.0
    iterations: Annotated[int, AtLeast(0)] = 100
    tolerance: Annotated[float, Within("[0, 1]")] = 1e-3
    damping: Positive = 1e-3
    scale: Coefficient = 1.0
    tensors: Tensors = "all"
    elsewhere: Elsewhere = "mean"

    def chain(self) -> Chain:
        """The minimisation, then λ."""
        return Chain(
            reduction=TwoFactors(**part_of(TwoFactors, self)),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
        )


@dataclass(kw_only=True)
class Factors:
    """Each task's factors, float32 (c in the second), Σ S_i τ_i A_i, and the weighted sum of the vectors, float64."""

    target: Float[Tensor, "d_out d_in"]
    total: Float[Tensor, "d_out d_in"]
    weight: float = 0.0
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def apply(self, x: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Σ S_i X A_i."""
        found = torch.zeros_like(x)
        for left, right in zip(self.left, self.right, strict=True):
            found += left.to(x) @ (x @ right.to(x))
        return found


@dataclass(frozen=True, kw_only=True)
class TwoFactors(StreamReduction):
    """The reduction of `Kfac`."""

    needs: ClassVar[tuple[str, ...]] = (INPUTS, OUTPUTS)
    forms: ClassVar[Mapping[str, Form]] = {INPUTS: "inputs", OUTPUTS: "outputs"}
    coefficients: Varying = 1.0
    iterations: int = 100
    tolerance: float = 1e-3
    damping: float = 1e-3

    def weights(self, site: Site) -> list[float]:
        """The coefficients, so scaled that what is averaged elsewhere is their weighted mean."""
        return proportions(site, self.coefficients)

    def init(self, d_out: int, d_in: int, tasks: int) -> Factors:
        """Nothing yet."""
        zero = torch.zeros(d_out, d_in, dtype=torch.float64)
        return Factors(target=zero, total=zero.clone())

    def add(self, total: Factors, vector: Float[Tensor, "d_out d_in"], site: Site) -> Factors:
        """Take in one task.

        Raises:
            AlignmentError: one of its factors is no matrix of second moments.
        """
        coefficient = site.of_task(self.coefficients)
        right, left = (site.evidence[kind][0].to(vector.device) for kind in (INPUTS, OUTPUTS))
        for kind, matrix in ((INPUTS, right), (OUTPUTS, left)):
            check_moments(matrix, kind, site)
        left = left * coefficient
        wide = vector.double()
        total.target += left.double() @ (wide @ right.double())
        total.total.add_(wide, alpha=coefficient)
        total.weight += coefficient
        total.left.append(left)
        total.right.append(right)
        return total

    def result(self, total: Factors, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The minimum, as far as the tolerance says; the mean where no factor sees anything."""
        start = total.total / total.weight
        residual = total.target - total.apply(start)
        sizes = [
            (float(left.diagonal().sum()), float(right.diagonal().sum()))
            for left, right in zip(total.left, total.right, strict=True)
        ]
        whole = sum(left * right for left, right in sizes)
        if len(total.left) == 1 or whole == 0:
            return start.float()
        means = [torch.zeros(side, side, dtype=torch.float64, device=start.device) for side in start.shape]
        for left, right, (own, other) in zip(total.left, total.right, sizes, strict=True):
            means[0].add_(left.double(), alpha=other / whole)
            means[1].add_(right.double(), alpha=own / whole)
        inverses = [damped_inverse(mean, self.damping) for mean in means]
        change = descend(
            total.apply,
            residual,
            iterations=self.iterations,
            tolerance=self.tolerance,
            floor=torch.finfo(torch.float32).eps * float(total.target.norm()),
            precondition=lambda x: inverses[0] @ x @ inverses[1],
        )
        return (start + change).float()

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix, for as many iterations as there may be."""
        d_out, d_in = shape
        entries, squares = d_out * d_in, d_out**2 + d_in**2
        step = 2.0 * (tasks + 1) * entries * (d_out + d_in)
        held = 4 * tasks * squares + 8 * (3 * squares + 9 * entries)
        return Cost(flops=(self.iterations + 2) * step + 14.0 * (d_out**3 + d_in**3), memory=held + 8 * max(d_out, d_in) ** 2)
