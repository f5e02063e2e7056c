"""What a base and its models hold, how long their task vectors are and how they lie to each other, and whether the base looks like the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thetau._lazy import torch
from thetau.checkpoint import Roles, dtype_name
from thetau.diagnostics.candidates import Candidates, judge
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.errors import AlignmentError, CheckpointError
from thetau.facade import Expression, as_vector, grams
from thetau.statistics.gram import cosines
from thetau.vectors.identity import identities

ALIKE = 0.9  # mean cosine between task vectors above which they share one direction


@dataclass(frozen=True, kw_only=True)
class Part:
    """All tensors of one kind: how many, how many parameters, the base's norm, and ‖τ‖/‖θ₀‖ of each model on them."""

    kind: str
    tensors: int
    parameters: int
    norm: float
    shift: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the base: what it is, its norm, and ‖τ‖/‖θ₀‖ of each model on it; no norm where it does not take part."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    norm: float | None
    shift: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model against the base. `shift` is ‖τ‖/‖θ₀‖; `problems` say why it could not be compared."""

    name: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    norm: float | None = None
    shift: float | None = None
    fits_base: bool | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The whole picture. `cosine` is between the task vectors of `compared`, in that order; `candidates` where some were given."""

    base: Model
    models: tuple[Model, ...]
    parts: tuple[Part, ...]
    tensors: tuple[TensorRow, ...]
    compared: tuple[str, ...]
    cosine: tuple[tuple[float, ...], ...]
    candidates: Candidates | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def common_direction(self) -> float | None:
        """Mean cosine over pairs: near 1 when all models share a step away from this base, as with a wrong base."""
        k = len(self.compared)
        return (sum(map(sum, self.cosine)) - k) / (k * (k - 1)) if k > 1 else None

    def verdict(self) -> list[str]:
        """Whether the base looks like the models' base, in sentences."""
        far = [model for model in self.models if model.fits_base is False]
        said = [
            f"{model.name}: its task vector has {model.shift:.2f} of the base's norm; fine-tuning gives less than {FAR:g}. "
            f"{self.base.name} is probably not its base."
            for model in far
        ]
        common = self.common_direction
        if common is not None and common > ALIKE:
            said.append(
                f"All task vectors point the same way (mean cosine {common:.2f}): the models probably share another base, "
                f"nearer to them than {self.base.name}."
            )
        elif self.compared and not far and self.candidates is None:
            said.append(f"{self.base.name} looks like the base of all {len(self.compared)} models that fit it.")
        return said + ([] if self.candidates is None else self.candidates.sentences())


