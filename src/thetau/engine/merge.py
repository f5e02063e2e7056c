"""A merge as a lazy source: its statistics passes are made when something first reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint import Source, Spec, align, check_patterns, kind_of, layer_of, named, view_of
from thetau.engine import compiled
from thetau.engine.check import check_fields
from thetau.engine.executor import Engine, Item
from thetau.engine.guard import Guard
from thetau.engine.window import Reading, Window, block_rows, blocks, windows
from thetau.errors import AlignmentError
from thetau.parts import SELECTIONS, BlockReduction, Chain, Site, State, Statistic, StreamReduction, Transform
from thetau.sums import sum_in_order
from thetau.vectors import Combination


class Merge:
    """The merged task vector of K tasks under a chain. Degree 0; absent where the chain leaves the base alone.

    Tasks are sorted by identity, so that their order changes nothing, not even a rounding.
    """

    degree = 0
    partial = True
    folder: Path | None = None

    def __init__(
        self,
        tasks: Mapping[str, Combination],
        chain: Chain,
        *,
        label: str,
        seed: int = 0,
        exclude: Sequence[str] = (),
        engine: Engine | None = None,
    ) -> None:
        self.tasks = tuple(sorted(tasks))
        self.vectors = [tasks[name] for name in self.tasks]
        self.chain, self.seed, self.label = chain, seed, label
        self.engine = engine or Engine()
        self.reference = next((vector.reference for vector in self.vectors if vector.reference is not None), None)
        self.key = f"merge:{id(self)}"
        self.guard = Guard(self.tasks)
        sources = {source.key: source for vector in self.vectors for source in vector.sources()}
        reference = self.reference.specs if self.reference is not None else _union(self.vectors)
        label_of = self.reference.label if self.reference is not None else "the union of the task vectors"
        if self.reference is not None:
            sources = {self.reference.key: self.reference, **sources}
        self.alignment = align(reference, label_of, list(sources.values()), exclude)
        self.sources = list(sources.values())
        self.reading = Reading(self.alignment, self.vectors)
        self._lock = threading.Lock()
        self.states: list[State] | None = None
        self.recipe: dict[str, Any] = {}  # for the provenance of what is saved
        check_fields(chain, self.alignment.names, [self.site(name) for name in self.selected])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def guards(self) -> list[Guard]:
        """The guards of this merge and of those below it, in an order of their own."""
        below = [
            source if isinstance(source, Merge) else source.merge for source in self.sources if isinstance(source, Merge | Part)
        ]
        return [self.guard, *(guard for merge in below for guard in merge.guards)]

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """The tensors where the merged vector is not zero by definition."""
        chosen = self.chosen
        everywhere = self.chain.selection.elsewhere != "base"
        return {name: self.alignment.specs[name] for name in self.alignment.names if name in chosen or everywhere}

    @cached_property
    def selected(self) -> tuple[str, ...]:
        """The tensors that the chain acts on, sorted by name.

        Raises:
            AlignmentError: there is none.
        """
        specs = self.alignment.specs
        selection = self.chain.selection
        found = [
            n
            for n in self.alignment.names
            if selection.takes(n, specs[n].shape, kind_of(n, specs[n].shape)) and specs[n].elements
        ]
        if self.chain.access == "stream":
            found = [n for n in found if len(specs[n].shape) >= 2]
        if not found:
            patterns = (
                []
                if selection.tensors in SELECTIONS
                else [selection.tensors]
                if isinstance(selection.tensors, str)
                else selection.tensors
            )
            near = "".join(f" {problem}" for problem in check_patterns(patterns, self.alignment.names, "tensors"))
            raise AlignmentError(f"{self.label}: no tensor fits {selection}.{near} `thetau inspect --tensors` lists the names.")
        return tuple(sorted(found))

    @cached_property
    def chosen(self) -> frozenset[str]:
        """The same as a set."""
        return frozenset(self.selected)

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """The aligned tensors that the chain does not act on."""
        return tuple(name for name in self.alignment.names if name not in self.chosen)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the alignment and the tasks have to say; of the norms, once something was read."""
        inner = [note for source in self.sources for note in source.notes]
        what = {"base": "stay the base's", "mean": "are averaged", "sum": "are summed"}[self.chain.selection.elsewhere]
        matrices = "matrices of " if self.chain.access == "stream" else ""
        outside = named(f"{len(self.outside)} tensors that are no {matrices}{self.chain.selection} {what}", self.outside)
        if self.states is None:
            return (*inner, *self.alignment.notes, *outside)
        said = [line for part, state in zip(self.chain.transforms, self.states, strict=True) for line in part.notes(state)]
        return (*inner, *self.alignment.notes, *outside, *said, *self.guard.notes())

    def fingerprint(self) -> str:
        """Not meaningful: a merge is computed, not stored."""
        return self.key

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the merged vector, in float32."""
        self.prepare()
        spec = self.specs[name]
        stop = spec.rows if stop is None else stop
        window = Window(name, 0, spec.rows) if self.whole(name) else Window(name, start, stop)
        rows = (
            self.block(window, start, stop)
            if self.whole(name)
            else torch.cat([self.block(window, a, b) for a, b in blocks(spec, start, stop)])
        )
        return rows if spec.shape else rows.reshape(())

    def whole(self, name: str) -> bool:
        """Whether any row of this tensor needs all of it."""
        return (self.chain.access == "stream" and name in self.chosen) or self.whole_inside(name)

    def whole_inside(self, name: str) -> bool:
        """Whether a merge among the inputs needs the whole tensor, which it may call otherwise."""
        nested = ((s, self.alignment.maps[s.key].get(name)) for s in self.sources if isinstance(s, Merge | Part))
        return any(source.whole(theirs) for source, theirs in nested if theirs is not None)

    def site(self, name: str, start: int = 0, tasks: tuple[str, ...] | None = None) -> Site:
        """Where the parts act."""
        spec = self.alignment.specs[name]
        return Site(
            name=name,
            shape=spec.shape,
            kind=kind_of(name, spec.shape),
            layer=layer_of(name),
            tasks=self.tasks if tasks is None else tasks,
            seed=self.seed,
            start=start,
            row_elements=spec.row_elements,
        )

    # The last pass.

    def block(self, window: Window, start: int, stop: int) -> Tensor:
        """Merged rows of the window's tensor; `prepare` must have run."""
        name = window.name
        if name not in self.chosen:
            stack = self._checked(window, start, stop)
            return sum_in_order(stack) / (len(self.tasks) if self.chain.selection.elsewhere == "mean" else 1)
        if isinstance(self.chain.reduction, StreamReduction):
            if id(self) not in window.results:
                window.results[id(self)] = self._stream(window, self.chain.reduction)
            return window.results[id(self)][start - window.start : stop - window.start]
        site = self.site(name, start)
        assert isinstance(self.chain.reduction, BlockReduction)
        merged = self.chain.reduction.reduce(self.transformed(window, start, stop), None, site)
        return self._post(merged, site)

    def transformed(self, window: Window, start: int, stop: int, upto: int | None = None, check: bool = True) -> Tensor:
        """The stack `[task, rows, *rest]` after the chain's transforms."""
        stack = (
            self._checked(window, start, stop)
            if check and not self._passes()
            else self.reading.stack(self.vectors, window, start, stop)
        )
        return self._apply(stack, self.site(window.name, start), upto)

    def _apply(self, stack: Tensor, site: Site, upto: int | None = None) -> Tensor:
        states = self.states or []
        for transform, state in zip(self.chain.transforms[:upto], states, strict=False):
            stack = transform.apply(stack, state, site)
        return stack

    def _post(self, merged: Tensor, site: Site) -> Tensor:
        for stage in self.chain.post:
            merged = stage.adjust(merged, None, None, site)
        return merged

    def _checked(self, window: Window, start: int, stop: int) -> Tensor:
        stack = self.reading.stack(self.vectors, window, start, stop)
        self.guard.look(self.tasks, stack, self.reading, self.vectors, window, start, stop, self.reference)
        return stack

    def _stream(self, window: Window, reduction: StreamReduction) -> Tensor:
        """A whole tensor through a streaming reduction, one logical matrix after the other."""
        spec = self.alignment.specs[window.name]
        view = view_of(window.name, spec.shape)
        parts = view.parts if self.chain.split_fused else 1
        site = self.site(window.name)
        d_out, d_in = (spec.row_elements, spec.rows) if view.transposed else (spec.rows, spec.row_elements)
        with self.engine.there():
            totals = [reduction.init(d_out // parts, d_in, len(self.tasks)) for _ in range(parts)]
        for task, matrix in self._matrices(window, spec):
            one = self.site(window.name, tasks=(task,))
            logical = (matrix.T if view.transposed else matrix).to(self.engine.place)
            with self.engine.there():
                for part, piece in enumerate(logical.chunk(parts)):
                    totals[part] = reduction.add(totals[part], piece.contiguous(), one)
        with self.engine.there():
            merged = torch.cat([reduction.result(total, site) for total in totals]).cpu()
        stored = (merged.T if view.transposed else merged).reshape(spec.shape)
        return self._post(stored, site)

    def _matrices(self, window: Window, spec: Spec) -> Iterator[tuple[str, Tensor]]:
        """Each task's transformed tensor as `[rows, rest]`, one at a time where the transforms allow it."""
        flat = (spec.rows, spec.row_elements)
        check = not self._passes()
        if self.chain.by_task:
            for task, vector in zip(self.tasks, self.vectors, strict=True):
                one = window.sharing(self.reference)  # drops this task's own rows when it is done
                out = torch.empty((1, spec.rows, *spec.shape[1:]), dtype=self.reading.dtype)
                for start, stop in blocks(spec, 0, spec.rows):
                    self.reading.evaluate(vector, one, start, stop, out[0, start:stop])
                    if check:
                        base = self.reference if task == self.tasks[0] else None
                        self.guard.look([task], out[:, start:stop], self.reading, [vector], one, start, stop, base)
                    out[:, start:stop] = self._apply(out[:, start:stop], self.site(window.name, start, (task,)))
                yield task, out[0].reshape(flat).float()
        else:
            pieces = [self.transformed(window, start, stop) for start, stop in blocks(spec, 0, spec.rows)]
            for index, task in enumerate(self.tasks):
                yield task, torch.cat([piece[index] for piece in pieces]).reshape(flat).float()

    # Statistics passes.

    def _passes(self) -> int:
        """Passes over the inputs before the last one."""
        needed = [transform.requires() for transform in self.chain.transforms]
        return sum(statistic.rounds for statistic in needed if statistic is not None)

    def prepare(self) -> None:
        """Make the statistics passes, once."""
        for source in self.sources:
            if isinstance(source, Merge | Part):
                source.prepare()
        with self._lock:
            if self.states is not None:
                return
            states: list[State] = []
            self.states = states
            try:
                for index, transform in enumerate(self.chain.transforms):
                    states.append(transform.prepare(self._measure(index, transform), self.tasks))
            except BaseException:
                self.states = None
                raise

    def _measure(self, index: int, transform: Transform) -> object:
        statistic = transform.requires()
        if statistic is None:
            return None
        first = all(earlier.requires() is None for earlier in self.chain.transforms[:index])
        seen: object = None
        for round_ in range(statistic.rounds):
            work = _Measurement(self, statistic, index, round_, seen, first and round_ == 0)
            what = f"{type(statistic).__name__}, pass {round_ + 1} of {statistic.rounds}"
            items = [self.item(name, last=False) for name in self.selected]
            if statistic.per_tensor:
                seen = {item.name: result for item, result in self.engine.run(items, work, what)}
            else:
                seen = statistic.finish(self.engine.reduce(items, work, statistic.fold, what), seen)
        return seen

    def measure(self, work: _Measurement, name: str) -> object:
        """One tensor's part of a statistics pass."""
        statistic, seen = work.statistic, work.seen
        spec = self.alignment.specs[name]
        mine = seen[name] if statistic.per_tensor and isinstance(seen, dict) else seen
        total: object = compiled.measure(self, statistic, work.round, work.index, name, mine, check=work.check)
        if total is None:
            reach = (
                spec.rows * spec.row_elements
                if self.whole(name) and self.chain.access != "stream"
                else self.engine.reach(len(self.sources))
            )
            for low, high in windows(spec, reach):
                window = Window(name, low, high)
                for start, stop in blocks(spec, low, high):
                    checked = self._checked(window, start, stop) if work.check else None
                    stack = self.reading.stack(self.vectors, window, start, stop) if checked is None else checked
                    site = self.site(name, start)
                    total = statistic.add(total, self._apply(stack, site, work.index), site, mine)
        return statistic.finish(total, mine) if statistic.per_tensor else total

    def other_bases(self, base: Source | None) -> list[str]:
        """A sentence for each task vector that is a difference from another model than this base."""
        if base is None:
            return []
        theirs = [(task, v.reference) for task, v in zip(self.tasks, self.vectors, strict=True) if v.reference is not None]
        return [
            f"{task}: this task vector was taken from another base, {other.label}, than {base.label} (their fingerprints differ)."
            for task, other in theirs
            if other.key != base.key and other.fingerprint() != base.fingerprint()
        ]

    # What it takes.

    def item(self, name: str, *, last: bool = True) -> Item:
        """Bytes read and memory held for one tensor, in a statistics pass or in the last one."""
        spec = self.alignment.specs[name]
        readers = [source for source in self.sources if name in self.alignment.maps[source.key]]
        nbytes = sum(source.specs[self.alignment.maps[source.key][name]].nbytes for source in readers)
        stream = last and isinstance(self.chain.reduction, StreamReduction) and name in self.chosen
        width = self.reading.dtype.itemsize
        block = min(spec.rows, block_rows(spec)) * spec.row_elements
        window = min(spec.elements, max(self.engine.reach(len(self.sources)), block))
        memory = len(readers) * window * 4 + 4 * len(self.tasks) * block * width
        if stream:
            view = view_of(name, spec.shape)
            d_out, d_in = (spec.row_elements, spec.rows) if view.transposed else (spec.rows, spec.row_elements)
            held = 3 if self.chain.by_task else len(self.tasks) * 2 + len(readers)
            assert isinstance(self.chain.reduction, StreamReduction)
            memory = held * spec.elements * width + self.chain.reduction.cost((d_out, d_in), len(self.tasks)).memory
        for transform in self.chain.transforms:
            statistic = transform.requires()
            if statistic is not None and not last:
                memory += statistic.memory(len(self.tasks), spec.elements)
        return Item(name, nbytes, memory)

    def flops(self) -> float:
        """Floating-point operations of a streaming reduction, over all tensors; 0 for an elementwise one."""
        return self._flops(self.chain.reduction) if isinstance(self.chain.reduction, StreamReduction) else 0.0

    def alternatives(self) -> list[tuple[str, float]]:
        """What the reduction's other solvers would cost, by name, in operations."""
        others = self.chain.reduction.alternatives() if isinstance(self.chain.reduction, StreamReduction) else {}
        return [(name, self._flops(reduction)) for name, reduction in others.items()]

    def _flops(self, reduction: StreamReduction) -> float:
        total = 0.0
        for name in self.selected:
            spec = self.alignment.specs[name]
            view = view_of(name, spec.shape)
            d_out, d_in = (spec.row_elements, spec.rows) if view.transposed else (spec.rows, spec.row_elements)
            parts = view.parts if self.chain.split_fused else 1
            total += parts * reduction.cost((d_out // parts, d_in), len(self.tasks)).flops
        return total


@dataclass(frozen=True)
class _Measurement:
    """The work of one statistics pass, which may run in another process."""

    merge: Merge
    statistic: Statistic
    index: int
    round: int
    seen: object
    check: bool

    def __call__(self, item: Item) -> object:
        return self.merge.measure(self, item.name)

    @property
    def guards(self) -> list[Guard]:
        """Whose findings must come back."""
        return self.merge.guards


class Part:
    """One task's vector after a merge's transforms: a prefix of the chain, materialised (AWD's disentangled vectors, say)."""

    degree = 0
    partial = True
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, merge: Merge, task: str) -> None:
        self.merge = merge
        self._index = merge.tasks.index(task)
        self.label = f"{merge.label} of {task}"
        self.key = f"part:{id(merge)}:{task}"

    @property
    def specs(self) -> dict[str, Spec]:
        """Where the merge acts, and elsewhere too unless the base stays there."""
        return self.merge.specs

    def fingerprint(self) -> str:
        """Not meaningful: it is computed."""
        return self.key

    def whole(self, name: str) -> bool:
        """Whether any row needs the whole tensor: only through a nested merge."""
        return self.merge.whole_inside(name)

    def prepare(self) -> None:
        """The merge's statistics passes."""
        self.merge.prepare()

    def block(self, window: Window, start: int, stop: int) -> Tensor:
        """Rows of this task's transformed vector."""
        if window.name in self.merge.chosen:
            return self.merge.transformed(window, start, stop)[self._index]
        return self.merge.reading.stack(self.merge.vectors[self._index : self._index + 1], window, start, stop)[0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of this task's transformed vector, in float32."""
        self.prepare()
        spec = self.specs[name]
        stop = spec.rows if stop is None else stop
        window = Window(name, 0, spec.rows) if self.whole(name) else Window(name, start, stop)
        rows = torch.cat([self.block(window, a, b) for a, b in blocks(spec, start, stop)])
        return rows if spec.shape else rows.reshape(())


def _union(vectors: Sequence[Combination]) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for vector in vectors:
        for name, spec in vector.specs().items():
            found.setdefault(name, spec)
    return found
