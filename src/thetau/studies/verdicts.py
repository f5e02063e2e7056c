r"""When a claim holds: the rules that every page of experiments follows, written down before its figures.

1. The units are tasks, and seeds where there are several. Methods, or partitions, of the same tasks are no further units: they are averaged
   within the task first.
2. The interval is that of the mean lead at 95 %: Student's t over the variance of a bootstrap that draws tasks and seeds independently (Owen,
   "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007), which for a balanced table has a closed form, each part of it unbiased; the
   degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946). With one seed this is the usual interval over tasks.
3. A claim *holds* where the whole interval is on its side of 0, *does not hold* where all of it is on the other, and is *not told apart* where
   0 is inside or at an end. An equality is no win.
4. There is no verdict on one task, where a coefficient lies at the end of its grid or was chosen from fewer validation examples than
   `VALIDATION` though the task has more, where a control split was smaller than `CONTROL` though there are more, and where two things were
   compared at different values of what was to be kept.
5. What must be kept is compared at *equal* values: `at_control` reads the target's value where the control falls to its floor, between the
   values of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Literal, final

from thetau.errors import DataError

VALIDATION = 500
CONTROL = 1000
Word = Literal["holds", "does not hold", "not told apart", "no verdict"]


@final
@dataclass(frozen=True, kw_only=True)
class Lead:
    """A mean lead with its 95 % interval `low`..`high`, in the unit of what was given; the ends are infinite for one task."""

    value: float
    low: float
    high: float
    tasks: int
    seeds: int


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rules say of a claim. `reasons`: why there is no verdict. `lead`: None where nothing could be compared."""

    word: Word
    lead: Lead | None = None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`holds (+2.0, +1.1 to +2.9; 5 tasks, 2 seeds)`; the lead stands beside a missing verdict too."""
        parts = []
        if self.lead is not None:
            seeds = f", {self.lead.seeds} seeds" if self.lead.seeds > 1 else ""
            interval = f", {self.lead.low:+.1f} to {self.lead.high:+.1f}" if math.isfinite(self.lead.low) else ""
            tasks = f"{self.lead.tasks} task{'s' if self.lead.tasks > 1 else ''}"
            parts.append(f"{self.lead.value:+.1f}{interval}; {tasks}{seeds}")
        return " ".join([self.word, *(f"({part})" for part in parts)]) + (f": {'; '.join(self.reasons)}" if self.reasons else "")


@final
@dataclass(frozen=True, kw_only=True)
class AtControl:
    """Where the control falls to its floor: the coefficient and the target's value there.

    `inside` is false where it stays above over the whole curve: then these are the curve's last, and a longer one is needed.
    """

    alpha: float
    target: float
    inside: bool


def lead_of(values: Mapping[str, Sequence[float]]) -> Lead:
    """The mean of task → value by seed, with the interval of rule 2. Raises `DataError`: no task, or not every seed for every task.

    Examples:
        >>> lead = lead_of({"sst2": [1.0], "mr": [2.0], "cr": [3.0]})
        >>> f"{lead.value:.1f}, {lead.low:.2f} to {lead.high:.2f}"
        '2.0, -0.48 to 4.48'
    """
    rows = [list(row) for row in values.values()]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        got = ", ".join(f"{task}: {len(row)}" for task, row in values.items()) or "no task"
        raise DataError(f"a lead needs at least one task, and the same seeds for every task. Got {got}.")
    tasks, seeds = len(rows), len(rows[0])
    centre = mean(mean(row) for row in rows)
    if tasks == 1:
        return Lead(value=centre, low=-math.inf, high=math.inf, tasks=1, seeds=seeds)
    parts = [(part, freedom) for part, freedom in _variances(rows) if part > 0]
    if not parts:
        return Lead(value=centre, low=centre, high=centre, tasks=tasks, seeds=seeds)
    from scipy import stats

    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / freedom for part, freedom in parts)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    return Lead(value=centre, low=centre - half, high=centre + half, tasks=tasks, seeds=seeds)


def _variances(rows: Sequence[Sequence[float]]) -> list[tuple[float, int]]:
    """The parts of the bootstrap's variance with their degrees of freedom: tasks, seeds, and what the two leave over."""
    tasks, seeds = len(rows), len(rows[0])
    by_task = [mean(row) for row in rows]
    by_seed = [mean(column) for column in zip(*rows, strict=True)]
    centre = mean(by_task)
    found = [(sum((value - centre) ** 2 for value in by_task) / (tasks * (tasks - 1)), tasks - 1)]
    if seeds > 1:
        left = sum((value - by_task[i] - by_seed[j] + centre) ** 2 for i, row in enumerate(rows) for j, value in enumerate(row))
        both = (tasks - 1) * (seeds - 1)
        found += [
            (sum((value - centre) ** 2 for value in by_seed) / (seeds * (seeds - 1)), seeds - 1),
            (left / (both * tasks * seeds), both),
        ]
    return found


