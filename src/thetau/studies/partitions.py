"""What a partition of tasks into bases is worth: merge within each cluster, merge the bases, evaluate every task.

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>: all 15 partitions of four tasks (Tables 4, 10 to 12), random partitions (Fig. 8), and
Save-One, bases and Save-All (Table 5), where Save-One is the mean over the partitions that merge all tasks but one.

Every cluster's merge is kept in the run's folder by its content, and evaluations in the evaluator's cache, so that partitions that share
a cluster share its work, and an interrupted study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, final

from torch import Tensor

from thetau._version import __version__
from thetau.bases.build import Evidence, check_evidence, evidence_of, merge_groups
from thetau.engine.executor import Engine
from thetau.errors import DataError, OutputError
from thetau.evaluate.cache import Cache
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import Measure
from thetau.evaluate.tuned import make_space
from thetau.facade import Expression
from thetau.facade import open as open_weights
from thetau.methods import plain
from thetau.parts import Method
from thetau.studies.arithmetic import ADDITION
from thetau.studies.bases import BasesAddition, bases_addition, outer_space

Groups = Mapping[str, tuple[str, ...]]
Cluster = tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class PartitionValue:
    """One partition: its clusters, and what their bases give when they are added. `label`: the clusters as text."""

    label: str
    groups: dict[str, tuple[str, ...]]
    inner: dict[str, Any]
    addition: BasesAddition

    @property
    def absolute(self) -> float:
        """Average accuracy at the chosen coefficients, on test."""
        return self.addition.best.absolute

    @property
    def normalised(self) -> float | None:
        """The same, relative to the tasks' own models."""
        return self.addition.best.normalised


@final
@dataclass(frozen=True, kw_only=True)
class PartitionMean:
    """Over `count` partitions: the mean and standard deviation of average accuracy (0 for one), and the mean normalised one."""

    count: int
    absolute: float
    spread: float
    normalised: float | None


@final
@dataclass(frozen=True, kw_only=True)
class PartitionStudy:
    """Partitions compared under one inner and one outer method.

    - `by_size`: number of clusters → mean over the partitions with as many. `overall`: over all of them.
    - `natural`: the partition that the clustering makes, which `values` need not hold. `rank`: its place among all partitions with as many
      clusters, itself included; 1 is the best, and equal ones share a place.
    """

    inner: dict[str, Any]
    outer: str
    tasks: tuple[str, ...]
    values: tuple[PartitionValue, ...]
    by_size: dict[int, PartitionMean]
    overall: PartitionMean
    natural: PartitionValue | None
    rank: int | None


