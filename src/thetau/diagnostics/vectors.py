r"""What task vectors are to each other, tensor by tensor, in one walk: products, entries, directions, and what a merge would do to each.

The last is WUDI's objective (Cheng et al., ICML 2025, <https://arxiv.org/abs/2503.08099>, Eq. 21) as an estimate: a task's own rows stand for
the inputs of its layer, so $\lVert(\tau_m - \tau_i)\,\tau_i^\top\rVert$ is how far a merge τ_m is from doing to them what τ_i does. Of matrices with
more than `WHOLE` rows the norm is estimated from `SIGNS` random signed sums of rows (Hutchinson); numerator and denominator share them. Of more
than `MANY` tasks, whose pairs are what costs, all matrices are, from fewer sums, and entries are compared on fewer places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from thetau._lazy import torch
from thetau.checkpoint.naming import Kind
from thetau.checkpoint.window import Window
from thetau.diagnostics.spectra import WHOLE, Decomposition, Directions, decomposition, fits, working
from thetau.engine.aligned import Aligned
from thetau.engine.executor import Engine
from thetau.engine.window import BLOCK, blocks, windows
from thetau.engine.work import Call
from thetau.linalg.sketch import signs
from thetau.methods.wudi_solvers import Interference
from thetau.parts import Chain, Method, Selection, Site, StreamReduction, as_float
from thetau.plan import Step
from thetau.random import stream
from thetau.vectors import Combination

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SIGNS = 64  # signed sums of rows that stand for all rows of a tall matrix
SAMPLE = 1 << 22  # entries of a tensor that signs and sizes are compared on, at most about
PAIRED = 1 << 28  # the same times the number of tasks squared
MANY, FEWEST = 16, 8  # tasks up to which small matrices are taken whole, and signed sums that are always made
MATRICES = (Kind.ATTENTION, Kind.MLP, Kind.LINEAR)
BLOCKS = (Kind.ATTENTION, Kind.MLP)
EFFORT = 2e13  # operations that trying one method may take


@final
@dataclass(frozen=True, kw_only=True)
class Products:
    """At one matrix of a block, with R_i a task's rows or signed sums of them. All in float64.

    - `cross[j, i]`: ‖τ_j R_iᵀ‖². `own[i]`: ‖τ_i R_iᵀ‖². `square[i]`: ‖τ_i‖².
    - `sums[i]`, `along[i]`: ‖Σ_j τ_j R_iᵀ‖² and ⟨Σ_j τ_j R_iᵀ, τ_i R_iᵀ⟩ of the sum of those that are merged, so that any multiple of it is known.
    - `left[method][i]`: ‖(τ_m − τ_i) R_iᵀ‖² of the methods that were tried.
    """

    cross: Float[Tensor, "task task"]
    own: Float[Tensor, " task"]
    square: Float[Tensor, " task"]
    sums: Float[Tensor, " task"]
    along: Float[Tensor, " task"]
    left: Mapping[str, Float[Tensor, " task"]] = field(default_factory=dict)

    def scaled(self, scale: float) -> Float[Tensor, " task"]:
        """‖(λ Σ_j τ_j − τ_i) R_iᵀ‖² at λ = `scale`."""
        return (scale * scale * self.sums - 2 * scale * self.along + self.own).clamp(min=0)


@final
@dataclass(frozen=True, kw_only=True)
class Overlap:
    """On the entries that were looked at: Σ min(|a|, |b|), Σ|a| by task, and the first sum where the signs are opposed."""

    least: Float[Tensor, "task task"]
    size: Float[Tensor, " task"]
    against: Float[Tensor, "task task"]


@final
@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of the leading directions two tasks share, and what random ones would: mean squared cosines between the spans."""

    inputs: Float[Tensor, "task task"]
    outputs: Float[Tensor, "task task"]
    inputs_by_chance: float
    outputs_by_chance: float


