"""The exact magnitudes that given shares of a task vector's entries reach, in two streaming passes and without a sort.

The bits of |x| as an integer are ordered as |x| itself. Round one counts the upper 16 bits (32,768 bins) and so finds the bins in which
the wanted entries lie; round two counts the lower 16 bits inside those bins. Counts are integers: no order or blocking can change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from thetau.engine.kernels import Result
from thetau.fields import each_number
from thetau.parts import Site, Statistic, Varying

BINS = 1 << 15
FINE = 1 << 16
Count = Literal["ceil", "floor"]


@dataclass(frozen=True)
class Bin:
    """Where the wanted entries lie, after round one, by task and cut: the bin, and the entry's rank from the top inside it.

    A rank of 0 says that no entry is wanted.
    """

    upper: Int[Tensor, "task cut"]
    rank: Int[Tensor, "task cut"]


@dataclass(frozen=True)
class Counts:
    """Entries by bin, and by task which shares of them are asked for: density and gamma."""

    bins: Int[Tensor, "task cut bin"]
    shares: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class MagnitudeQuantile(Statistic):
    """The smallest |x| that is kept when the ⌊gamma · n⌋ largest entries go and the ⌈density · n⌉ next ones stay, and the largest one.

    Float32 of shape `[task, 2]`, smallest first; n counts all entries of the vector (or of the tensor). Where too few are left below the
    outliers, fewer outliers go, so that the share that is kept is always `density`. `count="floor"` keeps ⌊density · n⌋ instead, at
    least `least`, both products as floating-point numbers have them; where that is 0 the smallest kept magnitude is infinite. Density and
    gamma vary by task, and by pattern where the quantiles are `per_tensor`.
    """

    density: Varying
    gamma: Varying = 0.0
    per_tensor: bool = False
    count: Count = "ceil"
    least: int = 0
    pace: ClassVar[float] = 0.7e9

    def add(self, total: Counts | None, stack: Float[Tensor, "task *block"], site: Site, seen: Bin | None) -> Counts:
        """Count a block's magnitudes."""
        if total is None:
            cuts, bins = (1, BINS) if seen is None else (seen.upper.shape[1], FINE)
            total = Counts(torch.zeros(stack.shape[0], cuts, bins, dtype=torch.int64), self._shares(site))
        bits = stack.reshape(stack.shape[0], -1).float().abs().view(torch.int32)
        for task, row in enumerate(bits):
            if seen is None:
                total.bins[task, 0] += torch.bincount(row >> 16, minlength=BINS)
                continue
            for cut, upper in enumerate(seen.upper[task]):
                total.bins[task, cut] += torch.bincount(row[(row >> 16) == upper] & 0xFFFF, minlength=FINE)
        return total

    def fold(self, total: Counts, other: Counts) -> Counts:
        """Sum over tensors."""
        return Counts(total.bins + other.bins, total.shares)

    def finish(self, total: Counts, seen: Bin | None) -> Bin | Float[Tensor, "task 2"]:
        """After round one the bins, after round two the magnitudes."""
        if seen is None:
            sizes = [int(n) for n in total.bins.sum((1, 2))]
            wanted = [kept_ranks(*share, n, self.count, self.least) for share, n in zip(total.shares, sizes, strict=True)]
            ranks = torch.tensor(wanted, dtype=torch.int64)
            ranks = ranks if self._two else ranks[:, :1]  # the largest is then the largest of all: nothing to look for
            return Bin(*_from_top(total.bins.expand(-1, ranks.shape[1], -1), ranks))
        lower, _ = _from_top(total.bins, seen.rank)
        found = ((seen.upper << 16) | lower).to(torch.int32).view(torch.float32).masked_fill(seen.rank == 0, torch.inf)
        return found if self._two else torch.cat([found, torch.full_like(found, torch.inf)], 1)

    @property
    def rounds(self) -> int:
        """One for the upper bits, one for the lower."""
        return 2

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round."""
        return ("upper", "lower")

    def from_compiled(self, result: Result, site: Site) -> Counts:
        """A tensor's counts."""
        assert result.counts is not None
        return Counts(torch.from_numpy(result.counts), self._shares(site))

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by task and cut, and a copy for each tensor in flight."""
        return 8 * tasks * FINE * 3 * (2 if self._two else 1)

    @property
    def _two(self) -> bool:
        """Whether the largest kept magnitude is looked for too."""
        return any(each_number(self.gamma))

    def _shares(self, site: Site) -> tuple[tuple[float, float], ...]:
        return tuple(zip(site.per_task(self.density), site.per_task(self.gamma), strict=True))


def kept_count(density: float, n: int, count: Count = "ceil", least: int = 0) -> int:
    """⌈density · n⌉, the density being the decimal number that was written (0.2 of 10 entries is 2, not 3).

    With `floor` ⌊density · n⌋ of the product as it is rounded (0.29 of 100 entries is 28), at least `least`.
    """
    if count == "floor":
        return min(n, max(int(density * n), least))
    return min(n, ceil(Fraction(str(density)) * n))


def kept_ranks(density: float, gamma: float, n: int, count: Count = "ceil", least: int = 0) -> tuple[int, int]:
    """Ranks from the top, from 1, of the smallest and of the largest entry that is kept; 0 for both where none is."""
    kept = kept_count(density, n, count, least)
    if kept == 0:
        return 0, 0
    share = int(gamma * n) if count == "floor" else floor(Fraction(str(gamma)) * n)
    outliers = min(n - kept, share)
    return outliers + kept, outliers + 1


def _from_top(
    counts: Int[Tensor, "task cut bin"], rank: Int[Tensor, "task cut"]
) -> tuple[Int[Tensor, "task cut"], Int[Tensor, "task cut"]]:
    """The bin that holds the rank-th largest entry (1-based), and its rank inside the bin; rank 0 stays 0."""
    place, left = torch.zeros_like(rank), torch.zeros_like(rank)
    for task, cut in np.ndindex(*rank.shape):
        above = np.cumsum(counts[task, cut].numpy()[::-1])  # entries in this bin or a larger one, largest bin first
        found = min(int(np.searchsorted(above, int(rank[task, cut]))), len(above) - 1)
        place[task, cut] = len(above) - 1 - found
        left[task, cut] = rank[task, cut] - (int(above[found - 1]) if found else 0)
    return place, left
