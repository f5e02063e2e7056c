"""From values to places: ticks, axes, how values are spread, and an order in which alike rows lie together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values `low`..`high` drawn from `start` to `stop`, by their logarithm where asked, with the values at which there is a tick."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, to a tenth of a pixel; values outside lie at the end.

        Examples:
            >>> Axis(low=0.0, high=10.0, start=0.0, stop=100.0, ticks=()).at(2.5)
            25.0
        """
        low, high, one = self.low, self.high, value
        if self.log:
            low, high, one = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (one - low) / (high - low) if high > low else 0.5
        return round(self.start + min(1.0, max(0.0, share)) * (self.stop - self.start), 1)


def axis(values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = False, count: int = 6) -> Axis:
    """An axis that holds all finite values and ends at ticks; with `zero` it holds 0 too."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log:
        low, high = min(finite, default=1.0), max(finite, default=10.0)
        first, last = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
        step = max(1, math.ceil((last - first) / count))
        return Axis(
            low=10.0**first,
            high=10.0**last,
            start=start,
            stop=stop,
            log=True,
            ticks=tuple(10.0**k for k in range(first, last + 1, step)),
        )
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    marks = ticks(low, high, count)
    return Axis(low=min(marks[0], low), high=max(marks[-1], high), start=start, stop=stop, ticks=tuple(marks))


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` of them.

    Examples:
        >>> ticks(0.13, 0.98, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def spread_of(values: Sequence[float], places: Sequence[float]) -> list[float]:
    """How thick values lie at each of `places`, the thickest being 1: normal kernels of Silverman's width.

    Silverman, "Density Estimation", 1986, Eq. 3.31. Nothing for fewer than four different values.
    """
    n, mean = len(values), sum(values) / len(values) if values else 0.0
    if len(set(values)) < 4:
        return []
    ordered = sorted(values)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in values) / (n - 1))
    quarter = (_quantile(ordered, 0.75) - _quantile(ordered, 0.25)) / 1.34
    width = 0.9 * (min(deviation, quarter) or deviation) * n ** (-1 / 5)
    found = [sum(math.exp(-0.5 * ((place - one) / width) ** 2) for one in values) for place in places]
    top = max(found, default=0.0)
    return [one / top for one in found] if top > 0 else []


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def order_of(values: Sequence[Sequence[float | None]]) -> list[int]:
    """An order of the rows in which alike ones are neighbours: average linkage, leaves in their best order. What is no number counts as 0.

    Examples:
        >>> order_of([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])[1]
        2
    """
    if len(values) < 3 or not values[0]:
        return list(range(len(values)))
    import numpy as np
    from scipy.cluster import hierarchy

    table = np.array([[one if one is not None and math.isfinite(one) else 0.0 for one in row] for row in values])
    linked = hierarchy.linkage(table, method="average", optimal_ordering=len(values) <= 400)
    return [int(place) for place in hierarchy.leaves_list(linked)]