@final
@dataclass(frozen=True, kw_only=True)
class TensorFigures:
    """One tensor, or one matrix of a tensor that holds several. `base`: ‖θ₀‖². `gram`: ⟨τ_i, τ_j⟩. `short`: too large for the budget."""

    name: str
    kind: Kind
    layer: int | None
    shape: tuple[int, ...]
    base: float
    gram: Float[Tensor, "task task"]
    overlap: Overlap
    directions: tuple[Directions, ...] = ()
    shares: Shares | None = None
    products: Products | None = None
    short: bool = False

    @property
    def elements(self) -> int:
        """How many entries it has."""
        return int(torch.Size(self.shape).numel())


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """All tensors, in the order of the files. `dropped`: methods that would have taken too long, and their operations."""

    tensors: tuple[TensorFigures, ...] = ()
    sampled: int = 0
    dropped: Mapping[str, float] = field(default_factory=dict)


def measure(
    vectors: Mapping[str, Combination],
    *,
    tried: Mapping[str, Method],
    among: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Measured:
    """One walk over task vectors that share a base, which may be one alone.

    `tried`: methods whose reduction is fed task by task, by the name that the result gives them. `among`: those that are merged; all.

    Raises:
        AlignmentError: the vectors do not fit each other.
        CheckpointError: a tensor is damaged.
    """
    engine = engine or Engine()
    chain = Chain(reduction=Interference(), selection=Selection(tensors="all"), split_fused=True)
    aligned = Aligned(vectors, chain, label="the doctor", exclude=exclude)
    merged = tuple(vectors) if among is None else tuple(among)
    walk = _Walk(aligned, list(vectors.values()), tuple(vectors), engine, merged)
    reductions = {
        name: reduction for name, method in tried.items() if isinstance(reduction := method.chain().reduction, StreamReduction)
    }
    flops = {
        name: sum(reduction.cost(shape, len(merged)).flops for shape in walk.matrices()) for name, reduction in reductions.items()
    }
    dropped = {name: count for name, count in flops.items() if count > EFFORT}
    walk.tried = {name: one for name, one in reductions.items() if name not in dropped} if len(merged) > 1 else {}
    steps = walk.steps()
    found = tuple(figures for _, figures in engine.run(steps, Call(walk.look), "Looking at the vectors", held=walk.held))
    most = entries_for(len(vectors))
    sampled = sum(spec.elements > most for spec in (aligned.alignment.specs[step.name] for step in steps))
    return Measured(tensors=found, sampled=sampled, dropped=dropped)


def entries_for(tasks: int) -> int:
    """How many entries of a tensor are compared, about."""
    return max(1024, min(SAMPLE, PAIRED // (tasks * tasks)))


def sums_for(d_out: int, tasks: int) -> int | None:
    """How many signed sums stand for a matrix's rows; None where the rows themselves do.

    Examples:
        >>> sums_for(384, 6), sums_for(4096, 6), sums_for(384, 64)
        (None, 64, 16)
    """
    if tasks <= MANY:
        return SIGNS if d_out > WHOLE else None
    return min(d_out, max(FEWEST, SIGNS * MANY // tasks))


@dataclass
class _Walk:
    """What a step needs; `names` are the tasks as they were given."""

    aligned: Aligned
    vectors: list[Combination]
    names: tuple[str, ...]
    engine: Engine
    merged: tuple[str, ...]
    tried: Mapping[str, StreamReduction] = field(default_factory=dict)
    short: frozenset[str] = frozenset()

    def matrices(self) -> list[tuple[int, int]]:
        """The shapes of the blocks' matrices."""
        return [
            (spec.shape[0], spec.shape[1])
            for name in self.aligned.alignment.names
            if fits((spec := self.aligned.alignment.specs[name]).shape) and self.aligned.site(name).kind in BLOCKS
        ]

    @property
    def held(self) -> int:
        """Bytes of the results: six matrices of tasks by tasks for each tensor."""
        return 6 * 8 * len(self.vectors) ** 2 * len(self.aligned.alignment.names)

    def steps(self) -> list[Step]:
        """A step a tensor; matrices whose stack the budget cannot hold are only walked over."""
        steps, short = [], []
        tasks = len(self.vectors)
        for name in self.aligned.alignment.names:
            spec = self.aligned.alignment.specs[name]
            read = sum(source.demand(theirs).read for source, theirs in self.aligned.readers(name))
            window = min(spec.elements, self.engine.reach(len(self.aligned.sources))) * 4 * (3 * tasks + 4)
            beside = max((source.demand(theirs).memory for source, theirs in self.aligned.readers(name)), default=0)
            whole = 0
            if self.wanted(name):
                rows = sums_for(spec.shape[0], tasks) or spec.shape[0]
                products = 4 * (2 * tasks * spec.shape[0] * rows + 2 * spec.shape[1] * rows)
                merges = max((one.cost((spec.shape[0], spec.shape[1]), tasks).memory for one in self.tried.values()), default=0)
                whole = 4 * (tasks + 2) * spec.elements + max(working(spec.shape), products, merges)
                if window + whole + beside + self.held > self.engine.max_memory:
                    short.append(name)
                    whole = 0
            steps.append(Step(name, read, window + whole + beside))
        self.short = frozenset(short)
        return steps

    def wanted(self, name: str) -> bool:
        """Whether it is a matrix whose directions are counted."""
        return fits(self.aligned.alignment.specs[name].shape) and self.aligned.site(name).kind in MATRICES

    def look(self, step: Step) -> TensorFigures:
        """All figures of one tensor."""
        name, tasks = step.name, len(self.vectors)
        spec, site = self.aligned.alignment.specs[name], self.aligned.site(name)
        keep = self.wanted(name) and name not in self.short
        held = torch.empty((tasks, *spec.shape)) if keep else None
        gram = torch.zeros(tasks, tasks, dtype=torch.float64)
        overlap = _Entries.empty(tasks)
        base, most = 0.0, entries_for(tasks)
        every = max(1, min(-(-spec.elements // most), spec.elements // BLOCK))  # of blocks
        within = max(1, -(-spec.elements // (every * most)))  # of the entries of a block
        nested = any(source.whole(theirs) for source, theirs in self.aligned.readers(name))
        reach = spec.elements if nested else self.engine.reach(len(self.aligned.sources))
        number = 0
        for low, high in windows(spec, reach):
            window = Window(name, low, high)
            for start, stop in blocks(spec, low, high):
                stack = self.aligned.reading.stack(self.vectors, window, start, stop)
                rows = stack.reshape(tasks, -1)
                exact = rows.double()
                gram += exact @ exact.T
                if number % every == 0:
                    overlap.take(rows[:, ::within])
                number += 1
                if self.aligned.reference is not None and name in self.aligned.alignment.maps[self.aligned.reference.key]:
                    base += float(as_float(self.aligned.base(window, start, stop)).double().square().sum())
                if held is not None:
                    held[:, start:stop] = stack
        found = _matrices(held, site, self) if held is not None and bool(gram.isfinite().all()) else None
        return TensorFigures(
            name=name,
            kind=site.kind,
            layer=site.layer,
            shape=spec.shape,
            base=base,
            gram=(gram + gram.T) / 2,
            overlap=overlap.done(),
            directions=() if found is None else found[0],
            shares=None if found is None else found[1],
            products=None if found is None else found[2],
            short=name in self.short,
        )


@dataclass
class _Entries:
    least: Tensor
    size: Tensor
    against: Tensor

    @classmethod
    def empty(cls, tasks: int) -> _Entries:
        square = torch.zeros(tasks, tasks, dtype=torch.float64)
        return cls(square, torch.zeros(tasks, dtype=torch.float64), square.clone())

    def take(self, rows: Float[Tensor, "task entry"]) -> None:
        """Add some entries."""
        sizes = rows.abs()
        self.size += sizes.double().sum(1)
        below = rows < 0
        for i in range(1, len(rows)):
            least = torch.minimum(sizes[i], sizes[:i])
            self.least[i, :i] += least.double().sum(1)
            self.against[i, :i] += (least * (below[i] ^ below[:i])).double().sum(1)  # where one is 0 the least is

    def done(self) -> Overlap:
        """Symmetric; a vector lies over itself."""
        least, against = self.least + self.least.T, self.against + self.against.T
        return Overlap(least=least + torch.diag(self.size), size=self.size, against=against)


def _matrices(
    stack: Float[Tensor, "task d_out d_in"], site: Site, walk: _Walk
) -> tuple[tuple[Directions, ...], Shares | None, Products | None]:
    """Directions of each, what they share, and products where the matrix stands in a block."""
    names = walk.names
    parts = [decomposition(one, stream("doctor", name, site.name)) for name, one in zip(names, stack, strict=True)]
    products = None
    if site.kind in BLOCKS and len(stack) > 1:
        among = [names.index(name) for name in walk.merged]
        made = {
            word: merged_by(reduction, stack[among], walk.merged, lambda task: walk.aligned.site(site.name, 0, (task,)))
            for word, reduction in walk.tried.items()
        }
        products = products_of(stack, made, site.name, among)
    return tuple(part.directions for part in parts), shares_of(parts), products


def merged_by(
    reduction: StreamReduction, stack: Float[Tensor, "task d_out d_in"], names: Sequence[str], site: Callable[[str], Site]
) -> Tensor:
    """What a reduction that is fed task by task makes of a stack; `site` gives the place with the task that is fed."""
    order = sorted(range(len(names)), key=lambda i: names[i])  # as the engine feeds them
    total = reduction.init(stack.shape[1], stack.shape[2], len(stack))
    for i in order:
        total = reduction.add(total, stack[i], site(names[i]))
    merged: Tensor = reduction.result(total, site(names[order[0]]))
    return merged


def shares_of(parts: Sequence[Decomposition]) -> Shares | None:
    """Of each two spans, ‖U_aᵀU_b‖² over the smaller number of directions; None for a single task, or where one has no direction."""
    counts = [part.inputs.shape[1] for part in parts]
    if len(parts) < 2 or min(counts) == 0:
        return None

    def shared(sides: Sequence[Tensor]) -> Tensor:
        found = torch.ones(len(sides), len(sides), dtype=torch.float64)
        for i, a in enumerate(sides):
            for j, b in enumerate(sides[:i]):
                found[i, j] = found[j, i] = float((a.T @ b).double().square().sum()) / min(counts[i], counts[j])
        return found

    most = max(counts)
    return Shares(
        inputs=shared([part.inputs for part in parts]),
        outputs=shared([part.outputs for part in parts]),
        inputs_by_chance=min(1.0, most / parts[0].inputs.shape[0]),
        outputs_by_chance=min(1.0, most / parts[0].outputs.shape[0]),
    )


def products_of(
    stack: Float[Tensor, "task d_out d_in"],
    merged: Mapping[str, Float[Tensor, "d_out d_in"]],
    name: str,
    among: Sequence[int] | None = None,
) -> Products:
    """Eq. 21's terms at one matrix, exactly up to `WHOLE` rows; `among` are the tasks that are summed, by default all.

    Examples:
        >>> import torch
        >>> found = products_of(torch.stack([torch.eye(2), 2 * torch.eye(2)]), {}, "w")
        >>> found.cross.tolist(), found.scaled(1.0).tolist()
        ([[2.0, 8.0], [8.0, 32.0]], [8.0, 8.0])
    """
    tasks, d_out, _ = stack.shape
    count = sums_for(d_out, tasks)
    sketch = signs(d_out, count, stream("doctor-rows", name)) / count**0.5 if count is not None else None
    cross = torch.zeros(tasks, tasks, dtype=torch.float64)
    own, sums, along = (torch.zeros(tasks, dtype=torch.float64) for _ in range(3))
    left = {word: torch.zeros(tasks, dtype=torch.float64) for word in merged}
    for i, vector in enumerate(stack):
        rows = vector.T if sketch is None else vector.T @ sketch  # [d_in, rows]
        acts = stack @ rows
        cross[:, i] = acts.double().square().sum((1, 2))
        total = (acts if among is None else acts[list(among)]).double().sum(0)
        mine = acts[i].double()
        own[i], sums[i], along[i] = cross[i, i], total.square().sum(), (total * mine).sum()
        for word, matrix in merged.items():
            left[word][i] = ((matrix @ rows).double() - mine).square().sum()
    return Products(cross=cross, own=own, square=stack.double().square().sum((1, 2)), sums=sums, along=along, left=left)
