"""Choosing λ on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import DataError
from thetau.evaluate.grids import search
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
    """The chosen λ and every trial, in the order in which they were made. `at_end`: λ lies at the end of what was tried, and is no result."""

    scale: float
    trials: tuple[ScaleTrial, ...]
    at_end: bool = False


def choose_scale(
    scales: Sequence[float],
    evaluate: Callable[[float], Mapping[str, Measure]],
    individual: Mapping[str, Measure],
) -> ScaleSearch:
    """Evaluate every λ of the grid; the best average normalised accuracy wins, the smallest λ above 0 among equals. The grid widens until
    the best is inside.

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
    trials: list[ScaleTrial] = []

    def score(scale: float) -> float:
        trials.append(ScaleTrial(scale=scale, normalised=normalised(evaluate(scale), individual)))
        return trials[-1].normalised

    chosen = search(scales, score)
    return ScaleSearch(scale=chosen.best, trials=tuple(trials), at_end=chosen.at_end)
