"""Save-One, bases and Save-All of fine-tuned models, with the partitions of their tasks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from thetau.bases import Clustering, all_partitions, given_groups, similarities
from thetau.bases import cluster as find_clusters
from thetau.diagnostics.results import Result
from thetau.engine.executor import Engine
from thetau.evaluate.merging import inner_method, outer_method
from thetau.evaluate.session import Session
from thetau.evaluate.tuned import open_tuned
from thetau.recipes.schema import parse_evidence
from thetau.studies.arithmetic import ADDITION
from thetau.studies.options import CompareBases
from thetau.studies.partitions import Bench, PartitionStudy, Savings, compare_savings, study_partitions


@final
@dataclass(frozen=True, kw_only=True)
class BasesCompared(Result):
    """What `compare_bases` found. `clustering`: of the bases. `partitions`: of all of them, where that was asked."""

    models: tuple[str, ...]
    base: str
    space: str
    limits: dict[str, int | None]
    clustering: Clustering
    result: Savings
    partitions: PartitionStudy | None


def partitions_of(models: Sequence[str | Path], options: CompareBases) -> list[Mapping[str, tuple[str, ...]]]:
    """Every partition of the models' tasks, where that is asked. Raises `RecipeError`: there are too many, before any work."""
    return list(all_partitions([open_tuned(model).task for model in models])) if options.every else []


def compare_bases(session: Session, options: CompareBases | None = None, *, engine: Engine | None = None) -> BasesCompared:
    """Compare what to keep of the session's models: one vector, bases, or all; accuracy, bytes, coefficients to choose.

    Raises:
        RecipeError: too many partitions, an unknown method, a cluster of tasks that are not there.
        DataError: fewer than two models.
    """
    given = options or CompareBases()
    names = [model.task for model in session.models]
    partitions = partitions_of([model.given for model in session.models], given)
    bench = Bench(
        session.evaluator,
        session.weights,
        session.expressions(),
        inner=inner_method(given.inner, given.inner_fields),
        outer=outer_method(given.outer.outer, given.outer.fields),
        evidence=parse_evidence(given.evidence),
        tangent=session.tangent,
        grid=given.alphas or ADDITION,
        run=session.cache,
        engine=engine,
    )
    if given.cluster:
        found = given_groups([part.split(",") for part in given.cluster], names)
    else:
        found = find_clusters(similarities(bench.vectors, engine=engine), given.k)
    facts: dict[str, Any] = {"models": tuple(model.given for model in session.models), "base": session.base}
    facts |= {"space": "tangent" if session.tangent else "weights", "limits": session.limits}
    result = compare_savings(bench, found.groups)
    study = study_partitions(bench, partitions, natural=found.groups) if given.every else None
    return BasesCompared(**facts, clustering=found, result=result, partitions=study)
