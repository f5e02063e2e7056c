"""Coefficients of task vectors, chosen on validation and reported on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from thetau.diagnostics.results import Result
from thetau.errors import DataError, RecipeError
from thetau.evaluate.merging import build_method, merge_out
from thetau.evaluate.session import Session
from thetau.pace import each
from thetau.studies.arithmetic import (
    ADDITION,
    NEGATION,
    Addition,
    Analogy,
    Negation,
    OutOfDistribution,
    addition,
    analogy,
    negation,
    out_of_distribution,
)
from thetau.studies.options import Tune
from thetau.tasks.suite import MethodChoice

MERGED = "merged"


@final
@dataclass(frozen=True, kw_only=True)
class Tuned(Result):
    """What `tune` found: an addition, one negation a model, an analogy, or what each task left out gives."""

    models: tuple[str, ...]
    base: str
    method: str
    space: str
    limits: dict[str, int | None]
    result: Addition | tuple[Negation, ...] | Analogy | tuple[OutOfDistribution, ...]


def tasks_to_tune(models: Sequence[str], options: Tune) -> list[str]:
    """The tasks that a session needs for these options, of models of the tasks `models`. Raises `RecipeError`."""
    if options.analogy is not None and (len(options.analogy) != 4 or not set(options.analogy[:3]) <= set(models)):
        got = ",".join(options.analogy)
        raise RecipeError([f"--analogy must be A,B,C,D with models of A, B and C ({', '.join(models)}). Got {got!r}."], "options")
    wanted = [options.analogy[3]] if options.analogy else list(models)
    return [*wanted, *([options.control] if options.control else [])]


def tune(session: Session, options: Tune | None = None) -> Tuned:
    """Choose α on validation and report on test: addition (or any method's λ), negation, an analogy, tasks left out.

    Vectors of the tangent space are evaluated in the linear form, where every α is free. The session must hold `tasks_to_tune`.

    Raises:
        RecipeError: the options do not fit each other or the models.
        DataError: fields of a method where vectors are summed, or a task that the session lacks.
    """
    given = options or Tune()
    names = [model.task for model in session.models]
    lacking = [task for task in tasks_to_tune(names, given) if task not in session.tasks]
    if lacking:
        raise DataError(f"the session has no task {lacking[0]!r}. It has {', '.join(session.tasks)}.")
    if given.fields and given.method == "sum":
        raise DataError("--set gives fields of a --method; a sum has none.")
    result: Addition | tuple[Negation, ...] | Analogy | tuple[OutOfDistribution, ...]
    if given.control is not None:
        grid = given.alphas or NEGATION
        result = tuple(negation(session.space, name, given.control, grid=grid) for name in each("task", names))
    elif given.analogy is not None:
        a, b, c, d = given.analogy
        result = analogy(session.space, a, b, c, d, grid=given.alphas or ADDITION)
    elif given.left_out and given.method != "sum":
        from thetau.studies.sweeps import left_out

        method = build_method(MethodChoice(name=given.method, method=given.method, fields=dict(given.fields)))
        own = {
            split: {name: session.space.accuracy({name: 1.0}, name, split) for name in names} for split in ("validation", "test")
        }
        result = left_out(session, names, method, own, given.alphas or ADDITION)
    elif given.left_out:
        result = out_of_distribution(session.space, names, grid=given.alphas or ADDITION)
    elif given.method == "sum":
        result = addition(session.space, names, grid=given.alphas or ADDITION)
    else:
        result = _merged(session, names, given)
    facts: dict[str, Any] = {"models": tuple(model.given for model in session.models), "base": session.base}
    facts |= {"method": given.method, "space": "tangent" if session.tangent else "weights", "limits": session.limits}
    return Tuned(**facts, result=result)


def _merged(session: Session, names: Sequence[str], options: Tune) -> Addition:
    """A method's λ. The individuals are those of the vectors themselves."""
    choice = MethodChoice(name=options.method, method=options.method, fields=dict(options.fields))
    method = build_method(choice)
    individual = {
        split: {name: session.space.accuracy({name: 1.0}, name, split) for name in names} for split in ("validation", "test")
    }
    vector = merge_out({name: session.held[name] for name in names}, method).state_dict()
    session.evaluator.load_base()
    space = session.space_of({MERGED: vector})
    return addition(space, names, grid=options.alphas or ADDITION, vectors={MERGED: 1.0}, individual=individual)
