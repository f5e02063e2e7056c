"""The best coefficient of a grid that widens by itself until the best lies inside.

A best value at the end of what was tried is no result: the next one might be better. So smaller values are tried below a best one at the
low end, down to `LOWEST`, and larger ones above one at the high end, up to `REACH` times where the grid began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError
from thetau.pace import steps

LOWEST = 0.02
REACH = 10.0
_STEP_DOWN, _STEP_UP = 0.5, 1.5


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """The best coefficient; every one that was tried, in order. `at_end`: it lies at an end all the same, so it is no result."""

    best: float
    tried: tuple[float, ...]
    at_end: bool


def search(grid: Sequence[float], score: Callable[[float], float], *, widen: bool = True, zero_wins_ties: bool = False) -> Found:
    """The value of the largest `score`; among equals the smallest above 0, so that 0 wins only where it is better than all others.

    A grid of one value is given, not searched; one with negative values is taken as it is. `zero_wins_ties`: where 0 means to do nothing, and
    what gains nothing is not done. Raises `DataError`: no value, or one twice.

    Examples:
        >>> search([0.2, 0.4, 0.6], lambda value: -((value - 0.1) ** 2))
        Found(best=0.1, tried=(0.2, 0.4, 0.6, 0.1, 0.05), at_end=False)
        >>> search([0.0, 0.5, 1.0], lambda value: 0.0).best
        0.02
    """
    checked_grid(grid)
    scores: dict[float, float] = {}
    with steps("trial", len(grid)) as step:

        def tried_at(value: float) -> None:
            step(f"{value:g}")
            scores[value] = score(value)

        for value in grid:
            tried_at(value)
        if widen and len(grid) > 1 and min(grid) >= 0:
            limit = REACH * max(grid)
            while (further := _beyond(scores, _best(scores, zero_wins_ties), limit)) is not None:
                tried_at(further)
    best = _best(scores, zero_wins_ties)
    tried = [value for value in scores if value != 0 or min(grid) < 0]
    at_end = len(scores) > 1 and best != 0 and best in (min(tried), max(tried))
    return Found(best=best, tried=tuple(scores), at_end=at_end)


def checked_grid(grid: Sequence[float]) -> Sequence[float]:
    """The grid, if it is one. Raises `DataError`."""
    if not grid or len(set(grid)) != len(grid):
        raise DataError(f"the grid of α must be different numbers, at least one. Got {list(grid)}.")
    return grid


def _best(scores: Mapping[float, float], zero_wins_ties: bool) -> float:
    return max(scores, key=lambda value: (scores[value], zero_wins_ties or value != 0, -value))


def _beyond(scores: Mapping[float, float], best: float, limit: float) -> float | None:
    """The next value to try, or None where the best lies inside or there is nothing further to try."""
    positive = sorted(value for value in scores if value > 0)
    if not positive:
        return None
    if best <= positive[0] and positive[0] > LOWEST:
        return max(round(_STEP_DOWN * positive[0], 6), LOWEST)
    if best == positive[-1] and positive[-1] < limit:
        return min(round(_STEP_UP * positive[-1], 6), limit)
    return None
