"""A merge as a lazy source: its statistics passes are made when something first reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from thetau.checkpoint import Slots, Source, Spec
from thetau.checkpoint.pieces import Piece
from thetau.checkpoint.source import Demand, computed, leaves
from thetau.checkpoint.window import Window
from thetau.engine import compiled
from thetau.engine.aligned import Aligned, Evidence
from thetau.engine.apply import Apply
from thetau.engine.demand import merge_demand
from thetau.engine.executor import Engine
from thetau.engine.guard import Guard
from thetau.engine.passes import Preparation, statistic_passes
from thetau.engine.window import read_rows, whole_tensor
from thetau.parts import Chain, EachTask, Emit, State, StreamReduction
from thetau.plan import TORCH_PACE, Pass
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor


class Merge(Source):
    """The merged task vector of K tasks under a chain, absent where the chain leaves the base alone; of K models a model, complete."""

    partial = True

    def __init__(
        self,
        tasks: Mapping[str, Combination],
        chain: Chain,
        *,
        label: str,
        seed: int = 0,
        exclude: Sequence[str] = (),
        engine: Engine | None = None,
        evidence: Evidence | None = None,
        made: Mapping[str, Any] | None = None,
        judge: bool = True,
        alarms: Sequence[str] = (),
    ) -> None:
        self._alarms = tuple(alarms)  # what lies beside the models and differs
        self.judge = judge  # whether to say which models are no relatives, and which vectors are too long
        self.aligned = Aligned(tasks, chain, label=label, seed=seed, exclude=exclude, evidence=evidence)
        self.engine = engine or Engine()
        self.degree = int(chain.models)
        self.label, self.key = label, f"merge:{id(self)}"
        self.guard = Guard(self.aligned.tasks)
        self.specs = self._stored()
        self.states: list[State] | None = None
        self._made = made  # how a recipe would say it
        self._lock = threading.Lock()
        self._passes = statistic_passes(self.aligned, self.engine)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' identities, sorted."""
        return self.aligned.tasks

    @property
    def reference(self) -> Source | None:
        """The base, where it is known."""
        return self.aligned.reference

    @property
    def notes(self) -> tuple[str, ...]:
        """What the alignment and the tasks have to say; of the norms and the parts, once something was read."""
        inner = [note for source in self.children() for note in source.notes]
        outside = (*self.aligned.notes(), *self._adapters())
        if self.states is None:
            return (*inner, *self.aligned.alignment.notes, *outside)
        said = [line for part, state in zip(self.aligned.chain.stages, self.states, strict=True) for line in part.notes(state)]
        zeros = () if self.aligned.chain.models else self.guard.notes()
        return (*inner, *self.aligned.alignment.notes, *outside, *said, *zeros)

    def _adapters(self) -> tuple[str, ...]:
        """A word on adapters, which have a merge of their own."""
        count = sum(source.over is not None for source in leaves(self.aligned.sources))
        if count < 2:
            return ()
        advice = "`thetau adapter merge` makes one adapter of them, and its default, `clear`, has nothing to tune."
        if any(part.rows_as_inputs for part in self.aligned.chain.stages):
            why = "This method takes the rows of task vectors for their tasks' inputs, which the rows of adapters are not, and merges adapters badly"
            return (f"{count} of these are adapters. {why} (docs/adapters.md). {advice}",)
        return (f"{count} of these are adapters. {advice}",)

    def fingerprint(self) -> str:
        """Not meaningful: a merge is computed, not stored."""
        return self.key

    def children(self) -> Sequence[Source]:
        """What the task vectors are made of, and the evidence."""
        return (*self.aligned.sources, *self.aligned.testimony)

    def guards(self) -> Sequence[Guard]:
        """What looks at the vectors as they are read."""
        return [self.guard]

    def recipe(self) -> Mapping[str, Any] | None:
        """How a recipe would say it."""
        return self._made

    def left_out(self, base: Source | None) -> Mapping[str, str]:
        """The tensors that the chain does not act on, and what they get."""
        return dict.fromkeys(self.aligned.outside, str(self.aligned.chain.selection.elsewhere))

    def excluded(self, base: Source | None) -> Sequence[str]:
        """What the recipe leaves out by name, and the buffers."""
        mine = self.reference
        return tuple(self.aligned.alignment.kept) if mine is not None and base is not None and mine.key == base.key else ()

    def warnings(self, base: Source | None) -> Sequence[str]:
        """Vectors too long for this base, of another base, models that are strangers, evidence of another model."""
        if not self.judge:
            return self.aligned.foreign_evidence()
        told = [*self.aligned.alignment.alarms, *self._alarms]
        label = self.reference.label if self.reference is not None else base.label if base is not None else "the base"
        others = self.aligned.strangers() if self.aligned.chain.models else self.aligned.other_bases(base)
        return [*self.guard.warnings(label), *others, *told, *self.aligned.foreign_evidence()]

    def _stored(self) -> dict[str, Spec]:
        """The stored tensors of which the merged vector is not zero by definition, whatever they hold."""
        aligned = self.aligned
        held = {aligned.holders[name].name if name in aligned.holders else name for name in aligned.specs}
        return {name: aligned.stored.specs[name] for name in aligned.stored.names if name in held}

    # Rows.

    def prepare(self) -> None:
        """Make the statistics passes, once."""
        for source in self.children():
            source.prepare()
        with self._lock:
            if self.states is None:
                guards = [guard for source in computed([self]) for guard in source.guards()]
                self.states = Preparation(self.aligned, self.engine, self.guard, self._passes, guards).states()

    def apply(self) -> Apply:
        """The chain at work; `prepare` must have run."""
        assert self.states is not None
        return Apply(self.aligned, self.engine, self.guard, self.states, check=not self._passes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the merged vector, in float32."""
        self.prepare()
        return read_rows(self, name, start, stop)

    def block(self, window: Window, name: str, start: int, stop: int) -> Tensor:
        """Merged rows; `prepare` must have run."""
        return self.rows(window.called(name), start, stop, self.apply().block)

    def rows(
        self, window: Window, start: int, stop: int, made: Callable[[Window, int, int], Tensor], lead: int = 0, what: str = ""
    ) -> Tensor:
        """Rows of a stored tensor, given how those of a logical one are made: of one that holds several, unit by unit.

        Args:
            window: of the stored tensor.
            made: `(window, start, stop)` → rows, of the logical tensor after which the window is called.
            lead: axes before the rows.
            what: tells what is made from what else is made of this tensor.
        """
        fused = self.aligned.layouts.fused.get(window.name)
        if fused is None:
            return made(window, start, stop)

        def piece(one: Piece) -> Tensor:
            spec = self.aligned.alignment.specs[one.name]
            return whole_tensor(spec, spec.elements if self._whole(one.name) else self.engine.reach(self.abreast), made, lead)

        def unit(number: int) -> Tensor:
            key = (id(self), what, number)
            if fused.grain == 1:
                return fused.joined(number, piece)
            if key not in window.results:  # blocks are smaller
                window.results[key] = (fused.joined(number, piece),)
            return window.results[key][0]

        return fused.rows(start, stop, unit, lead)

    def whole(self, name: str) -> bool:
        """Whether any row of this tensor needs all of it."""
        fused = self.aligned.layouts.fused.get(name)
        return self._whole(name) if fused is None else fused.units == 1

    def grain(self, name: str) -> int:
        """The rows of an expert, where experts are stacked."""
        fused = self.aligned.layouts.fused.get(name)
        return super().grain(name) if fused is None else fused.grain

    def _whole(self, name: str) -> bool:
        """The same of a logical tensor."""
        mine = self.aligned.chain.access != "block" and name in self.aligned.chosen
        return mine or any(source.whole(theirs) for source, theirs in self.aligned.readers(name))

    def write(self, name: str, ground: Source | None, weight: float, slots: Slots) -> bool:
        """Let the compiled loop write a tensor, where it can."""
        if ground is not None and (self.reference is None or ground.key != self.reference.key):
            return False
        if name in self.aligned.layouts.fused:
            return False
        return compiled.write(self.apply(), name, ground, weight, slots)

    # What it takes.

    def passes(self) -> Sequence[Pass]:
        """The walks before the last one, as far as they are needed."""
        return [one.walk for one in self._passes if not one.spare]

    def demand(self, name: str) -> Demand:
        """What the last pass takes for a tensor."""
        fused = self.aligned.layouts.fused.get(name)
        if fused is None:
            return merge_demand(self.aligned, self.engine, name)
        inner = [merge_demand(self.aligned, self.engine, piece) for piece in fused.pieces if piece in self.aligned.specs]
        made = 3 * prod(fused.unit_shape) * self.aligned.reading.itemsize  # its pieces, the unit, and what is taken of it
        most = max(one.memory for one in inner)
        return Demand(sum(one.read for one in inner), most + made, sum(one.flops for one in inner), "torch", TORCH_PACE)

    def alternatives(self) -> Mapping[str, float]:
        """What the reduction's other solvers would take, in operations."""
        reduction = self.aligned.chain.reduction
        others = reduction.alternatives() if isinstance(reduction, StreamReduction) else {}
        found = {}
        for said, other in others.items():
            found[said] = sum(other.cost(self.aligned.matrix(name), len(self.tasks)).flops for name in self.aligned.selected)
        return found


class Emitted(Source):
    """One of several outputs of a merge: a task's vector after the transforms, a mask, a model of its own."""

    partial = True

    def __init__(self, merge: Merge, emit: Emit, name: str) -> None:
        self.merge, self.emit, self.output = merge, emit, name
        self.degree = merge.degree
        self.label = f"{merge.label}: {name}"
        self.key = f"emitted:{id(merge)}:{name}"
        self.specs = merge.specs

    def fingerprint(self) -> str:
        """Not meaningful: it is computed."""
        return self.key

    def children(self) -> Sequence[Source]:
        """The merge that it is an output of."""
        return (self.merge,)

    def prepare(self) -> None:
        """The merge's statistics passes."""
        self.merge.prepare()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of this output, in float32."""
        self.prepare()
        return read_rows(self, name, start, stop)

    def block(self, window: Window, name: str, start: int, stop: int) -> Tensor:
        """Rows of this output; elsewhere the task's own vector, or what the merge has there."""
        return self.merge.rows(window.called(name), start, stop, self._made, what=self.output)

    def _made(self, window: Window, start: int, stop: int) -> Tensor:
        aligned, apply = self.merge.aligned, self.merge.apply()
        if window.name not in aligned.specs:
            return apply.block(window, start, stop)  # nothing moves it
        if window.name in aligned.chosen:
            return apply.emitted(self.emit, self.output, window, start, stop)
        stack = aligned.reading.stack(aligned.vectors, window, start, stop)
        return self.emit.outside(self.output, apply.block(window, start, stop), stack, aligned.site(window.name, start))

    def whole(self, name: str) -> bool:
        """Whether any row needs the whole tensor."""
        aligned = self.merge.aligned
        if name in aligned.layouts.fused:
            return self.merge.whole(name)
        at_once = aligned.chain.access != "block" and name in aligned.chosen and not aligned.by_blocks(self.emit)
        return at_once or any(source.whole(theirs) for source, theirs in aligned.readers(name))

    def grain(self, name: str) -> int:
        """That of the merge."""
        return self.merge.grain(name)

    def demand(self, name: str) -> Demand:
        """That of the merge, made by torch."""
        inner = self.merge.demand(name)
        return Demand(inner.read, inner.memory, inner.flops, "torch", min(inner.pace, TORCH_PACE))


def outputs(merge: Merge, emit: Emit | None = None) -> dict[str, Emitted]:
    """The outputs of a merge by name: what its chain emits, or each task's transformed vector where it emits nothing."""
    emit = emit or merge.aligned.chain.emit or EachTask()
    return {name: Emitted(merge, emit, name) for name in emit.names(merge.tasks)}
