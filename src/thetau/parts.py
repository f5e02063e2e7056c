"""The contract between the engine and the parts of a method.

A method is a chain: transforms, one reduction, post-stages. A part is a frozen dataclass of hyper-parameters with pure functions of
tensors; it never sees a file. What it must know of whole vectors it asks for as a `Statistic` of its own input; the engine makes the
passes and hands the result to `prepare` once. See docs/engine.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from thetau._lazy import torch
from thetau.checkpoint.align import matches
from thetau.checkpoint.naming import Kind, weighed_left
from thetau.errors import RecipeError, nearest
from thetau.fields import PerPattern as PerPattern
from thetau.fields import PerTask as PerTask
from thetau.fields import Varying as Varying
from thetau.fields import check
from thetau.random import element_bits, stream_keys

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Access = Literal["block", "stream", "whole"]
# Of evidence at one tensor: like the tensor, `[d_in, d_in]`, `[d_out, d_out]`, or 0-d.
Form = Literal["entries", "inputs", "outputs", "number"]
State = Any
PACE = 1.4e9  # of most parts in the compiled loop
SELECTIONS = ("all", "linear", "matrices")
BASE = ""  # the base's identity among the models, where a chain has it there; no task can be called so


@dataclass(frozen=True)
class Op:
    """A part as the compiled loop knows it (`engine/kernels.py`): a name, a number, numbers by task, integers by task.

    A part that has such a form says so with `compiles`, and gives it with `program`.
    """

    code: str
    value: float = 0.0
    by_task: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a part acts: one tensor, or a block of its rows; in a chain that reads more than blocks, one logical matrix of a stored tensor.

    `tasks` are the tasks' identities in the engine's canonical order (sorted), which is the order of the stack's first axis. `name` is that of
    the matrix where it is stored alone (`experts.3.gate_proj.weight`), `stored` that of the tensor that holds it.
    """

    name: str
    stored: str = ""
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None
    tasks: tuple[str, ...]
    seed: int = 0
    start: int = 0  # first row of the block
    row_elements: int = 1
    base: Tensor | None = None  # the base's block as the file stores it, for parts that need it
    evidence: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # for each kind that is needed: `[task, *block]`, stored likewise; of another form than `entries` the whole `[task, side, side]`, or `[task]`

    def weighed_left(self, shape: tuple[int, int]) -> bool:
        """Whether this matrix `[d_out, d_in]` faces the space that its block's function fixes with its output, not its input."""
        return weighed_left(self.name, shape, self.kind)

    def bits(self, task: int, count: int, salt: str = "") -> Int[Tensor, " count"]:
        """Random integers in [0, 2³¹), one an element of the block: a function of (seed, salt, task, tensor, element index) alone."""
        return element_bits((self.seed, salt, self.tasks[task], self.name), self.start * self.row_elements, count)

    def keys(self, task: int, element: int, salt: str = "") -> tuple[int, int]:
        """What `bits` derives its stream from, for the 2³¹ elements around one: for the compiled loop."""
        return stream_keys((self.seed, salt, self.tasks[task], self.name), element)

    def value(self, field_value: Varying) -> float:
        """A field's value at this tensor, where it does not vary by task."""
        return value_at(field_value, self.name, self.stored)

    def per_task(self, field_value: Varying) -> list[float]:
        """A field's values at this tensor, in the order of the stack."""
        return values_at(field_value, self.name, self.tasks, self.stored)

    def of_task(self, field_value: Varying) -> float:
        """A field's value at this tensor for the one task that a streaming reduction is fed."""
        (task,) = self.tasks
        value = field_value.values[task] if isinstance(field_value, PerTask) else field_value
        return value_at(value, self.name)


def value_at(value: Varying, name: str, stored: str = "") -> float:
    """A field's value at the tensor of that name, where it does not vary by task; `stored` is the tensor that holds it, if another."""
    if isinstance(value, PerPattern):
        if value.plain and name in value.values:
            return value.values[name]
        for pattern, number in value.values.items():
            if matches(name, [pattern]) or matches(stored, [pattern]):
                return number
        raise RecipeError([f'no pattern fits {name!r}; end with `"*": value`. Got {", ".join(value.values)}.'], "per_pattern")
    if isinstance(value, PerTask | tuple):
        raise RecipeError(["this field cannot vary by task; give one number or `per_pattern`."], "per_task")
    return value