def inspect(
    base: Expression,
    models: Sequence[Expression],
    *,
    candidates: Sequence[Expression] = (),
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Inspection:
    """One streaming pass over the base and every model that fits it.

    With `candidates`, other models that may be the true base, the same pass tells how far each model lies from each of them.

    Raises:
        CheckpointError: the base itself holds NaN or infinite values; a model that does is described with that problem.

    Examples:
        >>> import thetau
        >>> found = inspect(thetau.open("base"), [thetau.open("a"), thetau.open("b")])
        >>> found.compared
        ('a', 'b')
        >>> abs(found.cosine[0][1]) < 0.1
        True
    """
    names = identities(models)
    fitting, problems = _fitting(base, dict(zip(names, models, strict=True)), exclude)
    points, refused = _fitting(base, dict(zip(identities([base, *candidates])[1:], candidates, strict=True)), exclude)
    try:
        totals = grams([base, *fitting.values(), *_ways(points)], exclude=exclude, engine=engine)
    except CheckpointError:  # a damaged one must not hide the others
        _drop_damaged(fitting, problems, exclude, engine)
        _drop_damaged(points, refused, exclude, engine)
        totals = grams([base, *fitting.values(), *_ways(points)], exclude=exclude, engine=engine)
    gram = torch.stack([totals[name] for name in sorted(totals)]).sum(0)
    theta = math.sqrt(float(gram[0, 0]))
    norms = {name: math.sqrt(float(gram[index, index])) for index, name in enumerate(fitting, 1)}
    described = [
        _describe(name, model, norm=norms.get(name), theta=theta, problems=problems.get(name, ()))
        for name, model in zip(names, models, strict=True)
    ]
    compared = tuple(fitting)
    return Inspection(
        base=_describe(base.name or base.label, base, norm=theta),
        models=tuple(described),
        parts=_parts(base, totals, compared),
        tensors=_tensors(base, totals, compared),
        compared=compared,
        cosine=tuple(map(tuple, cosines(gram[1 : 1 + len(compared), 1 : 1 + len(compared)]).tolist())) if compared else (),
        candidates=_candidates(base, dict(zip(names, models, strict=True)), gram, compared, points, refused, candidates),
    )


def _fitting(
    base: Expression, given: Mapping[str, Expression], exclude: Sequence[str]
) -> tuple[dict[str, Expression], dict[str, tuple[str, ...]]]:
    """The vectors of those that fit the base, and the problems of the others, by name."""
    fitting: dict[str, Expression] = {}
    problems: dict[str, tuple[str, ...]] = {}
    for name, model in given.items():
        try:
            vector = as_vector(model, base)
            _align(base, vector, exclude)
        except AlignmentError as error:
            problems[name] = tuple(str(error).splitlines())
        else:
            fitting[name] = vector
    return fitting, problems


def _drop_damaged(
    fitting: dict[str, Expression], problems: dict[str, tuple[str, ...]], exclude: Sequence[str], engine: Engine | None
) -> None:
    for name, vector in list(fitting.items()):
        try:
            vector.norm(exclude=exclude, engine=engine)
        except CheckpointError as error:
            problems[name] = (str(error),)
            del fitting[name]


def _ways(points: Mapping[str, Expression]) -> list[Expression]:
    """From the base to each candidate, then between any two of them: these are exactly 0 where two are the same."""
    listed = list(points.values())
    return [*listed, *(a - b for i, a in enumerate(listed) for b in listed[:i])]


def _candidates(
    base: Expression,
    models: Mapping[str, Expression],
    gram: torch.Tensor,
    compared: Sequence[str],
    points: Mapping[str, Expression],
    refused: Mapping[str, Sequence[str]],
    given: Sequence[Expression],
) -> Candidates | None:
    """`gram` is of the base, the vectors of `compared`, the ways to `points` and those between them."""
    if not given:
        return None
    names = [identities([base, *given])[0], *points]
    whole = {name for name, model in models.items() if len(model.terms) == 1 and not model.terms[0][1].partial}
    judged = [name for name in compared if name in whole]
    first = 1 + len(compared)
    place = [*range(first, first + len(points)), *(1 + compared.index(name) for name in judged)]
    inner = torch.zeros(1 + len(place), 1 + len(place), dtype=torch.float64)  # the base is the origin
    inner[1:, 1:] = gram[place][:, place]
    square = inner.diagonal()
    squared = square[:, None] + square[None, :] - 2 * inner
    between = first + len(points)
    for i in range(len(points)):
        for j in range(i):
            squared[1 + i, 1 + j] = squared[1 + j, 1 + i] = gram[between, between]
            between += 1
    lengths = [gram[0, 0], *(gram[0, 0] + 2 * gram[0, k] + gram[k, k] for k in place[: len(points)])]
    return judge(
        names,
        judged,
        squared,
        [math.sqrt(max(0.0, float(length))) for length in lengths],
        problems=refused,
        not_judged={
            name: f"is a task vector or an adapter over {base.name or base.label}, near it by construction, and is not judged."
            for name in compared
            if name not in whole
        },
    )


def _align(base: Expression, vector: Expression, exclude: Sequence[str]) -> None:
    from thetau.checkpoint import align

    sources = {source.key: source for source in [*base.sources(), *vector.sources()]}
    align(base.specs(), base.label, list(sources.values()), exclude)


def _describe(
    name: str, model: Expression, *, norm: float | None = None, theta: float | None = None, problems: tuple[str, ...] = ()
) -> Model:
    specs = model.terms[-1][1].specs if model.terms else {}
    dtypes: dict[str, int] = {}
    for spec in specs.values():
        dtypes[dtype_name(spec.dtype)] = dtypes.get(dtype_name(spec.dtype), 0) + 1
    shift = None if norm is None or theta is None else norm / theta if theta else math.inf
    return Model(
        name=name,
        tensors=len(specs),
        parameters=sum(spec.elements for spec in specs.values()),
        dtypes=dtypes,
        norm=norm,
        shift=shift,
        fits_base=None if shift is None else shift <= FAR,
        notes=tuple(note for _, source in model.terms for note in source.notes),
        problems=problems,
    )


def _tensors(base: Expression, totals: Mapping[str, torch.Tensor], names: Sequence[str]) -> tuple[TensorRow, ...]:
    specs, known = base.specs(), Roles.of(base.terms[0][1])
    rows = []
    for name, spec in specs.items():
        gram = totals.get(name)
        theta = None if gram is None else math.sqrt(float(gram[0, 0]))
        shift = {}
        if gram is not None and theta:
            shift = {model: math.sqrt(float(gram[i, i])) / theta for i, model in enumerate(names, 1)}
        kind = known.kind(name, spec.shape).value
        rows.append(TensorRow(name=name, shape=spec.shape, dtype=dtype_name(spec.dtype), kind=kind, norm=theta, shift=shift))
    return tuple(rows)


def _parts(base: Expression, totals: Mapping[str, torch.Tensor], names: Sequence[str]) -> tuple[Part, ...]:
    specs, known = base.specs(), Roles.of(base.terms[0][1])
    groups: dict[str, list[str]] = {}
    for name in totals:
        groups.setdefault(known.kind(name, specs[name].shape).value, []).append(name)
    parts = []
    for kind, members in groups.items():
        gram = torch.stack([totals[name] for name in members]).sum(0)
        theta = math.sqrt(float(gram[0, 0]))
        shift = {name: math.sqrt(float(gram[i, i])) / theta if theta else math.inf for i, name in enumerate(names, 1)}
        parts.append(
            Part(kind=kind, tensors=len(members), parameters=sum(specs[n].elements for n in members), norm=theta, shift=shift)
        )
    return tuple(sorted(parts, key=lambda part: -part.parameters))
