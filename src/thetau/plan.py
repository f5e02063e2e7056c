"""What a run will do, as data: passes over the inputs, a step for each tensor. It is printed, and it is what is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TORCH_PACE = 0.25e9  # bytes of input that one worker gets through in a second with torch's elementwise operations


@dataclass(frozen=True)
class Step:
    """Work on one tensor: the bytes that it reads and writes, the memory that it holds meanwhile, its operations, and by what it runs.

    `pace` is how many bytes of input one worker gets through in a second, elementwise work alone; `flops` is what comes on top.
    """

    name: str
    read: int
    memory: int
    written: int = 0
    flops: float = 0.0
    by: Literal["copy", "loop", "torch"] = "torch"
    pace: float = TORCH_PACE


@dataclass(frozen=True)
class Pass:
    """One walk over the inputs, or over one entry in `share` of them.

    `held` bytes stay in memory from its end on; `flops` and `memory` are of what is then solved, once.
    """

    what: str
    steps: tuple[Step, ...]
    held: int = 0
    flops: float = 0.0
    memory: int = 0
    share: int = 1

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(step.read for step in self.steps)

    @property
    def work(self) -> float:
        """Operations of matrix solvers, in the steps and after them."""
        return self.flops + sum(step.flops for step in self.steps)

    def in_flight(self, workers: int, budget: int) -> int:
        """Peak bytes of the tensors that so many workers hold together, within the budget where that is possible."""
        largest = sorted((step.memory for step in self.steps), reverse=True)[:workers]
        flying = max(largest[0], min(sum(largest), budget - self.held)) if largest else 0
        return self.held + max(flying, self.memory)

    def duration(self, reading: float, workers: int, rate: float) -> float:
        """Seconds, about: reading and elementwise work go side by side, so the slower one counts; solving comes on top."""
        elementwise = sum(step.read / step.pace for step in self.steps) / workers
        return max(self.read / reading, elementwise) + self.work / rate


@dataclass(frozen=True)
class Plan:
    """Passes in order, the last of which writes; what the other solvers of a method would take; about how fast this machine is."""

    passes: tuple[Pass, ...]
    workers: int
    budget: int
    rate: float = 1.0  # operations a second
    alternatives: tuple[tuple[str, float], ...] = ()
    download: int = 0  # bytes of inputs that come from the hub before the first pass

    @property
    def read(self) -> int:
        """Bytes read over all passes."""
        return sum(one.read for one in self.passes)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(step.written for step in self.passes[-1].steps)

    @property
    def tensors(self) -> int:
        """Tensors of the output."""
        return len(self.passes[-1].steps)

    @property
    def flops(self) -> float:
        """Operations of matrix solvers."""
        return sum(one.work for one in self.passes)

    @property
    def memory(self) -> int:
        """Peak bytes of tensors in flight."""
        return max(self.in_flight())

    def in_flight(self) -> Sequence[int]:
        """The same by pass."""
        return [one.in_flight(self.workers, self.budget) for one in self.passes]

    @property
    def seconds(self) -> float:
        """Of matrix solvers, at the measured rate."""
        return self.flops / self.rate if self.flops else 0.0

    def duration(self, reading: float, writing: float) -> float:
        """Seconds of the whole run, about, where the disk reads and writes so many bytes a second.

        The output is written in the last pass, is read back once for its checksums (from memory, mostly) and goes to the disk before
        the run ends.
        """
        return sum(one.duration(reading, self.workers, self.rate) for one in self.passes) + self.written / writing
