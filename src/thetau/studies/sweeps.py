r"""How a merge depends on its fields, on λ, on which tasks take part, and what each task alone would reach.

WUDI-Merging, Figs. 4 to 6 and 13, and AWD, Figs. 3, 6, 7 and Tables 10 and 11, for any method and any of its fields:

- a grid over fields × λ, each point with the value, the number of examples, the 95 % interval and the loss of every task;
- sampled subsets of K tasks, merged without the others, with a 95 % interval over subsets;
- each task left out: the others' merge on it;
- the upper bound: $\theta_0 + \lambda\,\tau_t$ of each task alone.

λ is chosen on validation and reported on test, and widens as everywhere (`thetau.evaluate.grids`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any, final

from thetau.diagnostics.results import Result
from thetau.errors import DataError
from thetau.evaluate.grids import Found, search
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Loss, Measure
from thetau.evaluate.merging import build_method, merge_out
from thetau.evaluate.session import Session
from thetau.evaluate.spaces import Space
from thetau.pace import steps
from thetau.studies.arithmetic import ADDITION, OutOfDistribution
from thetau.studies.options import Sweep
from thetau.studies.verdicts import lead_of
from thetau.tasks.suite import MethodChoice

MERGED = "merged"


@final
@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One λ: every task's value and loss on test, means over tasks on test, and the mean that λ is chosen by, on validation."""

    scale: float
    accuracy: dict[str, Measure]
    loss: dict[str, Loss]
    absolute: float
    normalised: float
    validation: float


