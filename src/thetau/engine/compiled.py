"""Where the compiled loop takes over: which merges fit it, their statistics passes, and their last pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from thetau.checkpoint import Slots, Source
from thetau.engine import kernels
from thetau.engine.guard import refuse_nonfinite
from thetau.engine.kernels import Inputs, Result, Sink
from thetau.parts import BlockReduction, Op, Statistic

if TYPE_CHECKING:
    from thetau.engine.merge import Merge

RUN = 1 << 22  # elements of one call: a multiple of the loop's tiles, a divisor of 2³¹


@dataclass(frozen=True)
class Compiled:
    """One tensor's inputs and the merge's program up to some stage; `ops` is asked again where the random keys change."""

    merge: Merge
    inputs: Inputs
    upto: int | None
    reduce: bool

    def ops(self, element: int) -> list[Op] | None:
        """The program for elements from `element` on, or None where a part has no compiled form."""
        return program(self.merge, self.inputs.spec.name, element, self.upto, reduce=self.reduce)

    def runs(self) -> Iterator[tuple[int, int]]:
        """First element and count of each call."""
        total = self.inputs.spec.elements
        ranked = next((op.keys[0] for op in self.ops(0) or [] if op.code == "rank_drop"), 1)
        step = max(1, RUN // ranked) * ranked  # whole rows
        for first in range(0, total, step):
            yield first, min(step, total - first)


def program(merge: Merge, name: str, element: int, upto: int | None, *, reduce: bool) -> list[Op] | None:
    """A chain's parts as operations, or None where one of them has no compiled form."""
    chain = merge.chain
    site = merge.site(name)
    ops: list[Op] = []
    if name not in merge.chosen:  # outside the selection: the mean or the sum
        return [Op("mean") if chain.selection.elsewhere == "mean" else Op("sum", by_task=(1.0,) * len(merge.tasks))]
    parts: list[tuple[Any, Any]] = list(zip(chain.transforms[:upto], merge.states or [], strict=False))
    if reduce:
        parts += [(chain.reduction, None), *((stage, None) for stage in chain.post)]
    for part, state in parts:
        if not part.compiles(site):
            return None
        ops += part.program(state, site, element)
    return ops


def fit(merge: Merge, name: str, ground: Source | None, *, upto: int | None = None, reduce: bool = True) -> Compiled | None:
    """The compiled form of a merge on one tensor, or None."""
    if not kernels.available() or merge.reading.dtype != torch.float32 or merge.alignment.specs[name].elements == 0:
        return None
    if reduce and not isinstance(merge.chain.reduction, BlockReduction):
        return None
    if program(merge, name, 0, upto, reduce=reduce) is None:
        return None
    inputs = kernels.inputs(merge.alignment, merge.vectors, name, ground)
    return None if inputs is None else Compiled(merge, inputs, upto, reduce)


def measure(merge: Merge, statistic: Statistic, round_: int, index: int, name: str, seen: Any, *, check: bool) -> Any | None:
    """One tensor's part of a statistics pass, as `statistic.add` would have made it over all its blocks; None where it does not fit."""
    kind = statistic.compiled[round_]
    if not kind:
        return None
    compiled = fit(merge, name, merge.reference if check else None, upto=index, reduce=False)
    if compiled is None:
        return None
    upper = seen.upper.flatten().tolist() if kind == "lower" else []
    result = Result.empty(len(merge.tasks), kind, max(1, len(upper) // len(merge.tasks)))
    for first, count in compiled.runs():
        ops = compiled.ops(first) or []
        kernels.run(compiled.inputs, ops, first, count, statistic=kind, into=result, upper=upper)
    if check:
        _look(compiled, result)
    return statistic.from_compiled(result)


def write(merge: Merge, name: str, ground: Source | None, weight: float, writer: Slots) -> bool:
    """Merge one tensor straight into the output's file; False where it does not fit, and nothing was written."""
    compiled = fit(merge, name, ground)
    out = writer.specs[name]
    if compiled is None or out.dtype not in kernels.DTYPES:
        return False
    fd, offset = writer.place(name)
    sink = Sink(fd, offset, out.dtype)
    result = Result.empty(len(merge.tasks), "none")
    for first, count in compiled.runs():
        ops = compiled.ops(first) or []
        if weight != 1:
            ops = [*ops, Op("scale", weight)]
        try:
            kernels.run(compiled.inputs, ops, first, count, sink=sink, into=result)
        except OSError as error:
            raise writer.failed(error) from error
        writer.wrote(name, count * out.dtype.itemsize)
    _look(compiled, result)
    return True


def _look(compiled: Compiled, result: Result) -> None:
    """What the guard does block by block: refuse what is not finite, and keep the norms."""
    merge, inputs = compiled.merge, compiled.inputs
    squares = result.squares.tolist()
    if not all(map(math.isfinite, squares)):
        for source, theirs in zip(inputs.sources, inputs.names, strict=True):
            refuse_nonfinite(source, theirs)
    if not merge.guard.knows(inputs.spec.name):
        merge.guard.count(merge.tasks, inputs.spec.name, squares[:-1], squares[-1] if inputs.ground >= 0 else None)
