"""The exact magnitudes that given shares of a task vector's entries reach, in one or two streaming passes and without a sort.

The bits of |x| as an integer are ordered as |x| itself. Round one counts the upper 16 bits (32,768 bins) and so finds the bins in which
the wanted entries lie; round two counts the lower 16 bits inside those bins. Counts are integers: no order or blocking can change them.
Where a share of the entries was looked at first, one round counts the lower bits inside the two bins that the share points to and the
entries beyond them, which is enough unless the wanted entry lies elsewhere: then the two rounds are made after all.
Numbers of either sign (`ranked_counts`) are ordered likewise once the bits below the sign are flipped in the negative ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, prod
from typing import TYPE_CHECKING, ClassVar, Literal

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.engine.kernels import Inside, Result
from thetau.engine.window import BLOCK
from thetau.fields import each_number
from thetau.parts import Site, Statistic, Varying

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BINS = 1 << 15
FINE = 1 << 16
NEAR = 2  # bins that a guess holds: the likeliest and its nearer neighbour
Count = Literal["ceil", "floor"]


@dataclass(frozen=True)
class Bin:
    """Where the wanted entries lie, after round one, by task and cut: the bin, and the entry's rank from the top inside it.

    A rank of 0 says that no entry is wanted.
    """

    upper: Int[Tensor, "task cut"]
    rank: Int[Tensor, "task cut"]


@dataclass(frozen=True)
class Guess:
    """The first of `NEAR` bins in which each wanted entry probably lies."""

    first: Int[Tensor, "task cut"]


@dataclass(frozen=True)
class Counts:
    """Entries by bin, and by task which shares of them are asked for: density and gamma."""

    bins: Int[Tensor, "task cut bin"]
    shares: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Hits:
    """Entries inside guessed bins by their place there, those beyond, how many there are in all; and what is asked for, as in `Counts`."""

    bins: Int[Tensor, "task cut place"]
    above: Int[Tensor, "task cut"]
    entries: int
    guess: Guess
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
        bins = _count(total.bins if total is not None else None, stack.reshape(len(stack), -1).float().abs(), seen)
        return Counts(bins, total.shares if total is not None else self._shares(site))

    def fold(self, total: Counts | Hits, other: Counts | Hits) -> Counts | Hits:
        """Sum over tensors."""
        if isinstance(total, Hits) and isinstance(other, Hits):
            both = total.bins + other.bins, total.above + other.above, total.entries + other.entries
            return Hits(*both, total.guess, total.shares)
        return Counts(total.bins + other.bins, total.shares)

    def finish(self, total: Counts | Hits, seen: Bin | Guess | None) -> Bin | Float[Tensor, "task 2"] | None:
        """After round one the bins, after round two the magnitudes; after a round with a guess these, or nothing where it was wrong."""
        if isinstance(total, Hits):
            ranks = self._ranks(total.shares, [total.entries] * len(total.bins))
            inside = ranks - total.above
            if not bool((((inside > 0) & (inside <= total.bins.sum(2))) | (ranks == 0)).all()):
                return None
            place, _ = _from_top(total.bins, inside.clamp(min=0))
            return self._both(_numbers((total.guess.first << 16) + place, ranks))
        if isinstance(seen, Bin):
            return self._both(_magnitudes(total.bins, seen))
        ranks = self._ranks(total.shares, [int(n) for n in total.bins.sum((1, 2))])
        return Bin(*_from_top(total.bins.expand(-1, ranks.shape[1], -1), ranks))

    def guess(self, total: Counts) -> Guess:
        """The bin of each wanted entry, and the next one on the side of the bin where it lies."""
        found = self.finish(total, None)
        assert isinstance(found, Bin)
        held = total.bins.expand(-1, found.upper.shape[1], -1).gather(2, found.upper[..., None])[..., 0]
        lower = 2 * found.rank > held  # ranks count from the top
        return Guess((found.upper - lower.long()).clamp(0, BINS - NEAR))

    def done(self, seen: object) -> bool:
        """Whether they are magnitudes."""
        return isinstance(seen, torch.Tensor)

    def _ranks(self, shares: Sequence[tuple[float, float]], sizes: Sequence[int]) -> Int[Tensor, "task cut"]:
        """Of the smallest and the largest kept entry, from the top; where no outliers go, the largest is that of all: nothing to look for."""
        wanted = [kept_ranks(*share, n, self.count, self.least) for share, n in zip(shares, sizes, strict=True)]
        ranks = torch.tensor(wanted, dtype=torch.int64)
        return ranks if self._two else ranks[:, :1]

    def _both(self, found: Float[Tensor, "task cut"]) -> Float[Tensor, "task 2"]:
        """With the largest magnitude, which is without bound where none was looked for."""
        return found if self._two else torch.cat([found, torch.full_like(found, torch.inf)], 1)

    @property
    def rounds(self) -> int:
        """One for the upper bits, one for the lower."""
        return 2

    @property
    def compiled(self) -> tuple[str, ...]:
        """What the compiled loop calls each round."""
        return ("upper", "lower")

    @property
    def guided(self) -> str:
        """Lower bits inside the bins of a guess, and what lies beyond."""
        return "inside"

    def inside(self, seen: Bin | Guess | None) -> Inside | None:
        """Where the lower bits are counted."""
        if seen is None:
            return None
        return Inside(seen.upper.tolist()) if isinstance(seen, Bin) else Inside(seen.first.tolist(), NEAR)

    def from_compiled(self, result: Result, site: Site, seen: Bin | Guess | None) -> Counts | Hits:
        """A tensor's counts."""
        assert result.counts is not None
        bins = torch.from_numpy(result.counts)
        if not isinstance(seen, Guess):
            return Counts(bins, self._shares(site))
        assert result.above is not None
        return Hits(bins, torch.from_numpy(result.above), prod(site.shape), seen, self._shares(site))

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by task and cut, and a copy for each tensor in flight."""
        return 8 * tasks * FINE * 3 * NEAR * (2 if self._two else 1)

    @property
    def _two(self) -> bool:
        """Whether the largest kept magnitude is looked for too."""
        return any(each_number(self.gamma))

    def _shares(self, site: Site) -> tuple[tuple[float, float], ...]:
        return tuple(zip(site.per_task(self.density), site.per_task(self.gamma), strict=True))


class Derived(ABC):
    """A number that is not negative, made of the entries of all tasks at one place, or of the places around it within a row."""

    @abstractmethod
    def values(self, stack: Float[Tensor, "task *block"], site: Site) -> Float[Tensor, "*block"]:
        """The numbers of a block of whole rows."""

    @abstractmethod
    def ranks(self, count: int, positive: int) -> tuple[int, ...]:
        """Which of a tensor's numbers are looked for, from the largest, which is 1; 0 for none. So many are above 0."""