@final
@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One setting of the fields. `chosen`: the λ of best validation; `at_end`: it lies at the end of those tried. `points` in the order of λ."""

    fields: dict[str, Any]
    method: str
    chosen: float
    at_end: bool
    points: tuple[SweepPoint, ...]

    @property
    def best(self) -> SweepPoint:
        """The point of the chosen λ."""
        return next(point for point in self.points if point.scale == self.chosen)


@final
@dataclass(frozen=True, kw_only=True)
class SubsetValue:
    """One subset of tasks, merged without the others: λ of best validation, and means over its tasks on test."""

    tasks: tuple[str, ...]
    chosen: float
    at_end: bool
    absolute: float
    normalised: float


@final
@dataclass(frozen=True, kw_only=True)
class Subsets:
    """`size` tasks at a time: the mean normalised value over subsets, with the 95 % interval of that mean over subsets (Student's t).

    Subsets share tasks, so that the interval is of the choice of tasks among these ones, not of other tasks. `every`: they are all there are.
    """

    size: int
    every: bool
    mean: float
    low: float
    high: float
    values: tuple[SubsetValue, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Alone:
    """θ₀ + λ τ of one task on that task, on test. `one`: λ = 1, `best`: λ of best validation."""

    task: str
    one: Measure
    scale: float
    at_end: bool
    best: Measure


@final
@dataclass(frozen=True, kw_only=True)
class Swept(Result):
    """What `sweep` found."""

    models: tuple[str, ...]
    base: str
    space: str
    limits: dict[str, int | None]
    individual: dict[str, Measure]
    rows: tuple[SweepRow, ...]
    subsets: tuple[Subsets, ...]
    left_out: tuple[OutOfDistribution, ...]
    alone: tuple[Alone, ...]


def settings(options: Sweep) -> list[dict[str, Any]]:
    """Every combination of the values of the fields that vary, over those that do not."""
    names = list(options.over)
    return [{**options.fields, **dict(zip(names, values, strict=True))} for values in product(*options.over.values())]


def sweep(session: Session, options: Sweep | None = None, *, say: Callable[[str], None] = lambda line: None) -> Swept:
    """Measure a method over its fields and λ; with the options, over subsets and without each task, and each task alone.

    Raises:
        RecipeError: an unknown method or field, a value out of its range.
        DataError: fewer than two models, a size of subsets that there is not.
    """
    given = options or Sweep()
    names = [model.task for model in session.models]
    if len(names) < 2:
        raise DataError(f"a sweep is over merges of at least two models. Got {len(names)}.")
    wrong = [size for size in given.subsets if not 1 <= size <= len(names)]
    if wrong:
        raise DataError(f"subsets must have 1 to {len(names)} of the tasks. Got {wrong[0]}.")
    asked = settings(given)
    methods = [build_method(_choice(given.method, fields), "--over") for fields in asked]  # before any work
    grid = given.alphas or ADDITION
    own = {split: {name: session.space.accuracy({name: 1.0}, name, split) for name in names} for split in ("validation", "test")}
    drawn = {size: subsets_of(names, size, given.draws, given.seed) for size in given.subsets}
    count = len(asked) + sum(map(len, drawn.values())) + len(names) * (given.left_out + given.upper_bound)
    rows, sampled = [], []
    with steps("row", count) as step:
        for fields, method in zip(asked, methods, strict=True):
            varied = {name: fields[name] for name in given.over}
            step(", ".join(f"{name}={value}" for name, value in varied.items()) or given.method)
            rows.append(sweep_row(merged_space(session, names, method), names, own, grid, varied, repr(method)))
            say(f"{rows[-1].fields or given.method}: {100 * rows[-1].best.absolute:.1f} at λ = {rows[-1].chosen:g}")
        for size, sets in drawn.items():
            values = []
            for tasks in sets:
                step(" + ".join(tasks))
                values.append(_subset(session, tasks, methods[0], own, grid))
            sampled.append(over_subsets(size, values, every=len(sets) == comb(len(names), size)))
            say(f"{size} tasks: {100 * sampled[-1].mean:.1f} normalised, over {len(values)} subsets")
        without = left_out(session, names, methods[0], own, grid, step) if given.left_out else ()
        alone = upper_bound(session.space, names, grid, step) if given.upper_bound else ()
    return Swept(
        models=tuple(model.given for model in session.models),
        base=session.base,
        space="tangent" if session.tangent else "weights",
        limits=session.limits,
        individual=own["test"],
        rows=tuple(rows),
        subsets=tuple(sampled),
        left_out=without,
        alone=alone,
    )


def merged_space(session: Session, names: Sequence[str], method: Any) -> Space:
    """The space of what a method makes of these tasks' models, as `MERGED`, at λ = 1."""
    vector = merge_out({name: session.held[name] for name in names}, method).state_dict()
    session.evaluator.load_base()
    return session.space_of({MERGED: vector})


def sweep_row(
    space: Space,
    tasks: Sequence[str],
    own: Mapping[str, Mapping[str, Measure]],
    grid: Sequence[float],
    fields: Mapping[str, Any],
    method: str,
) -> SweepRow:
    """λ over `grid`, and further until the best is inside; every value on test too, since a sweep is a curve."""
    scores: dict[float, float] = {}

    def score(scale: float) -> float:
        scores[scale] = normalised(space.accuracies({MERGED: scale}, tasks, "validation"), own["validation"])
        return scores[scale]

    chosen = search(grid, score)
    points = []
    for scale in sorted(scores):
        found = space.accuracies({MERGED: scale}, tasks, "test")
        points.append(
            SweepPoint(
                scale=scale,
                accuracy=found,
                loss=space.losses({MERGED: scale}, tasks, "test"),
                absolute=average(found),
                normalised=normalised(found, own["test"]),
                validation=scores[scale],
            )
        )
    return SweepRow(fields=dict(fields), method=method, chosen=chosen.best, at_end=chosen.at_end, points=tuple(points))


def subsets_of(names: Sequence[str], size: int, draws: int, seed: int = 0) -> list[tuple[str, ...]]:
    """`draws` different subsets of `size` names, drawn by the seed; all where there are no more. In the order of the names.

    Examples:
        >>> subsets_of(["a", "b", "c"], 2, 8)
        [('a', 'b'), ('a', 'c'), ('b', 'c')]
    """
    if comb(len(names), size) <= draws:
        return list(combinations(names, size))
    generator = random.Random(f"{seed}/{size}")
    found: set[tuple[int, ...]] = set()
    while len(found) < draws:
        found.add(tuple(sorted(generator.sample(range(len(names)), size))))
    return [tuple(names[i] for i in places) for places in sorted(found)]


def over_subsets(size: int, values: Sequence[SubsetValue], *, every: bool) -> Subsets:
    """The mean of their normalised values, with its interval."""
    lead = lead_of({"+".join(value.tasks): [value.normalised] for value in values})
    return Subsets(size=size, every=every, mean=lead.value, low=lead.low, high=lead.high, values=tuple(values))


def left_out(
    session: Session,
    names: Sequence[str],
    method: Any,
    own: Mapping[str, Mapping[str, Measure]],
    grid: Sequence[float],
    step: Callable[[str], None] = lambda text: None,
) -> tuple[OutOfDistribution, ...]:
    """The merge of all tasks but one, at the λ that is best for those, on the one that is left out (AWD, Table 10). `step` is told of each."""
    found = []
    for task in names:
        step(f"without {task}")
        others = [name for name in names if name != task]
        space = merged_space(session, others, method)
        chosen = _chosen(space, others, own, grid)
        found.append(
            OutOfDistribution(
                task=task,
                alpha=chosen.best,
                base=space.accuracy({}, task, "test"),
                merged=space.accuracy({MERGED: chosen.best}, task, "test"),
                at_end=chosen.at_end,
            )
        )
    return tuple(found)


def upper_bound(
    space: Space, names: Sequence[str], grid: Sequence[float], step: Callable[[str], None] = lambda text: None
) -> tuple[Alone, ...]:
    """θ₀ + λ τ of each task alone, λ by its own validation (AWD, Fig. 7): what no merge of the same vectors is expected to pass. `step` is told of each."""
    found = []
    for name in names:
        step(f"{name} alone")

        def score(scale: float, name: str = name) -> float:
            return space.accuracy({name: scale}, name, "validation").value

        chosen = search(grid, score)
        one, best = (space.accuracy({name: scale}, name, "test") for scale in (1.0, chosen.best))
        found.append(Alone(task=name, one=one, scale=chosen.best, at_end=chosen.at_end, best=best))
    return tuple(found)


def _choice(method: str, fields: Mapping[str, Any]) -> MethodChoice:
    if method == "sum":
        if fields:
            raise DataError("a sum has no fields to set or to vary; name a --method.")
        return MethodChoice(name="sum", method="task_arithmetic", fields={})
    return MethodChoice(name=method, method=method, fields=dict(fields))


def _chosen(space: Space, tasks: Sequence[str], own: Mapping[str, Mapping[str, Measure]], grid: Sequence[float]) -> Found:
    return search(grid, lambda scale: normalised(space.accuracies({MERGED: scale}, tasks, "validation"), own["validation"]))


def _subset(
    session: Session,
    tasks: Sequence[str],
    method: Any,
    own: Mapping[str, Mapping[str, Measure]],
    grid: Sequence[float],
) -> SubsetValue:
    space = merged_space(session, tasks, method)
    chosen = _chosen(space, tasks, own, grid)
    found = space.accuracies({MERGED: chosen.best}, tasks, "test")
    return SubsetValue(
        tasks=tuple(tasks),
        chosen=chosen.best,
        at_end=chosen.at_end,
        absolute=average(found),
        normalised=normalised(found, own["test"]),
    )