def judge(values: Mapping[str, Sequence[float]], *, lower: bool = False, reasons: Sequence[str] = ()) -> Verdict:
    """The verdict on task → lead by seed; with `lower` the claim is that the lead is below 0.

    `reasons`: what rule 4 holds against these figures, each as a few words. Raises `DataError` as `lead_of`.

    Examples:
        >>> str(judge({"sst2": [1.0], "mr": [1.5], "cr": [2.0]}))
        'holds (+1.5, +0.3 to +2.7; 3 tasks)'
        >>> str(judge({"sst2": [0.0], "mr": [0.0]}))
        'not told apart (+0.0, +0.0 to +0.0; 2 tasks)'
    """
    if not values:
        return Verdict(word="no verdict", reasons=("not measured", *reasons))
    lead = lead_of(values)
    given = tuple(reasons)
    if lead.tasks == 1:
        return Verdict(word="no verdict", lead=lead, reasons=("one task", *given))
    if given:
        return Verdict(word="no verdict", lead=lead, reasons=given)
    if lead.low <= 0 <= lead.high:
        return Verdict(word="not told apart", lead=lead)
    return Verdict(word="holds" if (lead.high < 0) == lower else "does not hold", lead=lead)


def few_examples(n: int, available: int | None = None, *, least: int = VALIDATION, split: str = "validation") -> list[str]:
    """Rule 4 on the size of a split: nothing where it has `least` examples, or all `available` ones (None: not known).

    Examples:
        >>> few_examples(60)
        ['from 60 validation examples a task, where 500, or all that there are, are needed']
        >>> few_examples(200, available=200)
        []
    """
    if n >= least or (available is not None and n >= available):
        return []
    needed = f"{least}, or all that there are," if available is None else f"{min(least, available)}"
    return [f"from {n} {split} examples a task, where {needed} are needed"]


def at_end(chosen: Sequence[tuple[float, Sequence[float]]]) -> list[str]:
    """Rule 4 on grids: of (coefficient, the values tried), those that lie at an end; 0 is none, below it there is nothing to try.

    Examples:
        >>> at_end([(0.5, (0.5, 1.0)), (0.7, (0.5, 0.7, 1.0))])
        ['1 of 2 coefficients at the end of their grid']
    """
    ends = sum(value != 0 and value in (min(grid), max(grid)) for value, grid in chosen)
    return [f"{ends} of {len(chosen)} coefficients at the end of their grid"] if ends else []


def at_control(curve: Sequence[tuple[float, float, float]], floor: float) -> AtControl:
    """Where a curve of (α, target, control) first falls to `floor`, by straight lines between its points; α from 0 up.

    The target is the lowest on the way there, since a smaller α that forgets more is allowed as well. Raises `DataError`: no curve, or
    one that begins below the floor.

    Examples:
        >>> at_control([(0.0, 0.9, 0.8), (1.0, 0.5, 0.7), (2.0, 0.1, 0.5)], 0.6)
        AtControl(alpha=1.5, target=0.3, inside=True)
    """
    points = sorted(curve)
    if not points or points[0][2] < floor:
        got = "no point" if not points else f"{points[0][2]:g} at α = {points[0][0]:g}"
        raise DataError(f"a curve must begin at or above the control's floor, {floor:g}. Got {got}.")
    lowest = points[0][1]
    for (alpha, target, control), (next_alpha, next_target, next_control) in pairwise(points):
        if next_control < floor:
            share = (control - floor) / (control - next_control)
            found = target + share * (next_target - target)
            return AtControl(alpha=alpha + share * (next_alpha - alpha), target=min(lowest, found), inside=True)
        lowest = min(lowest, next_target)
    return AtControl(alpha=points[-1][0], target=lowest, inside=False)
