"""Stitching localised vectors whose masks were made elsewhere, and what each way of sharing masks has to store.

Localize-and-Stitch, He et al. 2024, <https://arxiv.org/abs/2408.13656>, and its variants in "Task vector bases",
<https://arxiv.org/abs/2502.01015>, Section 6.4; `thetau.transforms.share` has the formulas. A mask is where a localised vector is not
zero: an entry that a task did not change is in no mask of it, since keeping it or not gives the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thetau.engine.executor import Engine
from thetau.engine.merge import Merge, outputs
from thetau.errors import RecipeError
from thetau.facade import Expression, merge
from thetau.methods import LocalizeStitch, plain
from thetau.methods.reductions import Mean, Scale
from thetau.parts import Chain, PerTask, Varying
from thetau.transforms import Trim
from thetau.transforms.share import StitchPairs
from thetau.vectors import Combination
from thetau.vectors.combination import require_vector
from thetau.vectors.identity import identities

Clusters = PerTask | Sequence[int]


def stitch(
    localised: Sequence[Combination],
    *,
    vectors: Sequence[Combination] | None = None,
    sharing: Literal["none", "mask", "twice"] = "none",
    clusters: Clusters | None = None,
    rounding: Literal["half_up", "half_even"] = "half_up",
    scale: Varying = 1.0,
    names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Expression:
    """Merge localised task vectors by their overlap, lazily: Σ γ_i / Σ_j γ_j ⊙ τ_i, γ_i being where the i-th is not zero.

    Args:
        localised: sparse task vectors, as `thetau vector localize` writes them.
        vectors: the whole task vectors, in the same order. Mask Sharing needs them, since a shared mask can keep an entry that a task's
            own mask drops; where they are given, all values come from them.
        sharing: of masks within clusters: `none`, `mask` (Mask Sharing) or `twice` (Stitch Twice).
        clusters: the number of each task's cluster, in the order of the vectors or by task.
        rounding: what ½ becomes in a shared mask: `half_up` or `half_even`.
        scale: λ; a number, or one by pattern.
        names: the tasks' identities; by default those of `vectors`, or of `localised`.
        exclude, engine: as for `thetau.merge`.

    Raises:
        RecipeError: Mask Sharing without the whole vectors, or clusters that do not fit the tasks.
        AlignmentError: a vector is a model, or vectors do not fit each other.

    Examples:
        >>> import torch, thetau
        >>> base = thetau.open({"w": torch.zeros(3)})
        >>> localised = [thetau.open({"w": torch.tensor(values)}) - base for values in ([1.0, 2.0, 0.0], [0.0, 4.0, 0.0])]
        >>> stitch(localised, names=["a", "b"]).state_dict()["w"]
        tensor([1., 3., 0.])
    """
    tasks = identities(localised if vectors is None else vectors, names)
    given = PerTask(dict(zip(tasks, numbers(clusters, tasks), strict=True))) if clusters is not None else None
    method = LocalizeStitch(density=1.0, sharing=sharing, clusters=given, rounding=rounding, scale=scale)
    if vectors is None:
        if sharing == "mask":
            raise RecipeError(
                [
                    "Mask Sharing takes its values from the whole task vectors, where a shared mask keeps what a task's own mask drops. "
                    "Give them: `stitch(localised, vectors=...)`."
                ],
                "stitch",
            )
        return merge(localised, method, names=tasks, exclude=exclude, engine=engine)
    if len(localised) != len(vectors):
        raise RecipeError(
            [f"each task needs a localised vector and a whole one. Got {len(localised)} and {len(vectors)}."], "stitch"
        )
    for vector in (*localised, *vectors):
        require_vector(vector, "Stitching")
    method.chain()  # its checks
    beside = {task: f"{task} (localised)" for task in tasks}
    if set(beside.values()) & set(tasks):
        raise RecipeError([f"no task may be called {next(iter(set(beside.values()) & set(tasks)))!r}."], "stitch")
    of = dict(zip(tasks, numbers(clusters, tasks), strict=True)) if clusters is not None else dict.fromkeys(tasks, 0)
    pairs = tuple((task, beside[task], of[task]) for task in sorted(tasks))
    doubled = {**dict(zip(tasks, vectors, strict=True)), **dict(zip(beside.values(), localised, strict=True))}
    found = Merge(
        doubled,
        Chain(reduction=StitchPairs(pairs=pairs, sharing=sharing, rounding=rounding), post=(Scale(scale=scale),)),
        label=f"localize_stitch of {len(tasks)} task vectors and their masks",
        exclude=exclude,
        engine=engine,
        made={"stitch": plain(method), "tasks": sorted(tasks), "exclude": list(exclude)},
    )
    return Expression(((1.0, found),), reference=found.reference, name=found.label)


def stored(
    vectors: Sequence[Combination],
    method: LocalizeStitch,
    *,
    names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> dict[str, Expression]:
    """What has to be kept of task vectors so that `method` can be run from it alone, by name: sparse vectors to `compress`.

    A trimmed vector a task, or under Mask Sharing one a cluster (`cluster 0`, …). Merging these with `LocalizeStitch(density=1)` gives
    what `method` gives on the whole vectors.
    """
    for vector in vectors:
        require_vector(vector, "Storing")
    tasks = identities(vectors, names)
    given = method.clusters
    if given is not None:
        numbered = PerTask(dict(zip(tasks, numbers(given, tasks), strict=True)))
        method = LocalizeStitch(**{**vars(method), "clusters": numbered})
    trim = Trim(density=method.density, scope=method.trim)
    part = trim if method.sharing == "none" else method.share(stitch=False)
    kept = Merge(
        dict(zip(tasks, vectors, strict=True)),
        Chain(transforms=(part,), reduction=Mean()),
        label="localised",
        exclude=exclude,
        engine=engine,
    )
    parts = outputs(kept)
    if method.sharing != "mask":
        return {task: Expression(((1.0, parts[task]),), reference=kept.reference, name=task) for task in tasks}
    of = dict(zip(tasks, numbers(method.clusters, tasks), strict=True))
    return {
        f"cluster {number}": Expression(
            tuple((1.0, parts[task]) for task in sorted(tasks) if of[task] == number),
            reference=kept.reference,
            name=f"cluster {number}",
        )
        for number in sorted(set(of.values()))
    }


def numbers(clusters: Clusters | tuple[float, ...] | None, tasks: Sequence[str]) -> list[int]:
    """The number of each task's cluster, in the order of the tasks; with None all are of one.

    Raises:
        RecipeError: a task has none, or there are too many or too few.
    """
    if clusters is None:
        return [0] * len(tasks)
    if isinstance(clusters, PerTask):
        lost = [task for task in tasks if task not in clusters.values]
        extra = [task for task in clusters.values if task not in tasks]
        if lost or extra:
            problems = [f"no cluster for the task {task!r}." for task in lost]
            raise RecipeError(problems + [f"{task!r} is not a task. Tasks: {', '.join(tasks)}." for task in extra], "clusters")
        given: Sequence[object] = [clusters.values[task] for task in tasks]
    else:
        given = clusters
    if len(given) != len(tasks):
        raise RecipeError([f"one number for each of the {len(tasks)} tasks is needed. Got {len(given)}."], "clusters")
    bad = [n for n in given if isinstance(n, bool) or not isinstance(n, int | float) or n % 1 != 0]  # NaN and inf are bad too
    if bad:
        raise RecipeError([f"a cluster's number is a whole number. Got {bad[0]!r}."], "clusters")
    return [int(number) for number in given]  # type: ignore[call-overload]
