r"""Twin-Merging: what all tasks share, and what of each is left, compressed.

Lu et al., NeurIPS 2024, <https://arxiv.org/abs/2406.15479>. The shared part is θ* = θ₀ + τ_m, merged by task arithmetic in the authors'
code (coefficient 0.29) and by any method here; a task's exclusive part is θ_t − θ*, of which a tenth is kept: of the singular values
(`svd`), of the entries by magnitude (`magnitude`), or of entries at random, rescaled (`bernoulli`), in each tensor; vectors and scalars
stay whole. A task's model is θ* plus its exclusive part: the outputs. This is the part without data. The paper then mixes the exclusive
parts for every input, Σ_t softmax(router)_t · exclusive_t, by a router that is trained on examples whose task is known: `thetau evidence twin`; `part:
exclusive` gives what the router mixes. Departs from the code in keeping at least one singular value, ⌈density · n⌉ entries, and in
taking a tensor of more than two axes as rows × the rest, where the code's slices fit matrices only.

Use it to keep each task's model beside a merged one at a low rank, when it is known at inference which task an input is of, or can be told by the
router: `thetau.outputs` gives them. It needs no data; `svd` decomposes every matrix of the task that is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from thetau.methods.fields import Portion
from thetau.methods.nested import over_whole_vectors
from thetau.methods.registry import register
from thetau.methods.task_arithmetic import TaskArithmetic
from thetau.parts import Chain, Cost, Emit, Method, Site, State, Statistic
from thetau.statistics import MagnitudeQuantile
from thetau.transforms import Drop, Trim, Truncate

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Piece = Literal["model", "exclusive"]


def parts_of(piece: Piece, merged: Float[Tensor, "*block"], exclusive: Float[Tensor, "*block"]) -> Float[Tensor, "*block"]:
    """A task's vector, or its exclusive part alone."""
    return merged + exclusive if piece == "model" else exclusive


class Exclusive(Emit):
    """One output a task: the shared vector and what is kept of the difference to the task's own, or that difference alone."""

    piece: Piece

    def names(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks themselves."""
        return tasks

    def outside(
        self, name: str, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Float[Tensor, "*block"]:
        """Where the inner method does not act vectors and scalars are whole there too, and matrices have no exclusive part."""
        own = stack[site.tasks.index(name)] if len(site.shape) < 2 else merged
        return parts_of(self.piece, merged, own - merged)


@dataclass(frozen=True, kw_only=True)
class ExclusiveRank(Exclusive):
    """The exclusive part at a low rank."""

    access: ClassVar = "whole"
    share: float
    piece: Piece

    def rank(self, shape: tuple[int, ...]) -> int | None:
        """How many singular values are kept; vectors and scalars stay whole, as does what stands alone without the merged one."""
        return Truncate(share=self.share).rank(shape) if len(shape) >= 2 and self.piece == "model" else None

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """One task's decomposition."""
        return Truncate(share=self.share).cost(shape, 1)

    def emit(
        self, name: str, merged: Float[Tensor, "*shape"] | None, stack: Float[Tensor, "task *shape"], state: State, site: Site
    ) -> Float[Tensor, "*shape"]:
        """A whole tensor of one task."""
        assert merged is not None
        difference = stack[site.tasks.index(name)] - merged
        if len(site.shape) >= 2 and difference.numel():
            difference = Truncate(share=self.share).truncated(difference, name, site)
        return parts_of(self.piece, merged, difference)


@dataclass(frozen=True, kw_only=True)
class ExclusiveEntries(Exclusive):
    """Some entries of the exclusive part: those of largest magnitude in each tensor, or random ones, rescaled."""

    keep: Trim | Drop
    piece: Piece

    def requires(self) -> Differences | None:
        """The cuts of the differences, where magnitudes count."""
        quantile = self.keep.requires()
        return Differences(quantile=quantile) if isinstance(quantile, MagnitudeQuantile) else None

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> Any:
        """The cuts by tensor and task."""
        return self.keep.prepare(result, tasks)

    def emit(
        self, name: str, merged: Float[Tensor, "*block"] | None, stack: Float[Tensor, "task *block"], state: State, site: Site
    ) -> Float[Tensor, "*block"]:
        """A block of one task."""
        assert merged is not None
        task = site.tasks.index(name)
        difference = (stack[task] - merged)[None]
        if len(site.shape) >= 2:
            difference = self.keep.apply(difference, state, replace(site, tasks=(name,)))
        return parts_of(self.piece, merged, difference[0])


@dataclass(frozen=True, kw_only=True)
class Differences(Statistic):
    """The exact cuts of τ_t − τ_m, tensor by tensor. It stands after the reduction, so the stack's first row is the merged vector."""

    quantile: MagnitudeQuantile

    @property
    def rounds(self) -> int:
        """Those of the quantile."""
        return self.quantile.rounds

    @property
    def per_tensor(self) -> bool:
        """Each tensor has its own cuts."""
        return True

    def add(self, total: Any, stack: Float[Tensor, "row *block"], site: Site, seen: Any) -> Any:
        """A block's differences."""
        return self.quantile.add(total, stack[1:] - stack[:1], site, seen)

    def fold(self, total: Any, other: Any) -> Any:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: Any, seen: Any) -> Any:
        """What the quantile says."""
        return self.quantile.finish(total, seen)

    def memory(self, tasks: int, elements: int) -> int:
        """That of the quantile."""
        return self.quantile.memory(tasks, elements)


@register("twin", paper="Lu et al., NeurIPS 2024, https://arxiv.org/abs/2406.15479")
@dataclass(frozen=True, kw_only=True)
class Twin(Method):
    r"""$\hat\tau_t = \tau_m + \mathrm{keep}(\tau_t - \tau_m)$ for each task; merged alone it is $\tau_m$.

    - `then`: the method that merges the shared part.
    - `density`: share of the singular values, or of the entries, of each tensor's exclusive part that is kept.
    - `keep`: which: the largest singular values (`svd`), the largest entries (`magnitude`), or random entries (`bernoulli`).
    - `part`: what an output is: the task's whole `model`, or its `exclusive` part alone.
    """

    then: Method = field(default_factory=lambda: TaskArithmetic(scale=0.29))
    density: Annotated[Portion, "share that is kept."] = 0.1
    keep: Annotated[Literal["svd", "magnitude", "bernoulli"], "what is kept."] = "svd"
    part: Annotated[Piece, "what an output is."] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        over_whole_vectors(self.then.chain(), "Twin")

    def chain(self) -> Chain:
        """The method; then a vector for each task."""
        return replace(over_whole_vectors(self.then.chain(), "Twin"), emit=self._emit())

    def _emit(self) -> Exclusive:
        if self.keep == "svd":
            return ExclusiveRank(share=self.density, piece=self.part)
        if self.keep == "magnitude":
            return ExclusiveEntries(keep=Trim(density=self.density, scope="tensor"), piece=self.part)
        return ExclusiveEntries(keep=Drop(rate=1 - self.density), piece=self.part)
