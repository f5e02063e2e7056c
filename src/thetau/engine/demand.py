"""What one tensor takes, told from headers alone: bytes read, memory, operations, and whether the compiled loop will run it.

The plan shows these numbers and the executors run by them; nothing is estimated twice.
"""

from __future__ import annotations

from thetau.checkpoint.source import Demand
from thetau.engine import compiled
from thetau.engine.aligned import Aligned
from thetau.engine.executor import Engine
from thetau.engine.window import block_rows
from thetau.parts import Cost, Part, Statistic
from thetau.plan import TORCH_PACE, Step


def statistic_step(
    aligned: Aligned, engine: Engine, statistic: Statistic, stage: int, round_: int, name: str, *, first: bool, rounds: int = 1
) -> Step:
    """A tensor's step of a statistics pass, or of several rounds at once; the first one also takes the base's norm."""
    chain = aligned.chain
    read, memory = _reading(aligned, engine, name)
    spec = aligned.alignment.specs[name]
    memory += statistic.memory(len(aligned.tasks), spec.elements)
    parts = chain.stages[:stage]
    if stage > len(chain.transforms) or any(part.access == "whole" for part in parts):
        memory += (4 if chain.reads_vectors else 3) * _stack_bytes(aligned, name)
    cost = _costs(aligned, parts, name)
    if statistic.compiled[round_] and compiled.fits(aligned, name, upto=stage, ground=aligned.yardstick if first else None):
        return Step(
            name,
            read,
            memory + cost.memory,
            flops=cost.flops,
            by="loop",
            pace=min([statistic.pace, *(part.pace for part in parts)]) / rounds,
        )
    return Step(name, read, memory + cost.memory, flops=rounds * cost.flops, by="torch", pace=TORCH_PACE / rounds)


def merge_demand(aligned: Aligned, engine: Engine, name: str) -> Demand:
    """What the last pass takes for a tensor."""
    chain = aligned.chain
    read, memory = _reading(aligned, engine, name)
    if name not in aligned.chosen:
        if compiled.fits(aligned, name):
            return Demand(read, memory, 0.0, "loop", chain.reduction.pace)
        return Demand(read, memory, 0.0, "torch", TORCH_PACE)
    cost = _costs(aligned, chain.stages, name)
    beside = max(
        (source.demand(theirs).memory for source, theirs in aligned.readers(name)), default=0
    )  # one is read after the other
    if chain.access == "stream":
        spec, width = aligned.alignment.specs[name], aligned.reading.itemsize
        held = 3 if chain.by_task else len(aligned.tasks) * 2 + len(aligned.readers(name))
        told = 8 * aligned.matrices_of_evidence(name)  # as it is stored, and in float32
        return Demand(read, held * spec.elements * width + beside + told + cost.memory, cost.flops, "torch", TORCH_PACE)
    if chain.access == "whole":
        spec = aligned.alignment.specs[name]
        window = 4 * spec.elements * len(aligned.readers(name))
        stacks = (4 if chain.reads_vectors else 3) * _stack_bytes(aligned, name)
        stacks += 4 * (len(aligned.tasks) + 1) * aligned.matrices_of_evidence(name)
        return Demand(read, window + stacks + beside + cost.memory, cost.flops, "torch", TORCH_PACE)
    if compiled.fits(aligned, name):
        return Demand(read, memory + cost.memory, cost.flops, "loop", min(part.pace for part in chain.stages))
    return Demand(read, memory + cost.memory, cost.flops, "torch", TORCH_PACE)


def _reading(aligned: Aligned, engine: Engine, name: str) -> tuple[int, int]:
    """Bytes read, and memory of an elementwise walk."""
    spec = aligned.alignment.specs[name]
    readers = aligned.readers(name)
    demands = [source.demand(theirs) for source, theirs in readers]
    block = min(spec.rows, block_rows(spec)) * spec.row_elements
    reach = max(engine.reach(len(aligned.sources) + len(aligned.testimony)), block)
    window = spec.elements if any(source.whole(theirs) for source, theirs in readers) else min(spec.elements, reach)
    memory = len(readers) * window * 4 + 4 * len(aligned.tasks) * block * aligned.reading.itemsize
    return sum(one.read for one in demands), memory + sum(one.memory for one in demands)


def _stack_bytes(aligned: Aligned, name: str) -> int:
    return len(aligned.tasks) * aligned.alignment.specs[name].elements * aligned.reading.itemsize


def _costs(aligned: Aligned, parts: tuple[Part, ...], name: str) -> Cost:
    """Operations of all parts; the memory of the hungriest, since they act one after the other."""
    spec = aligned.alignment.specs[name]
    flops, memory = 0.0, 0
    for part in parts:
        cost = part.cost(aligned.matrix(name) if part.access == "stream" else spec.shape, len(aligned.tasks))
        flops, memory = flops + cost.flops, max(memory, cost.memory)
    return Cost(flops, memory)
