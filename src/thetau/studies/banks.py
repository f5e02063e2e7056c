"""Arithmetic on a bank of task vector bases: add them all, subtract one, serve a task that the bank does not know.

    bank = thetau.bases.open_bank("bank")
    session = Session.of_bank(bank, reading=Reading(data=Path("tasks")))
    added = add_bases(bank, session, AddBases(alphas=(0.2, 0.4, 1)))
    bank_model(bank, added.coefficients).save("merged")

Each function measures in a session whose tasks are those of its options, and gives a frozen result; `bases` has what they measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from thetau.bases import Bank
from thetau.bases.build import refuse_other_base, space_of
from thetau.bases.members import at_hand
from thetau.diagnostics.results import Result
from thetau.engine.executor import Engine
from thetau.errors import DataError, RecipeError
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import merge_out, outer_method
from thetau.evaluate.session import Session
from thetau.evaluate.similarity import (
    TargetSimilarity,
    short_config,
    similar_bases,
    similarity_given,
    similarity_of_run,
    similarity_of_vector,
)
from thetau.evaluate.spaces import Space
from thetau.evaluate.tuned import is_tangent
from thetau.facade import Expression, as_vector
from thetau.facade import open as open_weights
from thetau.finetune.output import read_record
from thetau.methods import plain
from thetau.studies.arithmetic import ADDITION, NEGATION
from thetau.studies.bases import (
    BasesAddition,
    BasisNegation,
    BasisOutOfDistribution,
    bases_addition,
    basis_negation,
    basis_ood,
    outer_space,
)
from thetau.studies.options import AddBases, Finding, NegateBasis, Outer, ServeTask
from thetau.studies.partitions import outer_name
from thetau.tasks import load_task


@final
@dataclass(frozen=True, kw_only=True)
class BasesAdded(Result):
    """What `add_bases` found.

    - `bank`, `base`, `space`, `bases` (with their members), `limits`: what it was measured on.
    - `no_individuals`: task → why its own model is not at hand; where there is one, accuracy is not normalised.
    """

    bank: str
    base: str
    space: str
    bases: dict[str, tuple[str, ...]]
    limits: dict[str, int | None]
    no_individuals: dict[str, str]
    result: BasesAddition

    @property
    def coefficients(self) -> dict[str, float]:
        """What each basis is multiplied by; of a method, the λ of its merge, the same for all."""
        return self.result.best.coefficients if self.result.outer == "sum" else dict.fromkeys(self.bases, self.result.scale)


@final
@dataclass(frozen=True, kw_only=True)
class BasisNegated(Result):
    """What `negate_basis` found; the facts as in `BasesAdded`."""

    bank: str
    base: str
    space: str
    bases: dict[str, tuple[str, ...]]
    limits: dict[str, int | None]
    result: BasisNegation

    @property
    def coefficients(self) -> dict[str, float]:
        """The basis, and −α."""
        return {self.result.basis: -self.result.negation.tuned.alpha}


@final
@dataclass(frozen=True, kw_only=True)
class TaskServed(Result):
    """What `serve_task` found; the facts as in `BasesAdded`."""

    bank: str
    base: str
    space: str
    bases: dict[str, tuple[str, ...]]
    limits: dict[str, int | None]
    result: BasisOutOfDistribution

    @property
    def coefficients(self) -> dict[str, float]:
        """The bases used, and α; none where no basis is similar."""
        return {} if self.result.alpha is None else dict.fromkeys(self.result.bases, self.result.alpha)


def add_bases(bank: Bank, session: Session, options: AddBases | None = None, *, engine: Engine | None = None) -> BasesAdded:
    """θ₀ + λ merge(bases) on the session's tasks, λ chosen on their validation.

    Raises:
        RecipeError: an unknown method, a field that it does not have, or a model for a task that is not the bank's.
        DataError: a task without data.
    """
    given = options or AddBases()
    method = outer_method(given.outer.outer, given.outer.fields)
    individual, lost = individuals(bank, session, given.model)
    space, parts = _space(bank, session, bank.vectors(), method, engine)
    found = bases_addition(
        space,
        session.tasks,
        parts,
        outer=outer_name(method),
        grid=given.alphas or ADDITION,
        own=given.per_basis,
        sweeps=given.sweeps,
        members=len(bank.members),
        vectors=len(bank.bases),
        individual=individual,
    )
    return BasesAdded(**_facts(bank, session), no_individuals=lost, result=found)


def negate_basis(bank: Bank, session: Session, options: NegateBasis, *, engine: Engine | None = None) -> BasisNegated:
    """θ₀ − α τ_B: subtract the basis of a task, its own cluster's or the one that `options.finding` finds.

    Raises:
        RecipeError: no control task.
        DataError: the control task is the target, or an unknown basis.
        BankError: the bank does not hold the task, and nothing says how to find its basis.
    """
    if options.control is None:
        raise RecipeError(["--control TASK is missing, the task that negation must keep; or give --scale."], "options")
    task, control = (load_task(name, session.reading.data).name for name in (options.task, options.control))
    if control == task:
        raise DataError(f"negation of {task!r}: the control task must be another one.")
    similarity = similarity_to(bank, session, task, options.finding) if options.finding.ways else None
    used = bank.basis_of(task) if similarity is None else similar_bases(similarity)[0]
    how: Literal["own", "similar", "given"] = "own" if similarity is None else "given" if options.finding.basis else "similar"
    space, _ = _space(bank, session, {used: bank.vector(used)}, None, engine)
    members, grid = bank.bases[used].members, options.alphas or NEGATION
    found = basis_negation(
        space, task, control, used, members=members, how=how, similarity=similarity, grid=grid, share=options.keep
    )
    return BasisNegated(**_facts(bank, session), result=found)


def serve_task(bank: Bank, session: Session, options: ServeTask, *, engine: Engine | None = None) -> TaskServed:
    """θ₀ + α merge(similar bases) on a task that the bank does not know.

    Raises:
        RecipeError: the bank holds the task, or an unknown method.
        DataError: the task's vector is of another base, space or task; it has no data.
    """
    method = outer_method(options.outer.outer, options.outer.fields)
    task = load_task(options.task, session.reading.data).name
    refuse_known(bank, task)
    similarity = similarity_to(bank, session, task, options.finding)
    chosen = similar_bases(similarity, options.threshold, options.most)
    space, parts = _space(bank, session, {name: bank.vector(name) for name in chosen}, method, engine)
    found = basis_ood(
        space,
        similarity,
        chosen,
        parts,
        threshold=options.threshold,
        outer=outer_name(method),
        grid=options.alphas or ADDITION,
    )
    return TaskServed(**_facts(bank, session), result=found)


def refuse_known(bank: Bank, task: str) -> None:
    """Refuse a task of the bank where a new one is asked for. Raises `RecipeError`."""
    if task in bank.members:
        raise RecipeError(
            [
                f"the bank holds {task!r} already, in the basis {bank.basis_of(task)}. Out of distribution is a task that it does not."
            ],
            "--task",
        )


def basis_to_negate(bank: Bank, task: str, finding: Finding) -> str:
    """The basis that stands for a task, without data: its own cluster's, the one given, or the most similar to a vector."""
    if finding.basis:
        return similarity_given(task, finding.basis, list(bank.bases)).given[0]
    if finding.vector is not None:
        return similar_bases(similarity_of_vector(task, own_vector(bank, finding.vector, task), bank.similar))[0]
    return bank.basis_of(task)


