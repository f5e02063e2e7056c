r"""Arithmetic on task vector bases: addition, negation, and tasks that no basis was made of.

Zeng et al. 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>, Table 1 and Section 5.2:
$\theta_0 + \lambda\,\mathrm{merge}_{out}(\tau_{B_1}, \dots)$; $\theta_0 - \alpha\,\tau_B$ of the basis most similar to the task;
$\theta_0 + \alpha\,\mathrm{merge}_{out}$ of the bases that are similar to a new task, and a new basis where none is. As in Section 6.3,
coefficients are chosen on validation and α = 1 stands beside the chosen one; the numbers are of test.

Departs from the paper once: besides one λ for all bases, each basis may get its own, by a coordinate search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor

from thetau.engine.executor import Engine
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.grids import search
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import merge_out
from thetau.evaluate.similarity import TargetSimilarity
from thetau.evaluate.spaces import Space, WeightSpace
from thetau.evaluate.tuned import make_space
from thetau.facade import Expression
from thetau.studies.arithmetic import (
    ADDITION,
    CONTROL,
    NEGATION,
    AdditionTrial,
    Negation,
    negation,
    on_one_task,
    scaled,
)

MERGED = "merged"


@final
@dataclass(frozen=True, kw_only=True)
class BasesTrial:
    """Coefficients tried on validation: what each vector was multiplied by, and means over tasks."""

    coefficients: dict[str, float]
    absolute: float
    normalised: float | None


@final
@dataclass(frozen=True, kw_only=True)
class BasesOutcome:
    """Coefficients on test: each task's accuracy, and the means. `normalised` is None where no individual models were at hand."""

    coefficients: dict[str, float]
    accuracy: dict[str, Measure]
    absolute: float
    normalised: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a choice of coefficients takes: vectors that must be kept for it, coefficients, and models evaluated on validation."""

    vectors: int
    coefficients: int
    evaluations: int


@final
@dataclass(frozen=True, kw_only=True)
class BasesAddition:
    """θ₀ + λ merge_out(bases).

    - `outer`: the method, with its fields as text; the sum is `sum`. `parts`: weight of each vector that λ multiplies.
    - `individual`: each task's own model, on test, where there are such.
    - `one_shot`: λ = 1. `tuned`: the best common λ. `own`: a coefficient for each basis, where that was asked.
    - `effort`: of the search that was made. `effort_over_tasks`: of the same search with a vector for each task, at most.
    """

    outer: str
    tasks: tuple[str, ...]
    parts: dict[str, float]
    individual: dict[str, Measure] | None
    one_shot: BasesOutcome
    tuned: BasesOutcome
    own: BasesOutcome | None
    scale: float
    effort: Effort
    effort_over_tasks: Effort
    trials: tuple[BasesTrial, ...]
    at_end: bool = False

    @property
    def best(self) -> BasesOutcome:
        """What was chosen on validation: a coefficient for each basis, or the common λ."""
        return self.own or self.tuned


@final
@dataclass(frozen=True, kw_only=True)
class BasisNegation:
    """θ₀ − α τ_B. `how` the basis was found; `similarity` where that was by its cosines."""

    basis: str
    members: tuple[str, ...]
    how: Literal["own", "similar", "given"]
    similarity: TargetSimilarity | None
    negation: Negation


@final
@dataclass(frozen=True, kw_only=True)
class BasisOutOfDistribution:
    """θ₀ + α merge_out(similar bases) on a task that no basis was made of.

    - `bases`: those that were similar; none says that the task's vector is one to store as a new basis, and then `store` is true.
    - `pretrained`: α = 0. `one_shot`: α = 1. `tuned`: the α of best validation accuracy, the smaller one among equals.
    """

    task: str
    similarity: TargetSimilarity
    threshold: float | None
    bases: tuple[str, ...]
    outer: str
    store: bool
    pretrained: Measure
    one_shot: Measure | None
    alpha: float | None
    tuned: Measure | None
    trials: tuple[AdditionTrial, ...]
    at_end: bool = False


def outer_space(
    evaluator: Evaluator,
    base: Mapping[str, Tensor],
    vectors: Mapping[str, Expression],
    outer: Any | None,
    *,
    tangent: bool,
    cache: Path | None = None,
    engine: Engine | None = None,
) -> tuple[Space, dict[str, float]]:
    """A space that holds merge_out of `vectors`, and the weights of what is added in it.

    For a sum (`outer` None) each vector by itself, so that each can have a coefficient; for a method the one vector that it makes of
    them, merged once, at λ = 1. `base`: the weights of the evaluator's encoder. Raises `DataError` when a vector has tensors that the base
    lacks.
    """
    if not vectors:
        return WeightSpace(evaluator, base, {}), {}
    chosen = vectors if outer is None else {MERGED: merge_out(vectors, outer, engine=engine)}
    read = {name: vector.state_dict(engine=engine) for name, vector in chosen.items()}
    for name, vector in read.items():
        unknown = [key for key in vector if key not in base]
        if unknown:
            raise DataError(f"{name}: the vector has a tensor {unknown[0]!r} that the base lacks. It is of another model.")
    return make_space(evaluator, base, read, tangent=tangent, cache=cache), dict.fromkeys(read, 1.0)


def bases_addition(
    space: Space,
    tasks: Sequence[str],
    parts: Mapping[str, float],
    *,
    outer: str = "sum",
    grid: Sequence[float] = ADDITION,
    own: bool = False,
    sweeps: int = 1,
    members: int | None = None,
    vectors: int | None = None,
    individual: Mapping[str, Mapping[str, Measure]] | None = None,
) -> BasesAddition:
    """Add bases and evaluate on `tasks`; the best average normalised validation accuracy decides λ, the smaller one among equals.

    Without `individual` the average accuracy itself decides.

    Args:
        parts: vectors of the space and their weights, as `outer_space` gives them.
        own: choose a coefficient for each part too: from the best common λ, each in turn takes the value of the grid that is best while
            the others stay; `sweeps` times over all of them.
        members: task vectors that the bases stand for, `len(tasks)` by default. `vectors`: bases that were merged, `len(parts)` by default.
        individual: split → task → accuracy of the task's own model.

    Raises:
        DataError: no tasks, no parts, a bad grid, or individual accuracies that lack a task.
    """
    if not tasks or not parts:
        raise DataError(f"addition needs at least one task and one basis. Got {len(tasks)} and {len(parts)}.")
    if sweeps < 1:
        raise DataError(f"the search needs at least one sweep over the bases. Got {sweeps}.")
    tried: dict[tuple[float, ...], BasesTrial] = {}
    names = list(parts)

    def score(values: Sequence[float]) -> float:
        key = tuple(values)
        if key not in tried:
            at = {name: value * parts[name] for name, value in zip(names, key, strict=True)}
            found = space.accuracies(at, tasks, "validation")
            relative = None if individual is None else normalised(found, individual["validation"])
            tried[key] = BasesTrial(coefficients=at, absolute=average(found), normalised=relative)
        trial = tried[key]
        return trial.absolute if trial.normalised is None else trial.normalised

    common = search(grid, lambda value: score([value] * len(names)))
    scale = common.best
    best = [scale] * len(names)
    for _ in range(sweeps if own else 0):
        before = list(best)
        for place in range(len(names)):
            for value in sorted(common.tried):
                one = [*best[:place], value, *best[place + 1 :]]
                if score(one) > score(best):
                    best = one
        if best == before:
            break

    @cache
    def outcome(values: tuple[float, ...]) -> BasesOutcome:
        at = {name: value * parts[name] for name, value in zip(names, values, strict=True)}
        found = space.accuracies(at, tasks, "test")
        relative = None if individual is None else normalised(found, individual["test"])
        return BasesOutcome(coefficients=at, accuracy=found, absolute=average(found), normalised=relative)

    kept = len(parts) if vectors is None else vectors
    count = len(tasks) if members is None else members
    # A sweep over T vectors tries every other value for each of them.
    over_tasks = len(common.tried) + (sweeps * count * (len(common.tried) - 1) if own else 0)
    return BasesAddition(
        outer=outer,
        tasks=tuple(tasks),
        parts=dict(parts),
        individual=None if individual is None else {task: individual["test"][task] for task in tasks},
        one_shot=outcome((1.0,) * len(names)),
        tuned=outcome((scale,) * len(names)),
        own=outcome(tuple(best)) if own else None,
        scale=scale,
        effort=Effort(vectors=kept, coefficients=len(names) if own else 1, evaluations=len(tried)),
        effort_over_tasks=Effort(vectors=count, coefficients=count if own else 1, evaluations=over_tasks),
        trials=tuple(tried.values()),
        at_end=common.at_end,
    )


def basis_negation(
    space: Space,
    task: str,
    control: str,
    basis: str,
    *,
    members: Sequence[str] = (),
    how: Literal["own", "similar", "given"] = "own",
    similarity: TargetSimilarity | None = None,
    grid: Sequence[float] = NEGATION,
    share: float = CONTROL,
) -> BasisNegation:
    """Subtract a basis to forget a task; α by the control rule of `negation`. Raises `DataError` when the control is the target."""
    found = negation(space, task, control, vector=basis, grid=grid, share=share)
    return BasisNegation(basis=basis, members=tuple(members), how=how, similarity=similarity, negation=found)


def basis_ood(
    space: Space,
    similarity: TargetSimilarity,
    bases: Sequence[str],
    parts: Mapping[str, float],
    *,
    threshold: float | None = None,
    outer: str = "sum",
    grid: Sequence[float] = ADDITION,
) -> BasisOutOfDistribution:
    """Evaluate a new task with the bases that are similar to it; α by its validation accuracy.

    Args:
        space, parts: of merge_out of `bases`, as `outer_space` gives them.
        similarity: of the task to all bases. `bases`: those of them that `similar_bases` chose, with `threshold`.
    """
    task = similarity.task
    trials, chosen = on_one_task(space, parts, task, grid) if bases else ((), None)
    alpha = None if chosen is None else chosen.best
    return BasisOutOfDistribution(
        task=task,
        similarity=similarity,
        threshold=threshold,
        bases=tuple(bases),
        outer=outer,
        store=not bases,
        pretrained=space.accuracy({}, task, "test"),
        one_shot=space.accuracy(parts, task, "test") if bases else None,
        alpha=alpha,
        tuned=None if alpha is None else space.accuracy(scaled(parts, alpha), task, "test"),
        trials=trials,
        at_end=chosen is not None and chosen.at_end,
    )