@dataclass(frozen=True)
class DerivedCounts:
    """A tensor's numbers by bin, and how many are above 0."""

    bins: Int[Tensor, "1 cut bin"]
    positive: int


@dataclass(frozen=True, kw_only=True)
class DerivedQuantile(Statistic):
    """The numbers of certain ranks among those that `of` makes of a tensor's stack, exactly, as `MagnitudeQuantile` finds magnitudes.

    Float32 of shape `[rank]`, one such tensor for every tensor; infinite for rank 0.
    """

    of: Derived

    def add(
        self, total: DerivedCounts | None, stack: Float[Tensor, "task *block"], site: Site, seen: Bin | None
    ) -> DerivedCounts:
        """Count a block's numbers."""
        values = self.of.values(stack, site).float().reshape(1, -1)
        bins = _count(total.bins if total is not None else None, values, seen)
        return DerivedCounts(bins, int((values > 0).sum()) + (total.positive if total is not None else 0))

    def fold(self, total: DerivedCounts, other: DerivedCounts) -> DerivedCounts:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: DerivedCounts, seen: Bin | None) -> Bin | Float[Tensor, " rank"]:
        """After round one the bins, after round two the numbers."""
        if seen is not None:
            return _magnitudes(total.bins, seen)[0]
        ranks = torch.tensor([self.of.ranks(int(total.bins.sum()), total.positive)], dtype=torch.int64)
        return Bin(*_from_top(total.bins.expand(-1, ranks.shape[1], -1), ranks))

    @property
    def rounds(self) -> int:
        """One for the upper bits, one for the lower."""
        return 2

    @property
    def per_tensor(self) -> bool:
        """Always."""
        return True

    def memory(self, tasks: int, elements: int) -> int:
        """Counts by rank, with a copy for each tensor in flight, and a block's numbers."""
        return 8 * FINE * 3 * len(self.of.ranks(1, 1)) + 4 * 4 * min(elements, BLOCK)


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


def _count(
    bins: Int[Tensor, "group cut bin"] | None, values: Float[Tensor, "group n"], seen: Bin | None
) -> Int[Tensor, "group cut bin"]:
    """The counts with more numbers in them: by their upper bits, or by the lower ones of those that lie in the bins found."""
    if bins is None:
        cuts, size = (1, BINS) if seen is None else (seen.upper.shape[1], FINE)
        bins = torch.zeros(len(values), cuts, size, dtype=torch.int64)
    for group, row in enumerate(values.view(torch.int32)):
        if seen is None:
            bins[group, 0] += torch.bincount(row >> 16, minlength=BINS)
            continue
        for cut, upper in enumerate(seen.upper[group]):
            bins[group, cut] += torch.bincount(row[(row >> 16) == upper] & 0xFFFF, minlength=FINE)
    return bins


def _magnitudes(bins: Int[Tensor, "group cut bin"], seen: Bin) -> Float[Tensor, "group cut"]:
    """What the second round's counts say; infinite for rank 0."""
    lower, _ = _from_top(bins, seen.rank)
    return _numbers((seen.upper << 16) | lower, seen.rank)


def _numbers(bits: Int[Tensor, "group cut"], rank: Int[Tensor, "group cut"]) -> Float[Tensor, "group cut"]:
    """Numbers by their bits; infinite for rank 0."""
    return bits.to(torch.int32).view(torch.float32).masked_fill(rank == 0, torch.inf)


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
