"""Fisher merging: the mean of the models, each parameter weighed by how much its task's likelihood depends on it.

Matena and Raffel, NeurIPS 2022, <https://arxiv.org/abs/2111.09832>, with diagonal Fisher matrices: θ = Σ c_i F_i θ_i / Σ c_i F_i, here in
task vectors: θ₀ + Σ c_i F_i τ_i / Σ c_i F_i. As in the authors' code each F_i is divided by its norm over all tensors first, so that a
task with steep losses does not outvote the others. Departs from it once: their floor of 1e-6 stands under the *target's* Fisher alone, so
that the target decides where no task has an opinion; there is no target here, and the floor stands under every one: the mean decides.

The Fishers are evidence: `thetau evidence fisher` collects the diagonal of per-example squared gradients.

Use it when some hundreds of unlabelled examples of each task are at hand and the tasks depend on different parameters. It costs gradients of
those examples once, a file as large as the model for each task, and then two passes over models and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.errors import AlignmentError
from thetau.methods.fields import Coefficient, Elsewhere, NotNegative, Tensors, Varies, part_of
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Selection, Site, Varying
from thetau.statistics.evidence import EvidenceSquares
from thetau.sums import sum_in_order

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KIND = "fisher"


@register("fisher", paper="Matena and Raffel, NeurIPS 2022, https://arxiv.org/abs/2111.09832")
@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    r"""$\tau = \lambda \sum_i c_i \hat F_i \odot \tau_i / \sum_i c_i \hat F_i$, $\hat F_i$ the diagonal Fisher information of task $i$'s model.

    - `coefficients`: c; a number, one a task (a list, or `per_task`), or one a pattern of tensor names (`per_pattern`).
    - `floor`: added to every entry of F_i, in units of the root mean square of its entries; where all F_i are zero it gives the mean.
    - `normalise`: divide each F_i by its norm over all tensors, as the authors do.
    """

    coefficients: Annotated[Varying, Varies(task=True, pattern=True)] = 1.0
    floor: NotNegative = 1e-6
    normalise: bool = True
    scale: Coefficient = 1.0
    tensors: Tensors = "all"
    elsewhere: Elsewhere = "mean"

    def chain(self) -> Chain:
        """The weighted mean, then λ."""
        return Chain(
            reduction=FisherMean(**part_of(FisherMean, self)),
            post=(Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
        )


@dataclass(frozen=True, kw_only=True)
class FisherMean(BlockReduction):
    """The reduction of `Fisher`: its state is, by task, what F_i is multiplied by and what is then added, float64 `[task, 2]`."""

    needs: ClassVar[tuple[str, ...]] = (KIND,)
    coefficients: Varying = 1.0
    floor: float = 1e-6
    normalise: bool = True

    def requires(self) -> EvidenceSquares:
        """The norms of the Fishers."""
        return EvidenceSquares(kind=KIND)

    def prepare(self, result: Float[Tensor, "task 2"], tasks: tuple[str, ...]) -> Float[Tensor, "task 2"]:
        """Factor and floor.

        Raises:
            AlignmentError: a task's Fisher is zero, or not finite.
        """
        squares, counts = result.unbind(1)
        for task, square in zip(tasks, squares.tolist(), strict=True):
            if not 0 < square < float("inf"):
                what = "zero everywhere" if square == 0 else "not finite"
                raise AlignmentError(
                    f"{task}: its Fisher information is {what}. Collect it with more examples, from the model that is merged."
                )
        factor = 1 / squares.sqrt() if self.normalise else torch.ones_like(squares)
        return torch.stack([factor, self.floor * factor * (squares / counts).sqrt()], 1)

    def reduce(self, stack: Float[Tensor, "task *block"], state: Float[Tensor, "task 2"], site: Site) -> Float[Tensor, "*block"]:
        """A block's weighted mean; the plain one where no task has any weight."""
        given = site.evidence[KIND]
        if bool((given < 0).any()):
            raise AlignmentError(f"{site.name!r}: its Fisher information is negative somewhere, so it is none. Collect it again.")
        weights = torch.stack(
            [
                ((row.double() * factor + floor) * c).to(stack.dtype)
                for row, (factor, floor), c in zip(given, state.tolist(), site.per_task(self.coefficients), strict=True)
            ]
        )
        total = sum_in_order(weights)
        mean = sum_in_order(stack) / len(stack)
        return torch.where(total > 0, sum_in_order(weights * stack) / total.clamp(min=torch.finfo(total.dtype).tiny), mean)