def values_at(value: Varying, name: str, tasks: tuple[str, ...], stored: str = "") -> list[float]:
    """A field's values at the tensor of that name, in the order of the tasks."""
    if isinstance(value, PerTask):
        lost = [task for task in tasks if task not in value.values]
        extra = [task for task in value.values if task not in tasks]
        if lost or extra:
            problems = [f"no value for the task {task!r}." for task in lost]
            problems += [f"{task!r} is not a task.{nearest(task, tasks)} Tasks: {', '.join(tasks)}." for task in extra]
            raise RecipeError(problems, "per_task")
        return [value_at(value.values[task], name, stored) for task in tasks]
    if isinstance(value, tuple):
        raise RecipeError([f"a tuple of {len(value)} values names no task; give `per_task`."], "per_task")
    return [value_at(value, name, stored)] * len(tasks)


@dataclass(frozen=True)
class Cost:
    """What one piece of work costs: floating-point operations, and bytes of working memory."""

    flops: float = 0.0
    memory: int = 0


class Statistic(ABC):
    """A streaming reduction over the stack, in one or more rounds.

    Per tensor, `add` takes the tensor's blocks in order and returns the running total (None at first); unless `per_tensor`, the
    tensors' totals are then folded in the order of their names. `finish` makes the round's result: of one tensor, or of all. The
    next round sees it as `seen`; the last one is what `prepare` gets (a mapping from tensor name where `per_tensor`).
    """

    pace: ClassVar[float] = PACE  # bytes of input a second that one worker gets through, in the compiled loop

    @property
    def rounds(self) -> int:
        """Passes over the stack."""
        return 1

    @property
    def per_tensor(self) -> bool:
        """Whether each tensor has a result of its own."""
        return False

    @property
    def walks(self) -> int:
        """Walks over the inputs: the rounds of one tensor follow each other where it has a result of its own, and a guess mostly saves all but one."""
        return 1 if self.per_tensor or self.guided else self.rounds

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round, empty where it cannot make it."""
        return ("",) * self.rounds

    @property
    def guided(self) -> str:
        """What the compiled loop calls a round that has a guess, after which the others are mostly needless; empty where there is none."""
        return ""

    def guess(self, total: Any) -> Any:
        """What such a round had better look at, of the first round's total over a share of the entries, spread evenly; it sees it as `seen`."""
        raise NotImplementedError(f"{type(self).__name__} names a guided form and makes no guess: write `guess`.")

    def done(self, seen: Any) -> bool:
        """Whether the result of the round with the guess is the last one's already; the rounds begin anew where it is not."""
        return False

    @abstractmethod
    def add(self, total: Any, stack: Float[Tensor, "task *block"], site: Site, seen: Any) -> Any:
        """The running total with one more block in it."""

    @abstractmethod
    def fold(self, total: Any, other: Any) -> Any:
        """The totals of two runs of tensors as one; never called where `per_tensor`."""

    @abstractmethod
    def finish(self, total: Any, seen: Any) -> Any:
        """A round's result."""

    @abstractmethod
    def memory(self, tasks: int, elements: int) -> int:
        """Bytes held while one tensor of so many elements is worked on."""

    def held(self, tasks: int, elements: Sequence[int]) -> int:
        """Bytes of the result, over all tensors, given the elements of each."""
        return 0

    def inside(self, seen: Any) -> Any:
        """The bins that the compiled loop looks into (`engine.kernels.Inside`), after a round or a guess; None where it needs none."""
        return None

    def from_compiled(self, result: Any, site: Site, seen: Any) -> Any:
        """A tensor's total, from what the compiled loop counted (`engine.kernels.Result`)."""
        raise NotImplementedError(f"{type(self).__name__} names a compiled form and does not read it: write `from_compiled`.")


