"""The contract between the engine and the parts of a method.

A method is a chain: transforms, one reduction, post-stages. A part is a frozen dataclass of hyper-parameters with pure functions of
tensors; it never sees a file. What it must know of whole vectors it asks for as a `Statistic` of its own input; the engine makes the
passes and hands the result to `prepare` once. See docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thetau.checkpoint.align import matches
from thetau.checkpoint.naming import Kind
from thetau.engine.random import element_bits, stream_keys
from thetau.errors import RecipeError, nearest

Access = Literal["block", "stream"]
State = Any
SELECTIONS = ("all", "linear", "matrices")


@dataclass(frozen=True)
class PerTask:
    """A field's value by task; tasks are named as in the recipe."""

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("`PerTask` needs a value for at least one task.")


@dataclass(frozen=True)
class PerPattern:
    """A field's value by tensor name: the first shell-style pattern that fits decides, `"*"` last for the rest."""

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("`PerPattern` needs at least one pattern.")


Varying = float | tuple[float, ...] | PerTask | PerPattern  # a tuple stands in the order in which the tasks are given


@dataclass(frozen=True)
class Op:
    """A part as the compiled loop knows it (`engine/kernels.py`): a name, a number, numbers by task, integers by task.

    A part that has such a form says so with `fuse(state, site, element) -> list[Op]`; None where it has none for this state.
    """

    code: str
    value: float = 0.0
    by_task: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a part acts: one tensor, or a block of its rows.

    `tasks` are the tasks' identities in the engine's canonical order (sorted), which is the order of the stack's first axis.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None
    tasks: tuple[str, ...]
    seed: int = 0
    start: int = 0  # first row of the block
    row_elements: int = 1

    def bits(self, task: int, count: int, salt: str = "") -> Int[Tensor, " count"]:
        """Random integers in [0, 2³¹), one an element of the block: a function of (seed, salt, task, tensor, element index) alone."""
        return element_bits((self.seed, salt, self.tasks[task], self.name), self.start * self.row_elements, count)

    def keys(self, task: int, element: int, salt: str = "") -> tuple[int, int]:
        """What `bits` derives its stream from, for the 2³¹ elements around one: for the compiled loop."""
        return stream_keys((self.seed, salt, self.tasks[task], self.name), element)

    def value(self, field_value: Varying) -> float:
        """A field's value at this tensor, where it does not vary by task."""
        if isinstance(field_value, PerPattern):
            for pattern, value in field_value.values.items():
                if matches(self.name, [pattern]):
                    return value
            raise RecipeError(
                [f'no pattern fits {self.name!r}; end with `"*": value`. Got {", ".join(field_value.values)}.'], "per_pattern"
            )
        if isinstance(field_value, PerTask | tuple):
            raise RecipeError(["this field cannot vary by task; give one number or `per_pattern`."], "per_task")
        return field_value

    def per_task(self, field_value: Varying) -> list[float]:
        """A field's values at this tensor, in the order of the stack."""
        if isinstance(field_value, PerTask):
            lost = [task for task in self.tasks if task not in field_value.values]
            extra = [name for name in field_value.values if name not in self.tasks]
            if lost or extra:
                problems = [f"no value for the task {task!r}." for task in lost]
                problems += [
                    f"{name!r} is not a task.{nearest(name, self.tasks)} Tasks: {', '.join(self.tasks)}." for name in extra
                ]
                raise RecipeError(problems, "per_task")
            return [field_value.values[task] for task in self.tasks]
        return [self.value(field_value)] * len(self.tasks)


@runtime_checkable
class Statistic(Protocol):
    """A streaming reduction over the stack, in one or more rounds.

    Per tensor, `add` takes the tensor's blocks in order and returns the running total (None at first); unless `per_tensor`, the
    tensors' totals are then folded in the order of their names. `finish` makes the round's result: of one tensor, or of all. The
    next round sees it as `seen`; the last one is what `prepare` gets (a mapping from tensor name where `per_tensor`).
    """

    @property
    def rounds(self) -> int: ...
    @property
    def per_tensor(self) -> bool: ...
    def add(self, total: Any, stack: Float[Tensor, "task *block"], site: Site, seen: Any) -> Any: ...
    def fold(self, total: Any, other: Any) -> Any: ...
    def finish(self, total: Any, seen: Any) -> Any: ...
    def memory(self, tasks: int, elements: int) -> int:
        """Bytes held during a pass over `elements` elements a task in all."""


