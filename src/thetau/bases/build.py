"""From task vectors to bases: their similarities in one pass, a basis for each cluster in another.

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Algorithm 1, lines 1 to 3 and 14 to 16. A cluster of one is its vector, unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from thetau.bases.cluster import Groups, Similarity
from thetau.checkpoint import Source
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.errors import AlignmentError, RecipeError, nearest
from thetau.facade import Expression, Openable, gram, merge
from thetau.methods import TaskArithmetic, name_of
from thetau.parts import Method, PerTask
from thetau.vectors.combination import Combination, require_vector
from thetau.vectors.identity import identities

Space = Literal["weights", "tangent"]
Evidence: TypeAlias = "Mapping[str, Mapping[str, Openable | Combination]]"


def named_vectors(vectors: Sequence[Expression], names: Sequence[str] | None = None) -> dict[str, Expression]:
    """The vectors by their identities, in the order of these.

    Raises:
        AlignmentError: one is a model.
        RecipeError: the names do not fit.
    """
    for vector in vectors:
        require_vector(vector, "A bank of bases")
    found = dict(zip(identities(vectors, names), vectors, strict=True))
    return {name: found[name].named(name) for name in sorted(found)}


def similarities(
    vectors: Mapping[str, Expression],
    base: Expression | None = None,
    *,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Similarity:
    """Inner products of all pairs, T×T numbers, in one streaming pass; with `base`, its norm too.

    Raises:
        AlignmentError: the vectors do not fit each other.
        CheckpointError: a file is damaged or holds values that are not finite.

    Examples:
        >>> import torch, thetau
        >>> base = thetau.open({"w": torch.zeros(2)})
        >>> models = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 2.0])}
        >>> similarities({name: thetau.open({"w": weights}) - base for name, weights in models.items()}).norms
        {'a': 3.0, 'b': 2.0}
    """
    names = sorted(vectors)
    listed = [*([] if base is None else [base]), *(vectors[name] for name in names)]
    totals = gram(listed, exclude=exclude, engine=engine)
    first = 0 if base is None else 1
    norm = None if base is None else float(totals[0, 0].clamp(min=0).sqrt())
    return Similarity(names=tuple(names), gram=totals[first:, first:], base_norm=norm)


def refuse_far(similarity: Similarity, base: str) -> None:
    """Refuse vectors that are no fine-tuning of this base.

    Raises:
        AlignmentError: a vector is longer than fine-tuning makes it.
    """
    if not similarity.base_norm:
        return
    far = {name: norm / similarity.base_norm for name, norm in similarity.norms.items() if norm > FAR * similarity.base_norm}
    if far:
        listed = ", ".join(f"{name} ({ratio:.2f})" for name, ratio in far.items())
        raise AlignmentError(
            f"{listed}: the task vector's length, in ‖θ₀‖ of {base}; fine-tuning gives less than {FAR:g}. "
            "It is probably of another base: `thetau inspect` tells. Leave it out, or allow it (`--allow-far`)."
        )


def space_of(vectors: Mapping[str, Expression], base: Source) -> Space:
    """Where the vectors belong: in the model's weights, or in its tangent space.

    Raises:
        AlignmentError: some belong to the one, others to the other.
    """
    spaces: dict[str, Space] = {}
    for name, vector in vectors.items():
        told = {s.metadata.get("thetau.space") for s in vector.sources() if s.key != base.key}
        spaces[name] = "tangent" if "tangent" in told else "weights"
    linear = [name for name, space in spaces.items() if space == "tangent"]
    if linear and len(linear) < len(spaces):
        other = next(name for name, space in spaces.items() if space != "tangent")
        raise AlignmentError(
            f"{linear[0]} belongs to the tangent space and {other} does not, so no basis can stand for both. "
            "Make a bank for each paradigm."
        )
    return "tangent" if linear else "weights"


def refuse_other_base(vectors: Mapping[str, Expression], base: Source) -> None:
    """Refuse saved vectors, or differences, of another base.

    Raises:
        AlignmentError: naming the first one.
    """
    own = base.fingerprint()
    for name, vector in vectors.items():
        theirs = {s.metadata.get("thetau.base") for s in vector.sources() if s.degree == 0} - {None}
        if vector.reference is not None and vector.reference.degree == 1 and vector.reference.key != base.key:
            theirs.add(vector.reference.fingerprint())
        if theirs - {own}:
            raise AlignmentError(
                f"{name}: this task vector was taken from another base than {base.label} (their fingerprints differ). "
                "Bases are made of vectors of one base: take it from this one, or make another bank."
            )


def merge_groups(
    vectors: Mapping[str, Expression],
    groups: Groups,
    inner: Method,
    *,
    given: Mapping[str, Expression] | None = None,
    evidence: Evidence | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> dict[str, Expression]:
    """A basis for each group, lazily: its vector, the one `given` for it (joint training, say), or its members merged by `inner`.

    `evidence`: what `inner` must know of the tasks' data, by kind and task; each group gets its members'.

    Raises:
        RecipeError: a vector is given for a basis that is not there, or `inner` lacks evidence of a group's member.
    """
    given = given or {}
    extra = [name for name in given if name not in groups]
    if extra:
        raise RecipeError([f"a basis is given for {extra[0]!r}; the bases are {', '.join(groups)}."], "bases")
    found = {}
    for basis, members in groups.items():
        if basis in given:
            found[basis] = require_basis(given[basis], basis)
        elif len(members) == 1:
            found[basis] = vectors[members[0]]
        else:
            listed = [vectors[name] for name in members]
            known = evidence_of(members, evidence)
            found[basis] = merge(listed, inner, names=members, seed=seed, exclude=exclude, engine=engine, evidence=known)
    return found


def evidence_of(members: Sequence[str], evidence: Evidence | None) -> Evidence:
    """The members' part of the evidence."""
    return {kind: {task: files[task] for task in members if task in files} for kind, files in (evidence or {}).items()}


def check_evidence(evidence: Evidence | None, inner: Method, tasks: Sequence[str]) -> None:
    """Raise `RecipeError` for evidence that the inner method does not ask for, or of no task, whichever clusters there will be."""
    needs = inner.chain().needs
    problems = [
        f"`{name_of(inner)}`, the inner method, asks for no evidence `{kind}`.{nearest(kind, needs)} Leave it out."
        for kind in evidence or {}
        if kind not in needs
    ]
    problems += [
        f"{kind}: {task!r} is not a task.{nearest(task, tasks)} Tasks: {', '.join(tasks)}."
        for kind, files in (evidence or {}).items()
        for task in files
        if task not in tasks
    ]
    if problems:
        raise RecipeError(problems, "evidence")


def weighted(
    parts: Mapping[str, tuple[float, Expression]], *, exclude: Sequence[str] = (), engine: Engine | None = None
) -> Expression:
    """Σ weight · vector, lazily, each vector being taken as a difference first: scaled models would lose what they differ by to rounding."""
    method = TaskArithmetic(scale=PerTask({name: weight for name, (weight, _) in parts.items()}))
    return merge([vector for _, vector in parts.values()], method, names=list(parts), exclude=exclude, engine=engine)


def require_basis(vector: Expression, basis: str) -> Expression:
    """The vector given for a basis, if it is one."""
    require_vector(vector, f"The basis {basis}")
    return vector
