"""What a search found, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from thetau.diagnostics.results import Result
from thetau.evaluate.measures import Loss, Measure
from thetau.studies.searching.halving import front
from thetau.studies.searching.objectives import Objective
from thetau.studies.searching.samplers import FAULT
from thetau.studies.searching.space import Scalar, SearchSpace
from thetau.studies.searching.trials import values_of

State = Literal["complete", "pruned", "failed"]
_STATES: dict[TrialState, State] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
MEASURED, LOSSES, OBJECTIVES, RUNG, SECONDS = "measured", "losses", "objectives", "rung", "seconds"
_MEASURES: TypeAdapter[dict[str, Measure]] = TypeAdapter(dict[str, Measure])
_LOSSES: TypeAdapter[dict[str, Loss]] = TypeAdapter(dict[str, Loss])


@final
@dataclass(frozen=True, kw_only=True)
class SearchTrial:
    """One trial, on validation.

    - `values`: by dimension. `method`: the method with them; None where they do not make one.
    - `objectives`: by name, on what was measured. `accuracy`, `loss`: of each task, with n.
    - `rung`: the last that it came to, from 0; a trial that is complete was measured on everything.
    - `error`: why it failed.
    """

    number: int
    state: State
    values: dict[str, Scalar]
    method: dict[str, Any] | None
    objectives: dict[str, float]
    accuracy: dict[str, Measure]
    loss: dict[str, Loss]
    rung: int | None
    seconds: float | None
    error: str | None


@final
@dataclass(frozen=True, kw_only=True)
class SearchFigures:
    """A chosen trial on test, where that was asked: each task's value and loss, and the means of all but perplexities, None where there is nothing else.

    `loss` of causal language models is there where it is an objective.
    """

    number: int | None
    accuracy: dict[str, Measure]
    loss: dict[str, Loss]
    absolute: float | None
    normalised: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Searched(Result):
    """What `search` found.

    - `objectives`: by name, `larger` or `smaller`. `individual`: each model on its own task, on validation.
    - `best`: the numbers of the trials that none is better than: one, or the Pareto front, by the first objective.
    - `start`: the trial that is the recipe as it was; None where it lies outside the space.
    - `test`: the best trials on test, and the recipe as it was before them; empty unless asked.
    """

    recipe: dict[str, Any]
    base: str
    tasks: tuple[str, ...]
    space: dict[str, str]
    objectives: dict[str, str]
    sampler: str
    seed: int
    halving: str
    rungs: tuple[dict[str, int], ...]
    validation: int | None
    individual: dict[str, Measure]
    trials: tuple[SearchTrial, ...]
    best: tuple[int, ...]
    start: int | None
    test: tuple[SearchFigures, ...] = ()

    def trial(self, number: int) -> SearchTrial:
        """The trial of that number."""
        return next(one for one in self.trials if one.number == number)


def plain_measures(values: Mapping[str, Measure], losses: Mapping[str, Loss]) -> dict[str, Any]:
    """Measures as a storage keeps them."""
    return {
        MEASURED: _MEASURES.dump_python(dict(values), mode="json"),
        LOSSES: _LOSSES.dump_python(dict(losses), mode="json"),
    }


def read_trial(trial: FrozenTrial, space: SearchSpace) -> SearchTrial:
    """A trial of the storage."""
    kept, values = trial.user_attrs, values_of(trial)
    fault = kept.get(FAULT)
    return SearchTrial(
        number=trial.number,
        state=_STATES[trial.state],
        values=values,
        method=None if fault is not None and MEASURED not in kept else space.method_of(values),
        objectives=kept.get(OBJECTIVES, {}),
        accuracy=_MEASURES.validate_python(kept.get(MEASURED, {})),
        loss=_LOSSES.validate_python(kept.get(LOSSES, {})),
        rung=kept.get(RUNG),
        seconds=kept.get(SECONDS),
        error=fault,
    )


def best_of(trials: Sequence[SearchTrial], objectives: Sequence[Objective]) -> tuple[int, ...]:
    """The trials that none is better than, the best of the first objective first; of equal ones the earliest."""
    complete = [one for one in trials if one.state == "complete"]
    losses = [[objective.loss(one.objectives[objective.name]) for objective in objectives] for one in complete]
    return tuple(complete[place].number for place in sorted(front(losses), key=lambda place: losses[place]))