class Part(ABC):  # noqa: B024  what is abstract stands on its kinds
    """What all parts share. The defaults are those of a part that needs nothing, costs next to nothing and has no compiled form.

    A part is a frozen dataclass of hyper-parameters with pure functions of tensors; what it must know of whole vectors it asks for as
    a `Statistic` of its own input. The engine makes the passes and calls `prepare` once; every later call gets that state.
    """

    access: ClassVar[Access] = (
        "block"  # how it must see a tensor: any `block` of rows, task by task (`stream`), or the `whole` stack
    )
    needs: ClassVar[tuple[str, ...]] = ()  # evidence by task (`"fisher"`), and `"base"`: what `Site` must bring
    forms: ClassVar[Mapping[str, Form]] = {}  # of the evidence that has another one than `entries`, by kind
    pace: ClassVar[float] = PACE  # bytes of input a second that one worker gets through, in the compiled loop

    @property
    def rows_as_inputs(self) -> bool:
        """Whether it takes the rows of a task vector for a sample of what the layer reads, which those of an adapter are not."""
        return False

    def requires(self) -> Statistic | None:
        """The statistic of its own input that it needs: of the stack as the stages before left it."""
        return None

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> State:
        """What it makes of the statistic, once."""
        return None

    def check(self, site: Site) -> None:
        """Nothing, where its numbers go together at this tensor; asked before anything is read.

        Raises:
            RecipeError: they do not.
        """
        return None  # noqa: RET501  a part whose numbers always do

    def solving(self, tasks: int, elements: Sequence[int]) -> Cost:
        """What `prepare` costs, given the elements of each tensor."""
        return Cost()

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory at one tensor, beyond an elementwise walk over the stack."""
        return Cost()

    def compiles(self, site: Site) -> bool:
        """Whether `program` gives the compiled form at this tensor, whatever the state."""
        return False

    def program(self, state: State, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop, for elements from `element` on; called where `compiles` says so."""
        raise NotImplementedError(f"{type(self).__name__} says that it compiles and has no `program`.")

    def notes(self, state: State) -> list[str]:
        """Sentences for the summary of a run."""
        return []


class Transform(Part):
    """Stack → stack. `per_task` says that each task's rows are treated alone, so that tasks can be read one by one."""

    per_task: ClassVar[bool] = True

    @abstractmethod
    def apply(self, stack: Float[Tensor, "task *block"], state: State, site: Site) -> Float[Tensor, "task *block"]:
        """The stack of a block, of the same shape."""


class Reduction(Part):
    """Stack → one tensor: a `BlockReduction`, a `StreamReduction` or a `WholeReduction`."""

    def weights(self, site: Site) -> list[float]:
        """What each task counts in the mean or the sum that a tensor outside the selection gets (`Selection.elsewhere`)."""
        return [1.0] * len(site.tasks)

    def combination(self, tasks: Sequence[str]) -> dict[str, float] | None:
        """λ of each task, where the result is Σ λ_t τ_t with the same λ_t at every tensor; None where it is anything else."""
        return None


class BlockReduction(Reduction):
    """Stack → one tensor, elementwise: any block of rows will do."""

    @abstractmethod
    def reduce(self, stack: Float[Tensor, "task *block"], state: State, site: Site) -> Float[Tensor, "*block"]:
        """The merged block."""


