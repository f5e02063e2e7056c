"""Addition, negation, analogy and what happens out of distribution, each as a frozen result.

The coefficients are tried on validation, the numbers reported are of test. One-shot (α = 1) stands beside the tuned value.
Grids begin as in Yoshida et al. (Appendix C.2): addition 0.0..1.0 by 0.05, negation 0.0..3.0 by 0.1; they widen until the best value is inside, and
`at_end` says where it is not. `trials` are in the order of α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError
from thetau.evaluate.grids import Found, search
from thetau.evaluate.means import average, check_shares, normalised
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
    at_end: bool = False


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
    at_end: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """The sum of all vectors but a task's own, at the α that is best for the others, on that task. `base`: the pre-trained model."""

    task: str
    alpha: float
    base: Measure
    merged: Measure
    at_end: bool = False


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
    at_end: bool = False


def addition(
    space: Space,
    tasks: Sequence[str],
    *,
    grid: Sequence[float] = ADDITION,
    vectors: Mapping[str, float] | None = None,
    individual: Mapping[str, Mapping[str, Measure]] | None = None,
) -> Addition:
    """Add the vectors of `tasks`; the best average normalised validation accuracy decides α, the smaller one above 0 among equals.

    - `vectors`: name → weight of what is added, each task's own vector by default; a merged vector is `{"merged": 1.0}`.
    - `individual`: split → task → accuracy of the paradigm's own individuals; measured here by default.
    """
    parts = dict.fromkeys(tasks, 1.0) if vectors is None else dict(vectors)
    own = individual or {
        split: {task: space.accuracy({task: 1.0}, task, split) for task in tasks} for split in ("validation", "test")
    }

    def measure(alpha: float, split: str) -> dict[str, Measure]:
        return space.accuracies(scaled(parts, alpha), tasks, split)

    trials: dict[float, AdditionTrial] = {}

    def score(alpha: float) -> float:
        found = measure(alpha, "validation")
        trials[alpha] = AdditionTrial(alpha=alpha, absolute=average(found), normalised=normalised(found, own["validation"]))
        return trials[alpha].normalised

    chosen = search(grid, score)

    def outcome(alpha: float) -> Outcome:
        found = measure(alpha, "test")
        return Outcome(alpha=alpha, accuracy=found, absolute=average(found), normalised=normalised(found, own["test"]))

    return Addition(
        individual=dict(own["test"]),
        one_shot=outcome(1.0),
        tuned=outcome(chosen.best),
        trials=tuple(trials[alpha] for alpha in sorted(trials)),
        at_end=chosen.at_end,
    )


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
    when the control task is the target, or one of them a perplexity.
    """
    if task == control:
        raise DataError(f"negation of {task!r}: the control task must be another one.")
    kept = space.accuracy({}, control, "validation").value
    limit = min(kept, share * kept)  # a score may be below 0, and a share of it above it
    subtracted = task if vector is None else vector
    trials: dict[float, NegationTrial] = {}

    def score(alpha: float) -> float:
        found = space.accuracies({subtracted: -alpha}, (task, control), "validation")
        check_shares(found)
        trials[alpha] = NegationTrial(alpha=alpha, target=found[task].value, control=found[control].value)
        return -found[task].value if found[control].value >= limit else -math.inf

    chosen = search(grid, score, zero_wins_ties=True)
    best = chosen.best if trials[chosen.best].control >= limit else 0.0

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
        trials=tuple(trials[alpha] for alpha in sorted(trials)),
        vector=vector,
        at_end=chosen.at_end and best == chosen.best,
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

        chosen = search(grid, score)
        merged = space.accuracy(dict.fromkeys(others, chosen.best), task, "test")
        base = space.accuracy({}, task, "test")
        found.append(OutOfDistribution(task=task, alpha=chosen.best, base=base, merged=merged, at_end=chosen.at_end))
    return tuple(found)


def analogy(space: Space, a: str, b: str, c: str, d: str, *, grid: Sequence[float] = ADDITION) -> Analogy:
    """Test "a is to b as c is to d" on task d; α by d's validation accuracy."""
    if len({a, b, c}) < 3:
        raise DataError(f"an analogy needs three different task vectors. Got {a}, {b}, {c}.")
    parts = {c: 1.0, b: 1.0, a: -1.0}
    trials, chosen = on_one_task(space, parts, d, grid)
    return Analogy(
        a=a,
        b=b,
        c=c,
        d=d,
        base=space.accuracy({}, d, "test"),
        one_shot=space.accuracy(parts, d, "test"),
        alpha=chosen.best,
        tuned=space.accuracy(scaled(parts, chosen.best), d, "test"),
        trials=trials,
        at_end=chosen.at_end,
    )


def on_one_task(
    space: Space, parts: Mapping[str, float], task: str, grid: Sequence[float]
) -> tuple[tuple[AdditionTrial, ...], Found]:
    """θ₀ + α Σ weight · vector on one task's validation split, for every α, and the best; there is nothing to normalise by.

    Raises `DataError`: the task is a perplexity.
    """
    values: dict[float, float] = {}

    def score(alpha: float) -> float:
        found = space.accuracy(scaled(parts, alpha), task, "validation")
        check_shares({task: found})
        values[alpha] = found.value
        return values[alpha]

    chosen = search(grid, score)
    return tuple(AdditionTrial(alpha=alpha, absolute=values[alpha], normalised=values[alpha]) for alpha in sorted(values)), chosen


def scaled(parts: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Every weight times α."""
    return {name: alpha * weight for name, weight in parts.items()}
