"""What a comparison of paradigms shows beside its table: accuracy over α, single-task accuracy, cost.

Figs. 4 and 7 of the τJp paper; Figs. 7, 9, 10 and Table 4 of the attention-only paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import final

from thetau.diagnostics.results import Result
from thetau.errors import DataError
from thetau.studies.paradigms import ParadigmResults


@final
@dataclass(frozen=True, kw_only=True)
class AlphaCurve:
    """One paradigm: means over tasks and seeds on validation, in 0..1, for each of `alphas`."""

    name: str
    alphas: tuple[float, ...]
    absolute: tuple[float, ...]
    normalised: tuple[float, ...]
    seeds: int


@final
@dataclass(frozen=True, kw_only=True)
class AlphaCurves(Result):
    """Accuracy of θ₀ + α Σ τ_t over α, by paradigm. `n`: validation examples of a task, at most."""

    suite: str
    n: int
    curves: tuple[AlphaCurve, ...]


def alpha_curves(results: ParadigmResults) -> AlphaCurves:
    """From a comparison of paradigms. Raises `DataError` when nothing was added in it."""
    curves = []
    for name in results.names():
        rows = [row.addition for row in results.of(name) if row.addition is not None]
        if not rows:
            continue
        trials = [{trial.alpha: trial for trial in row.trials} for row in rows]
        alphas = tuple(
            alpha for alpha in sorted(trials[0]) if all(alpha in one for one in trials)
        )  # grids widen as each seed needs
        curves.append(
            AlphaCurve(
                name=name,
                alphas=alphas,
                absolute=tuple(mean(one[alpha].absolute for one in trials) for alpha in alphas),
                normalised=tuple(mean(one[alpha].normalised for one in trials) for alpha in alphas),
                seeds=len(rows),
            )
        )
    if not curves:
        raise DataError(f"suite {results.suite}: no paradigm in it was added over α.")
    sizes = max(results.sizes[task]["validation"] for task in results.tasks)
    return AlphaCurves(suite=results.suite, n=sizes, curves=tuple(curves))


@final
@dataclass(frozen=True, kw_only=True)
class SingleTask:
    """One paradigm: its own model on each task, test, the mean over seeds, in 0..1."""

    name: str
    accuracy: dict[str, float]
    average: float
    seeds: int


@final
@dataclass(frozen=True, kw_only=True)
class SingleTasks(Result):
    """Single-task accuracy by paradigm. `n`: test examples of each task; `pretrained`: the base."""

    suite: str
    n: dict[str, int]
    pretrained: dict[str, float]
    rows: tuple[SingleTask, ...]


def single_tasks(results: ParadigmResults) -> SingleTasks:
    """From a comparison of paradigms; joint models stand beside the individual ones."""
    rows = []
    for name in results.names():
        found = [row.individual or row.joint for row in results.of(name)]
        kept = [one for one in found if one is not None]
        if not kept:
            continue
        accuracy = {task: mean(one[task].value for one in kept) for task in results.tasks}
        rows.append(SingleTask(name=name, accuracy=accuracy, average=mean(accuracy.values()), seeds=len(kept)))
    return SingleTasks(
        suite=results.suite,
        n={task: results.sizes[task]["test"] for task in results.tasks},
        pretrained={task: results.pretrained[task].value for task in results.tasks},
        rows=tuple(rows),
    )


@final
@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One paradigm: parameters that there are and that are trained, mean seconds a step (of the fastest seed, the least disturbed), and the
    most resident memory of a process of its own that trains it.

    `own_process` is false for files of before, whose memory is that of the whole comparison by then and only rises.
    """

    name: str
    parameters: int
    trained: int
    seconds_a_step: float
    relative: float
    peak_gigabytes: float | None
    own_process: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Costs(Result):
    """The cost of fine-tuning. `relative` is seconds a step over those of the first paradigm."""

    suite: str
    rows: tuple[CostRow, ...]


def costs(results: ParadigmResults) -> Costs:
    """From a comparison of paradigms. Raises `DataError` when no cost was measured."""
    found = {name: [row.cost for row in results.of(name) if row.cost is not None] for name in results.names()}
    measured = {name: rows for name, rows in found.items() if rows}
    if not measured:
        raise DataError(f"suite {results.suite}: no cost was measured in it.")
    first = min(cost.seconds_a_step for cost in next(iter(measured.values())))
    return Costs(
        suite=results.suite,
        rows=tuple(
            CostRow(
                name=name,
                parameters=rows[0].parameters,
                trained=rows[0].trained,
                seconds_a_step=min(cost.seconds_a_step for cost in rows),
                relative=min(cost.seconds_a_step for cost in rows) / first,
                peak_gigabytes=max((cost.peak_gigabytes for cost in rows if cost.peak_gigabytes is not None), default=None),
                own_process=all(cost.own_process for cost in rows),
            )
            for name, rows in measured.items()
        ),
    )
