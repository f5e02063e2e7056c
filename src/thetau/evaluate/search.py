"""Choosing λ on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError
from thetau.evaluate.means import normalised
from thetau.evaluate.measures import Measure


@final
@dataclass(frozen=True, kw_only=True)
class ScaleTrial:
    """One value of λ and the average normalised validation accuracy that it gave."""

    scale: float
    normalised: float


@final
@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """The chosen λ and every trial, in the order of the grid."""

    scale: float
    trials: tuple[ScaleTrial, ...]


def choose_scale(
    scales: Sequence[float],
    evaluate: Callable[[float], Mapping[str, Measure]],
    individual: Mapping[str, Measure],
) -> ScaleSearch:
    """Evaluate every λ of the grid; the best average normalised accuracy wins, the smaller λ among equals.

    `evaluate(λ)` gives the validation accuracy of every task, `individual` that of the tasks' own models.

    Examples:
        >>> from thetau.evaluate import Accuracy
        >>> correct = {0.5: 80, 1.0: 85, 1.5: 85}
        >>> individual = {"sst2": Accuracy.of(95, 100)}
        >>> choose_scale(list(correct), lambda scale: {"sst2": Accuracy.of(correct[scale], 100)}, individual).scale
        1.0
    """
    if not scales:
        raise DataError("the search for λ needs at least one value. Got none.")
    trials = tuple(ScaleTrial(scale=scale, normalised=normalised(evaluate(scale), individual)) for scale in scales)
    best = max(trials, key=lambda trial: (trial.normalised, -trial.scale))
    return ScaleSearch(scale=best.scale, trials=trials)
