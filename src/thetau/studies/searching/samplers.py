"""What proposes the next trial: at random, by Optuna's TPE, or by CMA-ES.

A sampler is made anew for every trial, from the seed, the number of the trial and the trials before it, so that a study that was cut off
goes on as it would have gone. Optuna's own CMA-ES keeps its state in the storage as a pickle, which could run code; here the state is found
again by replaying the trials.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import cmaes
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from thetau.errors import RecipeError
from thetau.studies.searching.space import Dimension, Scalar

Sampler = Literal["tpe", "cmaes", "random"]
GENERATION, FAULT = "generation", "error"
FIRST = 10  # trials at random before TPE begins
SPREAD = 0.25  # of CMA-ES at its start, of the width of each range


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension as Optuna has it."""
    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def check_sampler(sampler: Sampler, dimensions: Sequence[Dimension], objectives: int) -> None:
    """Nothing where a sampler can search this space. Raises `RecipeError`: CMA-ES with choices, with one number or for several objectives."""
    if sampler != "cmaes":
        return
    problems = [f"CMA-ES searches numbers, and {one.name} has choices." for one in dimensions if one.choices]
    if len(dimensions) < 2:
        problems.append("CMA-ES needs at least two numbers to search.")
    if objectives > 1:
        problems.append(f"CMA-ES has one objective. Got {objectives}.")
    if problems:
        raise RecipeError([f"{one} Take `--sampler tpe`." for one in problems], "--sampler")


def sampler_of(
    sampler: Sampler, dimensions: Sequence[Dimension], start: Mapping[str, Scalar] | None, *, seed: int, number: int
) -> optuna.samplers.BaseSampler:
    """The sampler of the trial of that number."""
    own = random.Random(f"{seed}/{number}").getrandbits(32)
    match sampler:
        case "random":
            return optuna.samplers.RandomSampler(seed=own)
        case "tpe":
            return optuna.samplers.TPESampler(seed=own, n_startup_trials=FIRST)
    return CmaSampler(dimensions, start, seed=seed, own=own)


@final
class CmaSampler(optuna.samplers.BaseSampler):
    """CMA-ES (Hansen, <https://arxiv.org/abs/1604.00772>) over the unit cube of the ranges, by the ranks of the trials.

    A generation is complete when as many of its trials have ended as a population has. Within it a trial that was measured on everything stands before one that
    was pruned, a later rung before an earlier one, and one that failed last. `generation`: of the trial that was proposed last.
    """

    def __init__(self, dimensions: Sequence[Dimension], start: Mapping[str, Scalar] | None, *, seed: int, own: int) -> None:
        self._dimensions, self._start, self._seed, self._own = tuple(dimensions), start, seed, own
        self.generation = 0

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of it."""
        return {one.name: distribution(one) for one in self._dimensions}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        ended = [one for one in study.get_trials(deepcopy=False, states=states) if GENERATION in one.user_attrs]
        ended = [one for one in ended if one.state != TrialState.FAIL or FAULT in one.user_attrs]
        larger = study.direction == optuna.study.StudyDirection.MAXIMIZE
        optimizer = self._replayed(ended, larger)
        self.generation = optimizer.generation
        return {one.name: from_unit(one, float(x)) for one, x in zip(self._dimensions, optimizer.ask(), strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked for: all dimensions are sampled together."""
        raise RuntimeError(f"{param_name}: is not in the space of this search.")

    def _replayed(self, ended: Sequence[FrozenTrial], larger: bool) -> cmaes.CMA:
        mean = [0.5 if self._start is None else to_unit(one, self._start[one.name]) for one in self._dimensions]
        bounds = np.array([[0.0, 1.0]] * len(mean))
        optimizer = cmaes.CMA(mean=np.array(mean), sigma=SPREAD, bounds=bounds, seed=self._own)
        while True:
            members = [one for one in ended if one.user_attrs[GENERATION] == optimizer.generation][: optimizer.population_size]
            if len(members) < optimizer.population_size:
                return optimizer
            ranked = sorted(members, key=lambda one: _standing(one, larger))
            points = [np.array([to_unit(d, one.params[d.name]) for d in self._dimensions]) for one in ranked]
            optimizer.tell([(point, float(rank)) for rank, point in enumerate(points)])


def _standing(trial: FrozenTrial, larger: bool) -> tuple[int, float, float]:
    if trial.state == TrialState.FAIL or not trial.values:
        return 2, 0.0, 0.0
    loss = -trial.values[0] if larger else trial.values[0]
    return (0, 0.0, loss) if trial.state == TrialState.COMPLETE else (1, -float(trial.last_step or 0), loss)


def to_unit(dimension: Dimension, value: Scalar) -> float:
    """A number's place between the ends of its range, 0 to 1.

    Examples:
        >>> to_unit(Dimension(path="scale", low=0.01, high=1, log=True), 0.1)
        0.5
    """
    assert isinstance(value, int | float)
    low, high, at = (
        (math.log(x) for x in (dimension.low, dimension.high, value)) if dimension.log else (dimension.low, dimension.high, value)
    )
    return (at - low) / (high - low)


def from_unit(dimension: Dimension, place: float) -> float | int:
    """The number at a place, 0 to 1, between the ends of its range."""
    low, high = (math.log(dimension.low), math.log(dimension.high)) if dimension.log else (dimension.low, dimension.high)
    at = low + place * (high - low)
    value = min(max(math.exp(at) if dimension.log else at, dimension.low), dimension.high)
    return round(value) if dimension.whole else value
