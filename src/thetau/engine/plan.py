"""What a run will cost, before it starts: passes, bytes, memory, operations."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from thetau.engine.executor import Engine
from thetau.engine.kernels import available
from thetau.engine.merge import Merge, Part
from thetau.engine.save import Output
from thetau.vectors import Combination

LOOP = {
    "loop": 1.4e9,
    "counts": 0.7e9,
    "ranks": 0.15e9,
    "torch": 0.25e9,
}  # bytes of input that one worker computes on in a second
READ_SAMPLE = 1 << 26


@dataclass(frozen=True)
class Pass:
    """One walk over the inputs: bytes read, memory in flight, and the kind of arithmetic, which says how fast it goes."""

    what: str
    read: int
    memory: int
    kind: str = "loop"


@dataclass(frozen=True)
class Plan:
    """Passes in order, bytes written, operations of matrix solvers, and about how long those take here."""

    passes: tuple[Pass, ...]
    written: int
    tensors: int
    flops: float
    rate: float
    workers: int
    alternatives: tuple[tuple[str, float], ...] = ()

    def duration(self, reading: float, writing: float) -> float:
        """Seconds of the whole run, about, where the disk reads and writes so many bytes a second.

        In each pass reading and arithmetic go side by side, so the slower one counts; the output is written in the last pass, is read
        back once for its checksums (from memory, mostly) and goes to the disk before the run ends.
        """
        passes = sum(max(one.read / reading, one.read / (LOOP[one.kind] * self.workers)) for one in self.passes)
        return passes + self.written / writing + self.seconds

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
                memory = _flight(engine, [item.memory for item in items])
                one = Pass(what, sum(item.nbytes for item in items), memory, _kind(type(statistic).__name__))
                passes += [one] * statistic.rounds
    items = output.items(engine)
    parts = {type(transform).__name__ for merge in merges for transform in merge.chain.transforms}
    kind = "torch" if not available() else "ranks" if "RankDrop" in parts else "loop"
    memory = _flight(engine, [item.memory for item in items])
    passes.append(Pass("merge and write", sum(item.nbytes for item in items), memory, kind))
    flops = sum(merge.flops() for merge in merges)
    rate = _rate(engine) if flops else 1.0
    cheaper: dict[str, float] = {}
    for merge in merges:
        for name, count in merge.alternatives():
            cheaper[name] = cheaper.get(name, 0.0) + count
    written = sum(spec.nbytes for spec in output.specs.values())
    return Plan(
        tuple(passes),
        written,
        len(output.specs),
        flops,
        rate,
        engine.workers,
        tuple(sorted(cheaper.items(), key=lambda pair: pair[1])),
    )


def reading_rate(combination: Combination) -> float:
    """Bytes a second that the first inputs give now; what the system still holds in memory comes faster than the disk would."""
    begin, count = time.perf_counter(), 0
    for source in Output.plan(combination).leaves():
        for name, spec in source.specs.items():
            if count < READ_SAMPLE and spec.rows:
                rows = max(1, min(spec.rows, (READ_SAMPLE // 8) // max(1, spec.row_elements * spec.dtype.itemsize)))
                source.read(name, 0, rows)
                count += rows * spec.row_elements * spec.dtype.itemsize
    return max(1e6, count / max(1e-6, time.perf_counter() - begin))


def _kind(statistic: str) -> str:
    if not available():
        return "torch"
    return {"MagnitudeQuantile": "counts", "Gram": "loop"}.get(statistic, "torch")


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
