"""The exact magnitude that a given share of a task vector's entries reaches, in two streaming passes and without a sort.

The bits of |x| as an integer are ordered as |x| itself. Round one counts the upper 16 bits (32,768 bins) and so finds the bin in which
the wanted entry lies; round two counts the lower 16 bits inside that bin. Counts are integers: no order or blocking can change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thetau.engine.kernels import Result
from thetau.engine.types import Site

BINS = 1 << 15
FINE = 1 << 16


@dataclass(frozen=True)
class Bin:
    """Where the wanted entries lie, after round one, by task: the bin, and the entry's rank from the top inside it."""

    upper: Int[Tensor, " task"]
    rank: Int[Tensor, " task"]


@dataclass(frozen=True, kw_only=True)
class MagnitudeQuantile:
    """The ⌈density · n⌉-th largest |x| of each task, float32 of shape `[task]`; n counts all entries of the vector (or of the tensor)."""

    density: float
    per_tensor: bool = False
    rounds: int = 2

    def add(
        self, total: Int[Tensor, "task bin"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: Bin | None
    ) -> Int[Tensor, "task bin"]:
        """Count a block's magnitudes."""
        if total is None:
            total = torch.zeros(stack.shape[0], BINS if seen is None else FINE, dtype=torch.int64)
        bits = stack.reshape(stack.shape[0], -1).float().abs().view(torch.int32)
        for task, row in enumerate(bits):
            if seen is None:
                total[task] += torch.bincount(row >> 16, minlength=BINS)
            else:
                inside = row[(row >> 16) == seen.upper[task]]
                total[task] += torch.bincount(inside & 0xFFFF, minlength=FINE)
        return total

    def fold(self, total: Int[Tensor, "task bin"], other: Int[Tensor, "task bin"]) -> Int[Tensor, "task bin"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Int[Tensor, "task bin"], seen: Bin | None) -> Bin | Float[Tensor, " task"]:
        """After round one the bin, after round two the magnitude."""
        if seen is None:
            size = total.sum(1)
            rank = torch.tensor([kept_count(self.density, int(n)) for n in size], dtype=torch.int64)
            return Bin(*_from_top(total, rank))
        lower, _ = _from_top(total, seen.rank)
        return ((seen.upper << 16) | lower).to(torch.int32).view(torch.float32)

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round."""
        return ("upper", "lower")

    def from_compiled(self, result: Result) -> Int[Tensor, "task bin"]:
        """A tensor's counts."""
        assert result.counts is not None
        return torch.from_numpy(result.counts)

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by task, and a copy for each tensor in flight."""
        return 8 * tasks * FINE * 3


def kept_count(density: float, n: int) -> int:
    """⌈density · n⌉, the density being the decimal number that was written (0.2 of 10 entries is 2, not 3)."""
    return min(n, ceil(Fraction(str(density)) * n))


def _from_top(counts: Int[Tensor, "task bin"], rank: Int[Tensor, " task"]) -> tuple[Int[Tensor, " task"], Int[Tensor, " task"]]:
    """The bin that holds the rank-th largest entry (1-based), and its rank inside the bin."""
    above = counts.flip(1).cumsum(1)  # entries in this bin or a larger one, largest bin first
    place = (above < rank[:, None]).sum(1).clamp(max=counts.shape[1] - 1)
    before = torch.where(place > 0, above.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
    return counts.shape[1] - 1 - place, rank - before