def bank_model(
    bank: Bank, coefficients: Mapping[str, float], outer: Outer | None = None, *, engine: Engine | None = None
) -> Expression:
    """θ₀ + Σ coefficient · basis, or θ₀ + λ · merge_out of the bases named, λ being the one coefficient they share; lazily."""
    method = _method(outer)
    vectors = {name: bank.vector(name) for name in coefficients}
    if method is None:
        added = [value * vectors[name] for name, value in coefficients.items()]
        return bank.base() + sum(added[1:], start=added[0])
    return bank.base() + next(iter(coefficients.values())) * merge_out(vectors, method, engine=engine)


def bank_recipe(bank: Bank, coefficients: Mapping[str, float], outer: Outer | None = None) -> dict[str, Any]:
    """What `bank_model` made, for the provenance of its output."""
    method = _method(outer)
    return {
        "bank": str(bank.path),
        "base": bank.base_label,
        "bases": {name: list(bank.bases[name].members) for name in coefficients},
        "outer": "sum" if method is None else plain(method),
        "coefficients": dict(coefficients),
    }


def individuals(
    bank: Bank, session: Session, models: Mapping[str, str | Path] | None = None
) -> tuple[dict[str, dict[str, Measure]] | None, dict[str, str]]:
    """Split → task → accuracy of the task's own model, or None where one is not at hand; and why it is not.

    `models`: where the members' own models lie, if they have been moved. Raises `RecipeError`: one is of no task of the bank.
    """
    by_hand = {}
    for task, path in (models or {}).items():
        if task not in bank.members:
            known, got = ", ".join(bank.members), f"{task}={path}"
            raise RecipeError([f"must be TASK=MODEL with a task of the bank ({known}). Got {got!r}."], "--model")
        by_hand[task] = as_vector(open_weights(path, base=bank.base()), bank.base())
    found, lost = at_hand(bank, by_hand)
    lacking = {task: lost.get(task, "it is no task of the bank.") for task in session.tasks if task not in found}
    if lacking:
        return None, lacking
    measured: dict[str, dict[str, Measure]] = {"validation": {}, "test": {}}
    for task in session.tasks:
        space = session.space_of({task: found[task].state_dict()}, tangent=bank.space == "tangent")
        for split, measures in measured.items():
            measures[task] = space.accuracy({task: 1.0}, task, split)
    return measured, {}


