"""What a run will cost, before it starts: passes, bytes, memory, operations."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from thetau.engine.executor import Engine
from thetau.engine.merge import Merge, Part
from thetau.engine.save import Output
from thetau.vectors import Combination


@dataclass(frozen=True)
class Pass:
    """One walk over the inputs."""

    what: str
    read: int
    memory: int


@dataclass(frozen=True)
class Plan:
    """Passes in order, bytes written, operations of matrix solvers, and about how long those take here."""

    passes: tuple[Pass, ...]
    written: int
    tensors: int
    flops: float
    rate: float
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def read(self) -> int:
        """Bytes read over all passes."""
        return sum(one.read for one in self.passes)

    @property
    def memory(self) -> int:
        """Peak bytes of tensors in flight."""
        return max((one.memory for one in self.passes), default=0)

    @property
    def seconds(self) -> float:
        """Of arithmetic, at the measured rate."""
        return self.flops / self.rate if self.flops else 0.0


def plan(combination: Combination, *, engine: Engine, dtype: torch.dtype | None = None) -> Plan:
    """Work out what saving a combination takes; reads headers only.

    Raises:
        AlignmentError: as saving would.
    """
    output = Output.plan(combination, dtype=dtype)
    merges = _merges(combination)
    passes: list[Pass] = []
    for merge in merges:
        items = [merge.item(name, last=False) for name in merge.selected]
        for transform in merge.chain.transforms:
            statistic = transform.requires()
            if statistic is not None:
                what = f"{type(statistic).__name__} for {type(transform).__name__.lower()}"
                one = Pass(what, sum(item.nbytes for item in items), _flight(engine, [item.memory for item in items]))
                passes += [one] * statistic.rounds
    items = output.items(engine)
    passes.append(Pass("merge and write", sum(item.nbytes for item in items), _flight(engine, [item.memory for item in items])))
    flops = sum(merge.flops() for merge in merges)
    rate = _rate(engine) if flops else 1.0
    cheaper: dict[str, float] = {}
    for merge in merges:
        for name, count in merge.alternatives():
            cheaper[name] = cheaper.get(name, 0.0) + count
    written = sum(spec.nbytes for spec in output.specs.values())
    return Plan(tuple(passes), written, len(output.specs), flops, rate, tuple(sorted(cheaper.items(), key=lambda pair: pair[1])))


def _merges(combination: Combination) -> list[Merge]:
    found: list[Merge] = []
    for source in combination.sources():
        merge = source.merge if isinstance(source, Part) else source
        if isinstance(merge, Merge):
            for vector in merge.vectors:
                found += _merges(vector)
            found.append(merge)
    return found


def _flight(engine: Engine, memory: list[int]) -> int:
    largest = sorted(memory, reverse=True)[: engine.workers]
    return min(engine.max_memory, sum(largest)) if largest and largest[0] <= engine.max_memory else sum(largest[:1])


def _rate(engine: Engine) -> float:
    """Operations a second of a float32 product on one thread, times the workers."""
    n = 512
    a = torch.ones(n, n)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a @ a
        start = time.perf_counter()
        a @ a
        return engine.workers * 2 * n**3 / max(1e-9, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
