"""Addition, negation, analogy and what happens out of distribution, each as a frozen result.

The coefficients are tried on validation, the numbers reported are of test. One-shot (α = 1) stands beside the tuned value.
Grids as in Yoshida et al. (Appendix C.2): addition 0.0..1.0 by 0.05, negation 0.0..3.0 by 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Measure
from thetau.evaluate.spaces import Space

ADDITION = tuple(round(0.05 * i, 2) for i in range(21))
NEGATION = tuple(round(0.1 * i, 1) for i in range(31))
CONTROL = 0.95


@final
@dataclass(frozen=True, kw_only=True)
class AdditionTrial:
    """One α on validation: means over tasks."""

    alpha: float
    absolute: float
    normalised: float


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One α on test: each task's accuracy, and the means."""

    alpha: float
    accuracy: dict[str, Measure]
    absolute: float
    normalised: float


@final
@dataclass(frozen=True, kw_only=True)
class Addition:
    """θ₀ + α Σ τ_t. `individual`: each task's own vector at α = 1, on test. `trials`: the grid, on validation."""

    individual: dict[str, Measure]
    one_shot: Outcome
    tuned: Outcome
    trials: tuple[AdditionTrial, ...]


@final
@dataclass(frozen=True, kw_only=True)
class NegationTrial:
    """One α on validation: the target's and the control task's accuracy."""

    alpha: float
    target: float
    control: float


@final
@dataclass(frozen=True, kw_only=True)
class NegationOutcome:
    """θ₀ − α τ on test. `qualified`: the control task kept at least 95 % of the pre-trained model's accuracy, on validation."""

    alpha: float
    target: Measure
    control: Measure
    qualified: bool


@final
@dataclass(frozen=True, kw_only=True)
class Negation:
    """One task's negation. `tuned` is the α of lowest target accuracy among those that keep the control task.

    `vector`: what was subtracted where that is not the task's own vector, such as its basis.
    α = 0 always keeps it, so there is always one; `tuned.alpha == 0` says that no α above 0 does, and then nothing was forgotten.
    """

    task: str
    control: str
    pretrained_target: Measure
    pretrained_control: Measure
    one_shot: NegationOutcome
    tuned: NegationOutcome
    trials: tuple[NegationTrial, ...]
    vector: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """The sum of all vectors but a task's own, at the α that is best for the others, on that task. `base`: the pre-trained model."""

    task: str
    alpha: float
    base: Measure
    merged: Measure


@final
@dataclass(frozen=True, kw_only=True)
class Analogy:
    """ "a is to b as c is to d": θ₀ + α (τ_c + τ_b − τ_a) on task d, for a grid of α."""

    a: str
    b: str
    c: str
    d: str
    base: Measure
    one_shot: Measure
    alpha: float
    tuned: Measure
    trials: tuple[AdditionTrial, ...]


def addition(
    space: Space,
    tasks: Sequence[str],
    *,
    grid: Sequence[float] = ADDITION,
    vectors: Mapping[str, float] | None = None,
    individual: Mapping[str, Mapping[str, Measure]] | None = None,
) -> Addition:
    """Add the vectors of `tasks`; the best average normalised validation accuracy decides α, the smaller one among equals.

    - `vectors`: name → weight of what is added, each task's own vector by default; a merged vector is `{"merged": 1.0}`.
    - `individual`: split → task → accuracy of the paradigm's own individuals; measured here by default.
    """
    parts = dict.fromkeys(tasks, 1.0) if vectors is None else dict(vectors)
    own = individual or {
        split: {task: space.accuracy({task: 1.0}, task, split) for task in tasks} for split in ("validation", "test")
    }

    def measure(alpha: float, split: str) -> dict[str, Measure]:
        return space.accuracies(scaled(parts, alpha), tasks, split)

    trials = []
    for alpha in checked_grid(grid):
        found = measure(alpha, "validation")
        trials.append(AdditionTrial(alpha=alpha, absolute=average(found), normalised=normalised(found, own["validation"])))
    best = max(trials, key=lambda trial: (trial.normalised, -trial.alpha)).alpha

    def outcome(alpha: float) -> Outcome:
        found = measure(alpha, "test")
        return Outcome(alpha=alpha, accuracy=found, absolute=average(found), normalised=normalised(found, own["test"]))

    return Addition(individual=dict(own["test"]), one_shot=outcome(1.0), tuned=outcome(best), trials=tuple(trials))


