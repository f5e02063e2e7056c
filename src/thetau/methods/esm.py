r"""ESM: of each task the directions in which its layer's outputs really move on a few of its examples, made orthogonal to those of the others.

Essential Subspace Merging, CVPR 2026, <https://arxiv.org/abs/2606.19164>; the authors' code for vision: kiddo127/ESM 42b30fd. The outputs of a
layer move by Xτ_iᵀ on inputs X of the task; E_i are their principal directions, uncentred, and λ_i their variances. Here both are of τ_iG_iτ_iᵀ
with G_i the mean of x xᵀ, which is the same but for the unit of λ, so that examples need not be kept: `thetau evidence gram --examples 32`
collects G_i, and 32 unlabelled examples are what the authors use. With k = ⌊d_out/K⌋ directions of each task, U = [E_1 … E_K] and V the stack of
the E_iᵀτ_i, the merged matrix is σ̄(U)pol(U) · σ̄(V)pol(V), σ̄ being the mean singular value and pol the polar factor, and λ = 2.

Three scalings stand around it, by which what is large becomes larger, all by the power 2: each task's V by the length of its τ_i over the tasks'
mean, each column of V by its length over the columns' mean, and each merged matrix by its length over the mean of its kind in all blocks.
Directions count with (λ/λ̄)^0.15 in U and in V. Departs from the code in four things. Where there are fewer examples than outputs the code fills E
with columns of the identity, which are not orthogonal to it; here directions without variance count nothing. Attention's output projection is
treated like every linear layer that has evidence, where the code takes TSV-M. Fused q/k/v may be taken apart. And the code takes its 32 images
from a tenth of the training set that it holds out; here that is a choice of the evidence.

Use it where a few unlabelled examples of each task are at hand and nothing can be tuned. It costs a forward pass over them once, an
eigendecomposition of the smaller side a task and matrix, two more of the vectors together, and a second walk for the lengths of the merged matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps
from thetau.linalg.svd import polar, polar_flops
from thetau.methods.fields import Coefficient, Elsewhere, NotNegative, SplitFused, Tensors, part_of
from thetau.methods.moments import check_moments
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Cost, Form, Method, PostStage, Selection, Site, Statistic, StreamReduction

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KIND = "gram"


@register("esm", paper="ESM, CVPR 2026, https://arxiv.org/abs/2606.19164")
@dataclass(frozen=True, kw_only=True)
class Esm(Method):
    r"""$\tau = \lambda\,\bar\sigma(U)\,\mathrm{pol}(U)\,\bar\sigma(V)\,\mathrm{pol}(V)$, $U$ the tasks' essential directions, $V$ what these hold of $\tau_i$.

    - `power`: of the lengths of tasks, columns and matrices over their means; 0 leaves them.
    - `spectrum`: the power with which a direction counts by its variance.
    """

    power: Annotated[NotNegative, "of the lengths over their means; 0 leaves them."] = 2.0
    spectrum: Annotated[NotNegative, "the power with which a direction counts by its variance."] = 0.15
    scale: Coefficient = 2.0
    tensors: Tensors = "all"
    elsewhere: Elsewhere = "mean"
    split_fused: SplitFused = False

    def chain(self) -> Chain:
        """The subspaces, the matrices' lengths, then λ."""
        return Chain(
            reduction=Essential(**part_of(Essential, self)),
            post=(Polarise(power=self.power), Scale(scale=self.scale)) if self.power else (Scale(scale=self.scale),),
            selection=Selection(tensors=self.tensors, elsewhere=self.elsewhere),
            split_fused=self.split_fused,
        )