class WholeReduction(Reduction):
    """Stack → one tensor, from the whole stack of it at once: all tasks are in memory, one tensor at a time, and the plan says so.

    Matrices come as `[task, d_out, d_in]` whatever the file stores (transposed, experts in one tensor, or fused where the chain splits them);
    other tensors as they are stored.
    """

    access: ClassVar[Access] = "whole"

    @abstractmethod
    def reduce(self, stack: Float[Tensor, "task *shape"], state: State, site: Site) -> Float[Tensor, "*shape"]:
        """The merged tensor."""

    @abstractmethod
    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations, and working memory beside the stack and the result."""


class StreamReduction(Reduction):
    """Stack → one matrix, fed task by task, so that memory need not grow with their number.

    `site.tasks` names the task that `add` gets; matrices are `[d_out, d_in]` whatever the file stores.
    """

    access: ClassVar[Access] = "stream"

    @abstractmethod
    def init(self, d_out: int, d_in: int, tasks: int) -> Any:
        """The total of no task."""

    @abstractmethod
    def add(self, total: Any, vector: Float[Tensor, "d_out d_in"], site: Site) -> Any:
        """The total with one more task in it."""

    @abstractmethod
    def result(self, total: Any, site: Site) -> Float[Tensor, "d_out d_in"]:
        """The merged matrix."""

    @abstractmethod
    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        """Operations and working memory of one matrix."""

    def alternatives(self) -> Mapping[str, StreamReduction]:
        """The same objective by other solvers, by what a recipe would say: for the plan."""
        return {}


class PostStage(Part):
    """Merged tensor → merged tensor, after the reduction.

    With `reads_stack` it is also given the stack as it went into the reduction, and its statistic (`requires`) is taken of the merged
    tensor and the stack, the merged one first. `reads_vectors` says that the stack which it is given is the one before the chain's transforms
    (its access must be `whole`). `everywhere` says that it also acts on what the selection left out.
    """

    reads_stack: ClassVar[bool] = False
    reads_vectors: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False

    @abstractmethod
    def adjust(
        self, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"] | None, state: State, site: Site
    ) -> Float[Tensor, "*block"]:
        """The merged block, of the same shape."""


class Emit(Part):
    """The end of a chain with several outputs: names, and what each of them holds. Lazy: an output is computed when it is read."""

    reads_merged: ClassVar[bool] = True

    @abstractmethod
    def names(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The outputs' names, given the tasks as they are sorted."""

    @abstractmethod
    def emit(
        self, name: str, merged: Float[Tensor, "*block"] | None, stack: Float[Tensor, "task *block"], state: State, site: Site
    ) -> Float[Tensor, "*block"]:
        """A block of one output; `merged` is None unless `reads_merged`."""

    def outside(
        self, name: str, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Float[Tensor, "*block"]:
        """A block of one output where the chain does not act: what the merged vector has there."""
        return merged

    def rank(self, shape: tuple[int, ...]) -> int | None:
        """The rank of what a task's output adds to the merged tensor of this shape; None where it is not a low one."""
        return None


@dataclass(frozen=True, kw_only=True)
class EachTask(Emit):
    """One output a task: its vector after the chain's transforms (AWD's disentangled vectors, Table 6 there)."""

    reads_merged: ClassVar[bool] = False

    def names(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks themselves."""
        return tasks

    def emit(
        self, name: str, merged: Float[Tensor, "*block"] | None, stack: Float[Tensor, "task *block"], state: State, site: Site
    ) -> Float[Tensor, "*block"]:
        """The task's own rows."""
        return stack[site.tasks.index(name)]

    def outside(
        self, name: str, merged: Float[Tensor, "*block"], stack: Float[Tensor, "task *block"], site: Site
    ) -> Float[Tensor, "*block"]:
        """The task's own rows there too."""
        return stack[site.tasks.index(name)]


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

    def takes(self, name: str, shape: tuple[int, ...], kind: Kind, stored: str = "") -> bool:
        """Whether the chain acts on this tensor; `stored` is the one that holds it, if another."""
        if self.tensors == "all":
            return True
        if self.tensors == "matrices":
            return len(shape) == 2
        if self.tensors == "linear":
            return len(shape) == 2 and kind in (Kind.ATTENTION, Kind.MLP)
        patterns = (self.tensors,) if isinstance(self.tensors, str) else self.tensors
        return matches(name, patterns) or matches(stored, patterns)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A method, taken apart: what the engine runs, checked when it is built.

    - `models`: the parts see models θ_t, not task vectors; what comes out, or is emitted, is a model too.
    - `with_base`: the base is one of the models, under the identity `BASE`, which sorts before every other.
    - `emit`: the outputs, where there are several; by default the merged vector alone.
    """

    reduction: Reduction
    transforms: tuple[Transform, ...] = ()
    post: tuple[PostStage, ...] = ()
    selection: Selection = field(default_factory=Selection)
    split_fused: bool = False  # merge fused q/k/v, and gate and up, as the matrices that they are; experts always are
    models: bool = False
    with_base: bool = False
    emit: Emit | None = None

    def __post_init__(self) -> None:
        if self.models and self.selection.elsewhere == "sum":
            raise TypeError("`Chain(models=True)` has no sum of models elsewhere: choose `base` or `mean`.")
        if self.with_base and not self.models:
            raise TypeError("`Chain(with_base=True)` needs `models=True`: among task vectors the base would be zero.")
        kinds: list[tuple[str, object, type[Part]]] = [("reduction", self.reduction, Reduction)]
        kinds += [("transforms", part, Transform) for part in self.transforms]
        kinds += [("post", part, PostStage) for part in self.post]
        kinds += [("emit", self.emit, Emit)] if self.emit is not None else []
        for where, part, kind in kinds:
            if not isinstance(part, kind):
                raise TypeError(f"`Chain({where}=...)` takes a `thetau.parts.{kind.__name__}`. Got {part!r}.")
        if type(self.reduction).__mro__[1:2] == (Reduction,) or self.reduction.access not in ("block", "stream", "whole"):
            raise TypeError(
                "`Chain(reduction=...)` takes a `BlockReduction`, a `StreamReduction` or a `WholeReduction` of `thetau.parts`. "
                f"Got {self.reduction!r}."
            )
        for stage in self.post:
            if stage.reads_vectors and stage.access != "whole":
                raise TypeError(f"`{type(stage).__name__}.access` must be `whole`: it reads the vectors before the transforms.")
        for part in (*self.transforms, *self.post):
            if part.access == "stream":
                raise TypeError(
                    f"`{type(part).__name__}.access` must be `block` or `whole`: only a reduction is fed task by task."
                )

    @property
    def stages(self) -> tuple[Part, ...]:
        """Transforms, reduction, post-stages and what is emitted, in the order in which they act; states stand in the same order."""
        return (*self.transforms, self.reduction, *self.post, *([self.emit] if self.emit is not None else []))

    @property
    def access(self) -> Access:
        """How the chain reads: any block of rows, a tensor task by task, or the whole stack of a tensor."""
        if any(part.access == "whole" for part in self.stages):
            return "whole"
        if self.reduction.access == "stream":
            return "whole" if self.reads_stack else "stream"
        return "block"

    @property
    def reads_stack(self) -> bool:
        """Whether something after the reduction still looks at the stack."""
        return self.emit is not None or any(stage.reads_stack for stage in self.post)

    @property
    def reads_vectors(self) -> bool:
        """Whether something after the reduction looks at the stack as it was before the transforms, where there are any."""
        return bool(self.transforms) and any(stage.reads_vectors for stage in self.post)

    @property
    def by_task(self) -> bool:
        """Whether a stream can be fed one task at a time."""
        return all(transform.per_task for transform in self.transforms)

    def combination(self, tasks: Sequence[str]) -> dict[str, float] | None:
        """λ of each task, where the chain is Σ λ_t τ_t over all tensors, so that nothing need be merged to evaluate it; else None."""
        alone = self.stages == (self.reduction,) and self.selection.tensors == "all" and not self.models
        return self.reduction.combination(tasks) if alone else None

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence that some part needs, sorted; without the base, which is there anyway."""
        return tuple(sorted({name for part in self.stages for name in part.needs} - {"base"}))

    @property
    def forms(self) -> Mapping[str, Form]:
        """The form of each kind of evidence that some part needs."""
        return {kind: next((part.forms[kind] for part in self.stages if kind in part.forms), "entries") for kind in self.needs}

    @property
    def needs_base(self) -> bool:
        """Whether the base's rows must be read."""
        return any("base" in part.needs for part in self.stages)

    def fields(self) -> Iterator[tuple[Part, str, Any]]:
        """Every hyper-parameter of every part, and of the parts that a part is made of."""
        for part in self.stages:
            yield from _fields(part)


class Method(ABC):
    """A named set of hyper-parameters, a frozen keyword-only dataclass, that says which chain it is.

    Each field says what it may hold (`thetau.fields`), and is checked against it here.

    - `takes`: the fewest and the most task vectors (or models) that it can merge; None for no limit.
    - `suits`: kinds of task vectors that its authors made it for: `"lora"`.
    """

    takes: ClassVar[tuple[int, int | None]] = (1, None)
    suits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def chain(self) -> Chain:
        """The parts that it is made of."""

    @property
    def needs_base(self) -> bool:
        """Whether it means something only over a base: it merges task vectors, or looks at the base."""
        chain = self.chain()
        return not chain.models or chain.with_base or chain.needs_base


def _fields(part: Part) -> Iterator[tuple[Part, str, Any]]:
    if is_dataclass(part):
        for entry in fields(part):
            value = part.__dict__[entry.name]
            yield part, entry.name, value
            if isinstance(value, Part):
                yield from _fields(value)


def evidence_shape(form: Form, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of one task's evidence at a matrix `[d_out, d_in]`; None where there can be none: it has no inputs and outputs."""
    if form == "entries":
        return shape
    if form == "number":
        return ()
    if len(shape) < 2:
        return None
    side = prod(shape[1:]) if form == "inputs" else shape[0]
    return side, side


def as_float(value: Tensor) -> Tensor:
    """Float32, or float64 where it is already."""
    return value if value.dtype == torch.float64 else value.float()