def similarity_to(bank: Bank, session: Session, task: str, finding: Finding) -> TargetSimilarity:
    """Of a task to the bank's bases, in the way that was asked. Raises `DataError`."""
    if finding.basis:
        return similarity_given(task, finding.basis, list(bank.bases))
    if finding.vector is not None:
        return similarity_of_vector(task, own_vector(bank, finding.vector, task), bank.similar, source=finding.vector)
    tangent, reading = bank.space == "tangent", session.reading
    options = {"lr": finding.lr, "image_size": reading.image_size, "max_length": reading.max_length}
    config = short_config(
        tangent=tangent, batch_size=finding.batch_size, **{name: value for name, value in options.items() if value is not None}
    )
    session.evaluator.load_base()
    return similarity_of_run(
        session.encoder,
        session.evaluator.tasks[task],
        bank.base(),
        bank.similar,
        steps=finding.steps,
        epochs=finding.epochs,
        config=config,
        tangent=tangent,
        run=session.cache,
        base_label=bank.base_label,
    )


def own_vector(bank: Bank, given: str, task: str) -> Expression:
    """A task's converged vector over the bank's base. Raises `DataError`: it is of another space, or of another base."""
    base = bank.base()
    vector = as_vector(open_weights(given, base=base), base).named(task)
    refuse_other_base({task: vector}, base.terms[0][1])
    path = Path(given)
    record = read_record(path) if path.is_dir() else None
    tangent = (path.exists() and is_tangent(path)) or space_of({task: vector}, base.terms[0][1]) == "tangent"
    if tangent != (bank.space == "tangent"):
        names = {True: "the tangent space", False: "the weights"}
        raise DataError(
            f"{given}: its vector belongs to {names[tangent]}, the bank's to {names[not tangent]}. Fine-tune with the bank's paradigm."
        )
    if record is not None and record.get("task") != task:
        raise DataError(f"{given}: was fine-tuned on {record.get('task')!r}, and the task is {task!r}.")
    return vector


def _method(outer: Outer | None) -> Any | None:
    return None if outer is None else outer_method(outer.outer, outer.fields)


def _space(
    bank: Bank, session: Session, vectors: Mapping[str, Expression], method: Any | None, engine: Engine | None
) -> tuple[Space, dict[str, float]]:
    tangent = bank.space == "tangent"
    return outer_space(session.evaluator, session.weights, vectors, method, tangent=tangent, cache=session.cache, engine=engine)


def _facts(bank: Bank, session: Session) -> dict[str, Any]:
    bases: dict[str, Sequence[str]] = {name: tuple(basis.members) for name, basis in bank.bases.items()}
    return {
        "bank": str(bank.path),
        "base": bank.base_label,
        "space": bank.space,
        "bases": bases,
        "limits": session.limits,
    }