@runtime_checkable
class Transform(Protocol):
    """Stack → stack. `per_task` says that each task's rows are treated alone, so that tasks can be read one by one."""

    @property
    def per_task(self) -> bool: ...
    def requires(self) -> Statistic | None: ...
    def prepare(self, result: Any, tasks: tuple[str, ...]) -> State: ...
    def apply(self, stack: Float[Tensor, "task *block"], state: State, site: Site) -> Float[Tensor, "task *block"]: ...


@runtime_checkable
class BlockReduction(Protocol):
    """Stack → one tensor, elementwise: any block of rows will do."""

    def reduce(self, stack: Float[Tensor, "task *block"], state: State, site: Site) -> Float[Tensor, "*block"]: ...


@runtime_checkable
class StreamReduction(Protocol):
    """Stack → one matrix, fed task by task, so that memory does not grow with their number.

    `site.tasks` names the task that `add` gets; matrices are `[d_out, d_in]` whatever the file stores.
    """

    def init(self, d_out: int, d_in: int, tasks: int) -> Any: ...
    def add(self, total: Any, vector: Float[Tensor, "d_out d_in"], site: Site) -> Any: ...
    def result(self, total: Any, site: Site) -> Float[Tensor, "d_out d_in"]: ...
    def cost(self, d_out: int, d_in: int, tasks: int) -> Cost: ...


@runtime_checkable
class PostStage(Protocol):
    """Merged tensor → merged tensor."""

    def adjust(self, merged: Float[Tensor, "*block"], site: Site) -> Float[Tensor, "*block"]: ...


Reduction = BlockReduction | StreamReduction


@dataclass(frozen=True)
class Cost:
    """What one tensor costs: floating-point operations, and bytes of working memory."""

    flops: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tensors a chain acts on, and what the output gets elsewhere.

    `tensors` is `"all"`, `"linear"` (the weight matrices of the blocks: attention and MLP), `"matrices"` (whatever has two dimensions) or
    shell-style patterns. `elsewhere` is `"base"` (θ₀), `"mean"` or `"sum"` of the task vectors.
    """

    tensors: str | tuple[str, ...] = "all"
    elsewhere: Literal["base", "mean", "sum"] = "base"

    def __str__(self) -> str:
        chosen = self.tensors if isinstance(self.tensors, str) else ", ".join(self.tensors)
        return f"`tensors: {chosen}`"

    def takes(self, name: str, shape: tuple[int, ...], kind: Kind) -> bool:
        """Whether the chain acts on this tensor."""
        if self.tensors == "all":
            return True
        if self.tensors == "matrices":
            return len(shape) == 2
        if self.tensors == "linear":
            return len(shape) == 2 and kind in (Kind.ATTENTION, Kind.MLP)
        patterns = (self.tensors,) if isinstance(self.tensors, str) else self.tensors
        return matches(name, patterns)


def check_selection(owner: str, tensors: object, elsewhere: object) -> None:
    """The checks of the two fields that several methods share.

    Raises:
        ValueError: one of them is not what `Selection` allows.
    """
    plain = isinstance(tensors, str) or (isinstance(tensors, tuple) and tensors and all(isinstance(t, str) for t in tensors))
    if not plain:
        raise ValueError(f'`{owner}(tensors=...)` must be "all", "linear" or patterns of names. Got {tensors!r}.')
    if elsewhere not in ("base", "mean", "sum"):
        raise ValueError(f'`{owner}(elsewhere=...)` must be "base", "mean" or "sum". Got {elsewhere!r}.')


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A method, taken apart: what the engine runs."""

    reduction: Reduction
    transforms: tuple[Transform, ...] = ()
    post: tuple[PostStage, ...] = ()
    selection: Selection = field(default_factory=Selection)
    split_fused: bool = False  # merge fused q/k/v as the three matrices that they are

    @property
    def access(self) -> Access:
        """How the chain reads: any block of rows, or a tensor at a time."""
        return "stream" if isinstance(self.reduction, StreamReduction) else "block"

    @property
    def by_task(self) -> bool:
        """Whether a stream can be fed one task at a time."""
        return all(transform.per_task for transform in self.transforms)


@runtime_checkable
class Method(Protocol):
    """A named set of hyper-parameters that says which chain it is."""

    def chain(self) -> Chain: ...


def as_float(value: Tensor) -> Tensor:
    """Float32, or float64 where it is already."""
    return value if value.dtype == torch.float64 else value.float()