@dataclass(kw_only=True)
class Subspaces:
    """What the tasks gave so far: their directions and what these hold of τ, each with how it counts, in float32.

    `rank`: directions of a task. `lengths`: ‖τ‖ of all tasks, `moving` of those that have directions.
    """

    shape: tuple[int, int]
    rank: int
    outputs: list[Float[Tensor, "d_out k"]] = field(default_factory=list)
    inputs: list[Float[Tensor, "k d_in"]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Essential(StreamReduction):
    """The reduction of `Esm`."""

    needs: ClassVar[tuple[str, ...]] = (KIND,)
    forms: ClassVar[dict[str, Form]] = {KIND: "inputs"}
    power: float = 2.0
    spectrum: float = 0.15

    def init(self, d_out: int, d_in: int, tasks: int) -> Subspaces:
        """Nothing yet."""
        return Subspaces(shape=(d_out, d_in), rank=max(1, d_out // tasks))

    def add(self, total: Subspaces, vector: Float[Tensor, "d_out d_in"], site: Site) -> Subspaces:
        """Take in one task; one whose outputs do not move on its examples has no direction.

        Raises:
            AlignmentError: its Gram matrix is none.
        """
        gram = site.evidence[KIND][0].to(vector.device, torch.float64)
        check_moments(gram, KIND, site)
        wide = vector.double()
        variances, directions = moves(wide, gram, total.rank)
        length = float(wide.norm())
        total.lengths.append(length)
        if float(variances[0]) <= 0:
            return total
        total.moving.append(length)
        weights = torch.where(variances > 0, (variances / variances.mean()) ** self.spectrum, 0)
        weights = weights / weights.mean()
        total.outputs.append((directions * weights).float())
        total.inputs.append((weights[:, None] * (directions.T @ wide)).float())
        return total

    def result(self, total: Subspaces, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The product of the polar factors, as long as their factors were."""
        if not total.outputs:
            return torch.zeros(total.shape)
        mean = sum(total.lengths) / len(total.lengths)
        outputs = torch.cat(total.outputs, 1)
        inputs = torch.cat([(one / mean) ** self.power * part for one, part in zip(total.moving, total.inputs, strict=True)])
        columns = inputs.norm(dim=0)
        inputs = inputs * (columns / columns.mean()) ** self.power
        made = []
        for matrix in (outputs, inputs):
            nearest, values = polar(matrix)
            made.append(nearest * (values.sum() / min(matrix.shape)))
        return made[0] @ made[1]

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""
        d_out, d_in = shape
        width = tasks * max(1, d_out // tasks)
        task = 2.0 * d_out * d_in * (d_in + d_out) + 28.0 * min(d_out, d_in) ** 3 + 2.0 * width / tasks * d_out * d_in
        last = polar_flops(d_out, width) + polar_flops(width, d_in) + 2.0 * d_out * width * d_in
        held = 2 * width * (d_out + d_in) + 4 * d_out * d_in
        return Cost(flops=tasks * task + last, memory=4 * held + 8 * (d_in**2 + 3 * d_out**2 + 2 * d_out * d_in))


def moves(
    vector: Float[Tensor, "d_out d_in"], gram: Float[Tensor, "d_in d_in"], count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "d_out count"]]:
    """The variances, falling, and principal directions of what a layer's outputs move by, uncentred; zero where there is none above rounding.

    Of τGτᵀ, or where there are more outputs than inputs of RᵀτᵀτR, R a root of G: the same, at the smaller side's cost.
    """
    d_out, d_in = vector.shape
    if d_out <= d_in:
        values, directions = torch.linalg.eigh(vector @ gram @ vector.T)
        values, directions = values.flip(0)[:count], directions.flip(1)[:, :count]
    else:
        sizes, basis = torch.linalg.eigh(gram)
        moved = vector @ (basis * sizes.clamp(min=0).sqrt())
        values, basis = torch.linalg.eigh(moved.T @ moved)
        values, basis = values.flip(0)[:count], basis.flip(1)[:, :count]
        directions = moved @ basis / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    real = values > values[0].clamp(min=0) * MARGIN * d_out * eps(torch.float32)
    pad = count - len(values)
    return torch.nn.functional.pad(values.where(real, 0), (0, pad)), torch.nn.functional.pad(directions.where(real, 0), (0, pad))


@dataclass(frozen=True, kw_only=True)
class Polarise(PostStage):
    """Each merged matrix times a power of its length over the mean length of its kind in all blocks; its state is the factors by name."""

    power: float = 2.0

    def requires(self) -> Lengths:
        """The merged matrices' lengths."""
        return Lengths()

    def prepare(self, result: Mapping[str, tuple[str, float]], tasks: tuple[str, ...]) -> dict[str, float]:
        """The factors."""
        kinds: dict[str, list[float]] = {}
        for kind, square in result.values():
            kinds.setdefault(kind, []).append(square**0.5)
        means = {kind: sum(lengths) / len(lengths) for kind, lengths in kinds.items()}
        return {
            name: (square**0.5 / means[kind]) ** self.power if means[kind] else 1.0 for name, (kind, square) in result.items()
        }

    def adjust(
        self,
        merged: Float[Tensor, "*block"],
        stack: Float[Tensor, "task *block"] | None,
        state: Mapping[str, float],
        site: Site,
    ) -> Float[Tensor, "*block"]:
        """A block of rows, scaled."""
        return merged * state.get(site.name, 1.0)


@dataclass(frozen=True, kw_only=True)
class Lengths(Statistic):
    """Of each tensor what it is called without the number of its block, and ‖Δ‖² of the merged one, which stands first in the stack."""

    @property
    def per_tensor(self) -> bool:
        """Each tensor has its own."""
        return True

    def add(
        self, total: tuple[str, float] | None, stack: Float[Tensor, "row *block"], site: Site, seen: None
    ) -> tuple[str, float]:
        """Take in a block of rows."""
        kind = site.name if site.layer is None else site.name.replace(f".{site.layer}.", ".*.", 1)
        return kind, (0.0 if total is None else total[1]) + float(stack[0].double().square().sum())

    def fold(self, total: tuple[str, float], other: tuple[str, float]) -> tuple[str, float]:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: tuple[str, float], seen: None) -> tuple[str, float]:
        """The sum itself."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """A number."""
        return 64
