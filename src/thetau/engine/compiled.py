"""Where the compiled loop takes over: which merges fit it, their statistics passes, and their last pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thetau.checkpoint import Slots, Source
from thetau.engine import kernels
from thetau.engine.aligned import Aligned
from thetau.engine.apply import Apply
from thetau.engine.guard import Guard, refuse_nonfinite
from thetau.engine.kernels import Inputs, Result, Sink
from thetau.parts import Op, Part, State, Statistic

PIECE = 1 << 15  # elements of a call that looks at a share only
RUN = 1 << 22  # elements of one call: a multiple of the loop's tiles, a divisor of 2³¹


def fits(aligned: Aligned, name: str, *, upto: int | None = None, ground: Source | None = None) -> bool:
    """Whether the loop can run the chain at this tensor over this ground, or its first stages; told from headers, before any pass."""
    chain = aligned.chain
    if not kernels.available() or aligned.reading.wide or aligned.alignment.specs[name].elements == 0:
        return False
    if chain.emit is not None or (chain.models and name not in aligned.chosen):
        return False
    site = aligned.site(name)
    if name in aligned.chosen:
        late = upto is not None and upto > len(chain.transforms)
        if late or (upto is None and chain.access != "block") or not all(part.compiles(site) for part in chain.stages[:upto]):
            return False
    elif set(chain.reduction.weights(site)) != {1.0} and chain.selection.elsewhere == "mean":
        return False
    return kernels.inputs(aligned.alignment, aligned.vectors, name, ground) is not None


@dataclass(frozen=True)
class Compiled:
    """One tensor's inputs and the program up to some stage; `ops` is asked again where the random keys change."""

    aligned: Aligned
    states: Sequence[State]
    inputs: Inputs
    upto: int | None

    def ops(self, element: int) -> list[Op]:
        """The program for elements from `element` on."""
        aligned, name = self.aligned, self.inputs.spec.name
        chain, site = aligned.chain, aligned.site(name)
        stages: list[tuple[Part, State]] = list(zip(chain.stages, self.states, strict=False))[: self.upto]
        if name in aligned.chosen:
            return [op for part, state in stages for op in part.program(state, site, element)]
        mean = chain.selection.elsewhere == "mean"  # outside the selection: the mean or the sum, and what acts everywhere
        ops = [Op("mean") if mean else Op("sum", by_task=tuple(chain.reduction.weights(site)))]
        after = stages[len(chain.transforms) + 1 :]
        everywhere = {id(part) for part in chain.post if part.everywhere}
        return ops + [op for part, state in after if id(part) in everywhere for op in part.program(state, site, element)]

    def runs(self) -> Iterator[tuple[int, int]]:
        """First element and count of each call."""
        total, row = self.inputs.spec.elements, self._row
        step = max(1, RUN // row) * row
        for first in range(0, total, step):
            yield first, min(step, total - first)

    def pieces(self, share: int) -> Iterator[tuple[int, int]]:
        """The same for one entry in `share`: short pieces, evenly over the tensor, so that each tensor counts by its size."""
        total, row = self.inputs.spec.elements, self._row
        count = max(1, total // (share * PIECE))
        length = max(1, total // (share * count * row)) * row
        for index in range(count):
            first = (2 * index + 1) * total // (2 * count * row) * row
            yield first, min(length, total - first)

    @property
    def _row(self) -> int:
        """Elements that stay together: of a row, where some are dropped by their rank in it."""
        return next((op.keys[0] for op in self.ops(0) if op.code == "rank_drop"), 1)


def measure(apply: Apply, statistic: Statistic, kind: str, stage: int, name: str, seen: Any, share: int = 1) -> Any:
    """One tensor's part of a statistics pass, as `statistic.add` would have made it over all its blocks; of one entry in `share`."""
    aligned = apply.aligned
    found = kernels.inputs(aligned.alignment, aligned.vectors, name, aligned.yardstick if apply.check else None)
    assert found is not None
    compiled = Compiled(aligned, apply.states, found, stage)
    inside = statistic.inside(seen)
    result = Result.empty(len(aligned.tasks), kind, inside)
    for first, count in compiled.runs() if share == 1 else compiled.pieces(share):
        kernels.run(compiled.inputs, compiled.ops(first), first, count, statistic=kind, into=result, inside=inside)
    if apply.check:
        _look(compiled, result, apply.guard)
    return statistic.from_compiled(result, aligned.site(name), seen)


def write(apply: Apply, name: str, ground: Source | None, weight: float, slots: Slots) -> bool:
    """Merge one tensor straight into the output's file; False where it does not fit, and nothing was written."""
    aligned, out = apply.aligned, slots.specs[name]
    if out.dtype not in kernels.DTYPES or not fits(aligned, name, ground=ground):
        return False
    found = kernels.inputs(aligned.alignment, aligned.vectors, name, ground)
    assert found is not None
    compiled = Compiled(aligned, apply.states, found, None)
    fd, offset = slots.place(name)
    sink = Sink(fd, offset, out.dtype)
    result = Result.empty(len(aligned.tasks), "none")
    for first, count in compiled.runs():
        ops = compiled.ops(first)
        if weight != 1:
            ops = [*ops, Op("scale", weight)]
        try:
            kernels.run(compiled.inputs, ops, first, count, sink=sink, into=result)
        except OSError as error:
            raise slots.failed(error) from error
        slots.wrote(name, count * out.dtype.itemsize)
    _look(compiled, result, apply.guard)
    return True


def _look(compiled: Compiled, result: Result, guard: Guard) -> None:
    """What the guard does block by block: refuse what is not finite, and keep the norms."""
    inputs = compiled.inputs
    squares = result.squares.tolist()
    if not all(map(math.isfinite, squares)):
        for source, theirs in zip(inputs.sources, inputs.names, strict=True):
            refuse_nonfinite(source, theirs)
    if not guard.knows(inputs.spec.name):
        guard.count(compiled.aligned.tasks, inputs.spec.name, squares[:-1], squares[-1] if inputs.ground >= 0 else None)
