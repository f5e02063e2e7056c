"""A method inside another one, whose own stages see the task vectors as they are and not as the inner transforms leave them.

The masks of TALL, for one, compare the merged vector with the whole task vectors, while TIES merges trimmed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thetau.parts import BlockReduction, Chain, Cost, Reduction, Site, State, Statistic, Transform

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def over_whole_vectors(inner: Chain, owner: str) -> Chain:
    """The same chain, of which later stages get the stack before its transforms.

    Raises:
        ValueError: it cannot be said so: its transforms come before a reduction of whole matrices, a part needs evidence, or its own
            post-stages look at the transformed stack.
    """
    if inner.emit is not None:
        raise ValueError(f"`{owner}(then=...)` must be a method with one output. Got one that emits several.")
    if not inner.transforms:
        return inner
    reduction = inner.reduction
    blocks = isinstance(reduction, BlockReduction) and all(part.access == "block" for part in inner.transforms)
    needs = any(part.needs for part in (*inner.transforms, reduction))
    if not blocks or needs or any(stage.reads_stack for stage in inner.post):
        raise ValueError(
            f"`{owner}(then=...)` must be a method without transforms, or one that merges entry by entry from the task vectors alone. "
            f"Got {type(reduction).__name__} after {', '.join(type(part).__name__ for part in inner.transforms)}."
        )
    assert isinstance(reduction, BlockReduction)
    return replace(inner, transforms=(), reduction=Nested(transforms=inner.transforms, reduction=reduction))


@dataclass(frozen=True, kw_only=True)
class Nested(BlockReduction):
    """Transforms and an elementwise reduction as one reduction of the untouched stack; its state is that of every stage."""

    transforms: tuple[Transform, ...]
    reduction: BlockReduction

    @property
    def stages(self) -> tuple[Transform | BlockReduction, ...]:
        """The stages in the order in which they act."""
        return (*self.transforms, self.reduction)

    def requires(self) -> Stages | None:
        """What the stages must know, one after the other."""
        return Stages(stages=self.stages) if any(part.requires() is not None for part in self.stages) else None

    def prepare(self, result: Progress | None, tasks: tuple[str, ...]) -> tuple[State, ...]:
        """The states of all stages."""
        return result.states if result is not None else tuple(part.prepare(None, tasks) for part in self.stages)

    def solving(self, tasks: int, elements: Sequence[int]) -> Cost:
        """What the stages' own take, added."""
        costs = [part.solving(tasks, elements) for part in self.stages]
        return Cost(sum(cost.flops for cost in costs), sum(cost.memory for cost in costs))

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations added; the memory of the hungriest stage, and the transformed stack."""
        costs = [part.cost(shape, tasks) for part in self.stages]
        return Cost(sum(cost.flops for cost in costs), max(cost.memory for cost in costs))

    def notes(self, state: tuple[State, ...]) -> list[str]:
        """What the stages have to say."""
        return [line for part, mine in zip(self.stages, state, strict=True) for line in part.notes(mine)]

    def weights(self, site: Site) -> list[float]:
        """Those of the reduction."""
        return self.reduction.weights(site)

    def reduce(self, stack: Float[Tensor, "task *block"], state: tuple[State, ...], site: Site) -> Float[Tensor, "*block"]:
        """A block through all stages."""
        for part, mine in zip(self.transforms, state, strict=False):
            stack = part.apply(stack, mine, site)
        return self.reduction.reduce(stack, state[-1], site)


@dataclass(frozen=True)
class Progress:
    """How far the passes are: the states of the stages that are done, and what the next one's statistic has seen so far."""

    states: tuple[State, ...]
    round: int = 0
    seen: Any = None


@dataclass(frozen=True)
class Running:
    """A total of one stage's statistic over some tensors; of one that stands by tensor, their results by name once `done`."""

    tasks: tuple[str, ...]
    statistic: Statistic
    value: Any
    name: str = ""
    seen: Any = None
    done: bool = False

    def results(self) -> dict[str, Any]:
        """The results by tensor."""
        return self.value if self.done else {self.name: self.statistic.finish(self.value, self.seen)}


@dataclass(frozen=True, kw_only=True)
class Stages(Statistic):
    """The statistics of several stages, each of its own input, in the rounds of one."""

    stages: tuple[Transform | Reduction, ...]

    @property
    def rounds(self) -> int:
        """Those of all stages."""
        return sum(statistic.rounds for statistic in self._statistics)

    @property
    def _statistics(self) -> list[Statistic]:
        return [statistic for part in self.stages if (statistic := part.requires()) is not None]

    def add(self, total: Running | None, stack: Float[Tensor, "task *block"], site: Site, seen: Progress | None) -> Running:
        """A block of the stage that is at work, through the stages before it."""
        at = seen or self._on(Progress(()), site.tasks)
        for part, state in zip(self.stages, at.states, strict=False):
            assert isinstance(part, Transform)
            stack = part.apply(stack, state, site)
        statistic = self._at(at)
        mine = at.seen[site.name] if statistic.per_tensor and isinstance(at.seen, dict) else at.seen
        value = statistic.add(total.value if total is not None else None, stack, site, mine)
        return Running(site.tasks, statistic, value, site.name, mine)

    def fold(self, total: Running, other: Running) -> Running:
        """Two runs of tensors as one."""
        if total.statistic.per_tensor:
            return Running(total.tasks, total.statistic, {**total.results(), **other.results()}, done=True)
        return Running(total.tasks, total.statistic, total.statistic.fold(total.value, other.value))

    def finish(self, total: Running, seen: Progress | None) -> Progress:
        """One round further, or one stage."""
        at = seen or self._on(Progress(()), total.tasks)
        statistic = total.statistic
        result = total.results() if statistic.per_tensor else statistic.finish(total.value, at.seen)
        if at.round + 1 < statistic.rounds:
            return Progress(at.states, at.round + 1, result)
        part = self.stages[len(at.states)]
        return self._on(Progress((*at.states, part.prepare(result, total.tasks))), total.tasks)

    def memory(self, tasks: int, elements: int) -> int:
        """That of the hungriest statistic, and the transformed stack."""
        return max(statistic.memory(tasks, elements) for statistic in self._statistics)

    def held(self, tasks: int, elements: Sequence[int]) -> int:
        """What all keep."""
        return sum(statistic.held(tasks, elements) for statistic in self._statistics)

    def _at(self, at: Progress) -> Statistic:
        statistic = self.stages[len(at.states)].requires()
        assert statistic is not None
        return statistic

    def _on(self, at: Progress, tasks: tuple[str, ...]) -> Progress:
        """Past the stages that need to know nothing."""
        states = at.states
        while len(states) < len(self.stages) and self.stages[len(states)].requires() is None:
            states = (*states, self.stages[len(states)].prepare(None, tasks))
        return Progress(states, at.round, at.seen)
