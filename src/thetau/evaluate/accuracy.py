"""Accuracy with its number of examples and a 95 % interval.

The interval is Wilson's score interval (Wilson, JASA 22, 1927), which stays inside 0..1 and holds for few examples and for
rates near 0 or 1, where the normal one does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError

Z95 = 1.959963984540054  # standard deviations of a 95 % interval


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a rate of `correct` out of `n`, as (low, high) in 0..1; 95 % for the default `z`.

    Examples:
        >>> low, high = wilson(90, 100)
        >>> f"{low:.3f} to {high:.3f}"
        '0.826 to 0.945'
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"an accuracy needs n ≥ 1 and 0 ≤ correct ≤ n. Got correct={correct}, n={n}.")
    rate, weight = correct / n, z * z / n
    centre = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / n + weight / (4 * n)) / (1 + weight)
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


@final
@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """`correct` of `n` examples; `value` in 0..1 with the 95 % interval `low`..`high`."""

    correct: int
    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, n: int) -> Accuracy:
        """From counts. Raises `DataError` when they are not counts of one sample."""
        low, high = wilson(correct, n)
        return cls(correct=correct, n=n, value=correct / n, low=low, high=high)