@final
@dataclass(frozen=True, kw_only=True)
class Saving:
    """One way to keep vectors: `vectors` of them in store before anything is added, `nbytes` in float32, and accuracy as means over
    `partitions`.

    - `coefficients`: how many an addition has to choose, where each vector gets its own.
    """

    name: Literal["save-one", "bases", "save-all"]
    vectors: int
    nbytes: int
    coefficients: int
    absolute: float
    normalised: float | None
    partitions: tuple[PartitionValue, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Savings:
    """Save-One, bases and Save-All under the same inner and outer method (Table 5)."""

    inner: dict[str, Any]
    outer: str
    tasks: tuple[str, ...]
    individual: dict[str, Measure]
    one: Saving
    bases: Saving
    all: Saving


@final
class Bench:
    """What the partitions of a study share: the tasks' vectors, the methods, the evaluator, and what was merged already.

    - `base`: the weights of the evaluator's encoder. `vectors`: task → its vector over that base.
    - `inner` merges within a cluster (one task's basis is its vector). `outer` merges bases at λ = 1, None for their sum.
    - `given`: cluster (names, sorted) → its basis, made elsewhere, such as by joint training; in place of `inner`'s. A function makes it when it is
      first needed, for clusters of several.
    - `evidence`: what `inner` must know of the tasks' data, by kind and task; a function of a cluster where that depends on it (AdaMerging's coefficients).
    - `run`: a folder that keeps merges and the terms of linear models.

    Raises `DataError`: no vectors, or a task that the evaluator does not know.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        base: Mapping[str, Tensor],
        vectors: Mapping[str, Expression],
        *,
        inner: Method,
        outer: Method | None = None,
        given: Mapping[Cluster, Expression] | Callable[[Cluster], Expression] | None = None,
        evidence: Evidence | Callable[[Cluster], Evidence] | None = None,
        tangent: bool = False,
        grid: Sequence[float] = ADDITION,
        run: Path | None = None,
        engine: Engine | None = None,
    ) -> None:
        unknown = [task for task in vectors if task not in evaluator.tasks]
        if unknown or not vectors:
            raise DataError(
                f"a vector is given for {unknown[0]!r}, which is no task of the evaluator: {', '.join(evaluator.tasks)}."
                if unknown
                else "partitions are of tasks with vectors. Got none."
            )
        if not callable(evidence):
            check_evidence(evidence, inner, list(vectors))
        self.evaluator, self.base, self.vectors = evaluator, base, {name: vectors[name] for name in sorted(vectors)}
        self.inner, self.outer, self.evidence = inner, outer, evidence
        self.given = given if callable(given) else {tuple(sorted(key)): one for key, one in (given or {}).items()}
        self._made: dict[Cluster, Expression] = {}
        self.tangent, self.grid, self.run, self.engine = tangent, tuple(grid), run, engine
        self._individual: dict[str, dict[str, Measure]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, sorted."""
        return tuple(self.vectors)

    def individual(self) -> dict[str, dict[str, Measure]]:
        """Split → task → accuracy of the task's own vector at α = 1; measured once."""
        if self._individual is None:
            found: dict[str, dict[str, Measure]] = {"validation": {}, "test": {}}
            for task, vector in self.vectors.items():
                alone = {task: vector.state_dict(engine=self.engine)}
                space = make_space(self.evaluator, self.base, alone, tangent=self.tangent, cache=self.run)
                for split, measures in found.items():
                    measures[task] = space.accuracy({task: 1.0}, task, split)
            self._individual = found
        return self._individual

    def basis(self, members: Cluster) -> Expression:
        """The basis of a cluster; its merge is done once where there is a run folder. Raises `DataError` for an unknown task."""
        cluster = tuple(sorted(members))
        unknown = [task for task in cluster if task not in self.vectors]
        if unknown:
            raise DataError(f"no task vector of {unknown[0]!r}. Known: {', '.join(self.vectors)}.")
        made = self._elsewhere(cluster)
        if made is not None:
            return made
        evidence = self.evidence(cluster) if callable(self.evidence) and len(cluster) > 1 else self.evidence
        known = evidence_of(cluster, evidence if isinstance(evidence, Mapping) else None)
        merged = merge_groups(self.vectors, {"basis": cluster}, self.inner, evidence=known, engine=self.engine)["basis"]
        key = self._key(cluster, known)
        if len(cluster) == 1 or self.run is None or key is None:
            return merged
        path = self.run / "merges" / f"{key}.safetensors"
        if not path.is_file():
            try:
                merged.save(path, engine=self.engine)
            except OutputError:
                if not path.is_file():  # else another process was faster, and it is the same
                    raise
        stored = open_weights(path)
        return Expression(stored.terms, reference=merged.reference, name="+".join(cluster))

    def _elsewhere(self, cluster: Cluster) -> Expression | None:
        """The basis that was made elsewhere, if one was."""
        if not callable(self.given):
            return self.given.get(cluster)
        if len(cluster) == 1:
            return None
        if cluster not in self._made:
            self._made[cluster] = self.given(cluster)
        return self._made[cluster]

    def nbytes(self) -> int:
        """Of one task vector in float32."""
        return 4 * sum(
            spec.elements for spec in next(iter(self.vectors.values())).specs().values() if spec.dtype.is_floating_point
        )

    def _key(self, cluster: Cluster, evidence: Evidence) -> str | None:
        """The content of a cluster's merge; None where a vector is itself computed, or evidence is no file, and there is no content to go by."""
        terms = {task: self.vectors[task].terms for task in cluster}
        files = [file for one in evidence.values() for file in one.values()]
        if not all(isinstance(file, str | Path) for file in files):
            return None
        if any(source.children() for listed in terms.values() for _, source in listed):
            return None
        content = {task: [(weight, source.fingerprint()) for weight, source in listed] for task, listed in terms.items()}
        known = {
            kind: {
                task: open_weights(file).terms[0][1].fingerprint() for task, file in one.items() if isinstance(file, str | Path)
            }
            for kind, one in evidence.items()
        }
        return Cache.key([__version__, plain(self.inner), content, *([known] if known else [])])


def value_of_partition(bench: Bench, groups: Groups, *, own: bool = False) -> PartitionValue:
    """Merge each cluster, merge the bases, choose λ on validation, and evaluate every task. `own`: a coefficient for each basis, of a sum.

    Raises:
        DataError: the clusters are no partition of the bench's tasks.
    """
    listed = [task for members in groups.values() for task in members]
    if sorted(listed) != list(bench.tasks):
        raise DataError(
            f"a partition holds every task once: {', '.join(bench.tasks)}. Got {partition_label(groups) or 'no clusters'}."
        )
    bases = {"+".join(sorted(members)): bench.basis(members) for members in groups.values()}  # randomness goes by name
    space, parts = outer_space(
        bench.evaluator, bench.base, bases, bench.outer, tangent=bench.tangent, cache=bench.run, engine=bench.engine
    )
    added = bases_addition(
        space,
        bench.tasks,
        parts,
        outer=outer_name(bench.outer),
        grid=bench.grid,
        own=own and bench.outer is None,
        vectors=len(bases),
        individual=bench.individual(),
    )
    ordered = {basis: tuple(sorted(members)) for basis, members in groups.items()}
    return PartitionValue(label=partition_label(groups), groups=ordered, inner=plain(bench.inner), addition=added)


def study_partitions(bench: Bench, partitions: Sequence[Groups], *, natural: Groups | None = None) -> PartitionStudy:
    """Compare partitions, and the natural one against them. Raises `DataError`: there are none."""
    if not partitions:
        raise DataError("a comparison needs at least one partition. Got none.")
    values = tuple(value_of_partition(bench, groups) for groups in partitions)
    among = {value.label: value for value in values}
    found = None if natural is None else among.get(partition_label(natural)) or value_of_partition(bench, natural)
    sizes = sorted({len(value.groups) for value in values})
    rank = None
    if found is not None:
        rank = 1 + sum(value.absolute > found.absolute for value in values if len(value.groups) == len(found.groups))
    return PartitionStudy(
        inner=plain(bench.inner),
        outer=outer_name(bench.outer),
        tasks=bench.tasks,
        values=values,
        by_size={size: mean_of([value for value in values if len(value.groups) == size]) for size in sizes},
        overall=mean_of(values),
        natural=found,
        rank=rank,
    )


def compare_savings(bench: Bench, groups: Groups) -> Savings:
    """Save-One, the bases `groups` and Save-All, under the bench's methods. Raises `DataError`: fewer than two tasks, or no partition.

    Save-One stores one vector and merges the others into it; each task in turn is the one that comes next.
    """
    tasks = bench.tasks
    if len(tasks) < 2:
        raise DataError(f"a comparison needs at least two tasks. Got {', '.join(tasks)}.")
    rest = {task: tuple(one for one in tasks if one != task) for task in tasks}
    ones = [value_of_partition(bench, {"saved": others, "next": (task,)}) for task, others in rest.items()]
    middle = value_of_partition(bench, groups)
    every = value_of_partition(bench, {task: (task,) for task in tasks})

    def saving(
        name: Literal["save-one", "bases", "save-all"], vectors: int, coefficients: int, values: Sequence[PartitionValue]
    ) -> Saving:
        means = mean_of(values)
        return Saving(
            name=name,
            vectors=vectors,
            nbytes=vectors * bench.nbytes(),
            coefficients=coefficients,
            absolute=means.absolute,
            normalised=means.normalised,
            partitions=tuple(values),
        )

    return Savings(
        inner=plain(bench.inner),
        outer=outer_name(bench.outer),
        tasks=tasks,
        individual=dict(bench.individual()["test"]),
        one=saving("save-one", 1, 2, ones),
        bases=saving("bases", len(groups), len(groups), [middle]),
        all=saving("save-all", len(tasks), len(tasks), [every]),
    )


def mean_of(values: Sequence[PartitionValue]) -> PartitionMean:
    """The mean over partitions."""
    absolute = [value.absolute for value in values]
    relative = [value.normalised for value in values if value.normalised is not None]
    return PartitionMean(
        count=len(values),
        absolute=mean(absolute),
        spread=stdev(absolute) if len(absolute) > 1 else 0.0,
        normalised=mean(relative) if len(relative) == len(values) else None,
    )


def partition_label(groups: Groups) -> str:
    """`a+b | c`: the clusters as text, in the order of their first tasks."""
    return " | ".join("+".join(sorted(members)) for members in sorted(groups.values(), key=lambda members: sorted(members)))


def outer_name(outer: Method | None) -> str:
    """The outer method as text, with its fields."""
    return "sum" if outer is None else repr(outer)
