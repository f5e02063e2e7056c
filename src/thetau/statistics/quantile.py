"""The exact magnitudes that given shares of a task vector's entries reach, in two streaming passes and without a sort.

The bits of |x| as an integer are ordered as |x| itself. Round one counts the upper 16 bits (32,768 bins) and so finds the bins in which
the wanted entries lie; round two counts the lower 16 bits inside those bins. Counts are integers: no order or blocking can change them.
Numbers of either sign (`ranked_counts`) are ordered likewise once the bits below the sign are flipped in the negative ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from thetau.engine.kernels import Result
from thetau.parts import Site, Statistic

BINS = 1 << 15
FINE = 1 << 16


@dataclass(frozen=True)
class Bin:
    """Where the wanted entries lie, after round one, by task and cut: the bin, and the entry's rank from the top inside it."""

    upper: Int[Tensor, "task cut"]
    rank: Int[Tensor, "task cut"]


@dataclass(frozen=True, kw_only=True)
class MagnitudeQuantile(Statistic):
    """The smallest |x| that is kept when the ⌊gamma · n⌋ largest entries go and the ⌈density · n⌉ next ones stay, and the largest one.

    Float32 of shape `[task, 2]`, smallest first; n counts all entries of the vector (or of the tensor). Where too few are left below the
    outliers, fewer outliers go, so that the share that is kept is always `density`.
    """

    density: float
    gamma: float = 0.0
    per_tensor: bool = False
    pace: ClassVar[float] = 0.7e9

    def add(
        self, total: Int[Tensor, "task cut bin"] | None, stack: Float[Tensor, "task *block"], site: Site, seen: Bin | None
    ) -> Int[Tensor, "task cut bin"]:
        """Count a block's magnitudes."""
        if total is None:
            cuts, bins = (1, BINS) if seen is None else (seen.upper.shape[1], FINE)
            total = torch.zeros(stack.shape[0], cuts, bins, dtype=torch.int64)
        bits = stack.reshape(stack.shape[0], -1).float().abs().view(torch.int32)
        for task, row in enumerate(bits):
            if seen is None:
                total[task, 0] += torch.bincount(row >> 16, minlength=BINS)
                continue
            for cut, upper in enumerate(seen.upper[task]):
                total[task, cut] += torch.bincount(row[(row >> 16) == upper] & 0xFFFF, minlength=FINE)
        return total

    def fold(self, total: Int[Tensor, "task cut bin"], other: Int[Tensor, "task cut bin"]) -> Int[Tensor, "task cut bin"]:
        """Sum over tensors."""
        return total + other

    def finish(self, total: Int[Tensor, "task cut bin"], seen: Bin | None) -> Bin | Float[Tensor, "task 2"]:
        """After round one the bins, after round two the magnitudes."""
        if seen is None:
            ranks = torch.tensor([kept_ranks(self.density, self.gamma, int(n)) for n in total.sum((1, 2))], dtype=torch.int64)
            ranks = ranks if self.gamma else ranks[:, :1]  # the largest is then the largest of all: nothing to look for
            return Bin(*_from_top(total.expand(-1, ranks.shape[1], -1), ranks))
        lower, _ = _from_top(total, seen.rank)
        found = ((seen.upper << 16) | lower).to(torch.int32).view(torch.float32)
        return found if self.gamma else torch.cat([found, torch.full_like(found, torch.inf)], 1)

    @property
    def rounds(self) -> int:
        """One for the upper bits, one for the lower."""
        return 2

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round."""
        return ("upper", "lower")

    def from_compiled(self, result: Result) -> Int[Tensor, "task cut bin"]:
        """A tensor's counts."""
        assert result.counts is not None
        return torch.from_numpy(result.counts)

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by task and cut, and a copy for each tensor in flight."""
        return 8 * tasks * FINE * 3 * (2 if self.gamma else 1)


def kept_count(density: float, n: int) -> int:
    """⌈density · n⌉, the density being the decimal number that was written (0.2 of 10 entries is 2, not 3)."""
    return min(n, ceil(Fraction(str(density)) * n))


def kept_ranks(density: float, gamma: float, n: int) -> tuple[int, int]:
    """Ranks from the top, from 1, of the smallest and of the largest entry that is kept."""
    kept = kept_count(density, n)
    outliers = min(n - kept, floor(Fraction(str(gamma)) * n))
    return outliers + kept, outliers + 1


def _from_top(
    counts: Int[Tensor, "task cut bin"], rank: Int[Tensor, "task cut"]
) -> tuple[Int[Tensor, "task cut"], Int[Tensor, "task cut"]]:
    """The bin that holds the rank-th largest entry (1-based), and its rank inside the bin."""
    place, left = torch.zeros_like(rank), torch.zeros_like(rank)
    for task, cut in np.ndindex(*rank.shape):
        above = np.cumsum(counts[task, cut].numpy()[::-1])  # entries in this bin or a larger one, largest bin first
        found = min(int(np.searchsorted(above, int(rank[task, cut]))), len(above) - 1)
        place[task, cut] = len(above) - 1 - found
        left[task, cut] = rank[task, cut] - (int(above[found - 1]) if found else 0)
    return place, left


def ranked_counts(
    total: Int[Tensor, "task cut bin"] | None, values: Float[Tensor, "task *block"], seen: Bin | None
) -> Int[Tensor, "task cut bin"]:
    """A running total of counts with one more block in it: by the upper 16 bits, and once bins are known by the lower ones inside."""
    if total is None:
        total = torch.zeros(len(values), 1 if seen is None else seen.upper.shape[1], FINE, dtype=torch.int64)
    keys = ordered(values.reshape(len(values), -1))
    for task, row in enumerate(keys):
        if seen is None:
            total[task, 0] += torch.bincount((row >> 16) + BINS, minlength=FINE)
            continue
        for cut, upper in enumerate(seen.upper[task]):
            total[task, cut] += torch.bincount(row[(row >> 16) + BINS == upper] & 0xFFFF, minlength=FINE)
    return total


def ranked_finish(
    total: Int[Tensor, "task cut bin"], seen: Bin | None, ranks: Callable[[int], tuple[int, ...]]
) -> Bin | Float[Tensor, "task cut"]:
    """After the first pass the bins of the ranks (from the top, from 1, given how many entries there are), after the second the entries."""
    if seen is None:
        wanted = torch.tensor([ranks(int(count)) for count in total.sum((1, 2))], dtype=torch.int64)
        return Bin(*_from_top(total.expand(-1, wanted.shape[1], -1), wanted))
    lower, _ = _from_top(total, seen.rank)
    return unordered(((seen.upper - BINS) << 16) | lower)


def ordered(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers that are ordered as the numbers are; −0 is 0."""
    bits = (values.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def unordered(keys: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The numbers of such integers."""
    bits = keys.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