def negation(
    space: Space,
    task: str,
    control: str,
    *,
    vector: str | None = None,
    grid: Sequence[float] = NEGATION,
    share: float = CONTROL,
) -> Negation:
    """Subtract α τ: the α of lowest validation accuracy on the task among those with control ≥ `share` of the pre-trained model's.

    `vector` names what is subtracted, the vector of the task's own name by default. Among equals the smaller α. Raises `DataError`
    when the control task is the target.
    """
    if task == control:
        raise DataError(f"negation of {task!r}: the control task must be another one.")
    limit = share * space.accuracy({}, control, "validation").value
    subtracted = task if vector is None else vector
    trials = []
    for alpha in checked_grid(grid):
        found = space.accuracies({subtracted: -alpha}, (task, control), "validation")
        trials.append(NegationTrial(alpha=alpha, target=found[task].value, control=found[control].value))
    kept = [trial for trial in trials if trial.control >= limit]
    best = min(kept, key=lambda trial: (trial.target, trial.alpha)).alpha if kept else 0.0

    def outcome(alpha: float) -> NegationOutcome:
        gone = {subtracted: -alpha}
        control_value = space.accuracy(gone, control, "validation").value
        return NegationOutcome(
            alpha=alpha,
            target=space.accuracy(gone, task, "test"),
            control=space.accuracy(gone, control, "test"),
            qualified=control_value >= limit,
        )

    return Negation(
        task=task,
        control=control,
        pretrained_target=space.accuracy({}, task, "test"),
        pretrained_control=space.accuracy({}, control, "test"),
        one_shot=outcome(1.0),
        tuned=outcome(best),
        trials=tuple(trials),
        vector=vector,
    )


def out_of_distribution(space: Space, tasks: Sequence[str], *, grid: Sequence[float] = ADDITION) -> tuple[OutOfDistribution, ...]:
    """Leave each task out in turn: add the others' vectors, choose α on the others' validation, test on the one left out."""
    if len(tasks) < 2:
        raise DataError("leaving a task out needs at least two tasks.")
    found = []
    for task in tasks:
        others = [one for one in tasks if one != task]
        own = {one: space.accuracy({one: 1.0}, one, "validation") for one in others}

        def score(alpha: float, others: Sequence[str] = others, own: Mapping[str, Measure] = own) -> float:
            return normalised(space.accuracies(dict.fromkeys(others, alpha), others, "validation"), own)

        alpha = max(checked_grid(grid), key=lambda value: (score(value), -value))
        merged = space.accuracy(dict.fromkeys(others, alpha), task, "test")
        found.append(OutOfDistribution(task=task, alpha=alpha, base=space.accuracy({}, task, "test"), merged=merged))
    return tuple(found)


def analogy(space: Space, a: str, b: str, c: str, d: str, *, grid: Sequence[float] = ADDITION) -> Analogy:
    """Test "a is to b as c is to d" on task d; α by d's validation accuracy."""
    if len({a, b, c}) < 3:
        raise DataError(f"an analogy needs three different task vectors. Got {a}, {b}, {c}.")
    parts = {c: 1.0, b: 1.0, a: -1.0}
    trials = on_one_task(space, parts, d, grid)
    best = max(trials, key=lambda trial: (trial.absolute, -trial.alpha)).alpha
    return Analogy(
        a=a,
        b=b,
        c=c,
        d=d,
        base=space.accuracy({}, d, "test"),
        one_shot=space.accuracy(parts, d, "test"),
        alpha=best,
        tuned=space.accuracy(scaled(parts, best), d, "test"),
        trials=trials,
    )


def on_one_task(space: Space, parts: Mapping[str, float], task: str, grid: Sequence[float]) -> tuple[AdditionTrial, ...]:
    """θ₀ + α Σ weight · vector on one task's validation split, for every α; there is nothing to normalise by."""
    values = {alpha: space.accuracy(scaled(parts, alpha), task, "validation").value for alpha in checked_grid(grid)}
    return tuple(AdditionTrial(alpha=alpha, absolute=value, normalised=value) for alpha, value in values.items())


def scaled(parts: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Every weight times α."""
    return {name: alpha * weight for name, weight in parts.items()}


def checked_grid(grid: Sequence[float]) -> Sequence[float]:
    """The grid, if it is one. Raises `DataError`."""
    if not grid or len(set(grid)) != len(grid):
        raise DataError(f"the grid of α must be different numbers, at least one. Got {list(grid)}.")
    return grid
