"""Making the plan of a run before it starts, from headers alone; it is the plan that is then run."""

from __future__ import annotations

import time

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.engine.executor import Engine
from thetau.engine.save import Output
from thetau.plan import Plan
from thetau.vectors import Combination

READ_SAMPLE = 1 << 26


def plan(combination: Combination, *, engine: Engine, dtype: Dtype | None = None, quantise: str | None = None) -> Plan:
    """Work out what saving a combination takes; reads headers only.

    Raises:
        AlignmentError: as saving would.
    """
    output = Output.plan(combination, dtype=dtype, quantise=quantise)
    passes = output.passes(engine)
    cheaper: dict[str, float] = {}
    for source in output.made:
        for name, count in source.alternatives().items():
            cheaper[name] = cheaper.get(name, 0.0) + count
    solves = any(one.work for one in passes)
    return Plan(
        tuple(passes),
        engine.workers,
        engine.max_memory,
        _rate(engine) if solves else 1.0,
        tuple(sorted(cheaper.items(), key=lambda pair: pair[1])),
        sum(lack.nbytes for source in output.leaves() if (lack := source.lacking()) is not None),
    )


def reading_rate(combination: Combination) -> float | None:
    """Bytes a second that the first inputs give now; what the system still holds in memory comes faster than the disk would.

    None where no input is on this machine yet.
    """
    begin, count = time.perf_counter(), 0
    for source in (leaf for leaf in Output.plan(combination).leaves() if leaf.lacking() is None):
        for name, spec in source.specs.items():
            if count < READ_SAMPLE and spec.rows:
                rows = max(1, min(spec.rows, (READ_SAMPLE // 8) // max(1, spec.row_elements * spec.dtype.itemsize)))
                source.raw(name, 0, rows)
                count += rows * spec.row_elements * spec.dtype.itemsize
    return None if not count else max(1e6, count / max(1e-6, time.perf_counter() - begin))


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
