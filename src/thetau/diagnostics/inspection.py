"""What a base and its models hold, how long their task vectors are and how they lie to each other, and whether the base looks like the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from thetau.checkpoint import dtype_name, kind_of
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.errors import AlignmentError
from thetau.facade import Expression, as_vector, grams
from thetau.statistics.gram import cosines


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
    """The whole picture. `cosine` is between the task vectors of `compared`, in that order."""

    base: Model
    models: tuple[Model, ...]
    parts: tuple[Part, ...]
    compared: tuple[str, ...]
    cosine: tuple[tuple[float, ...], ...]

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
        elif self.compared and not far:
            said.append(f"{self.base.name} looks like the base of all {len(self.compared)} models that fit it.")
        return said


def inspect(
    base: Expression, models: Sequence[Expression], *, exclude: Sequence[str] = (), engine: Engine | None = None
) -> Inspection:
    """One streaming pass over the base and every model that fits it.

    Raises:
        CheckpointError: a tensor that is read holds NaN or infinite values.
    """
    fitting: list[tuple[str, Expression]] = []
    found: list[Model] = []
    for model in models:
        name = model.name or model.label
        try:
            vector = as_vector(model, base)
            _align(base, vector, exclude)
        except AlignmentError as error:
            found.append(_describe(name, model, problems=tuple(str(error).splitlines())))
        else:
            fitting.append((name, vector))
            found.append(_describe(name, model))
    totals = grams([base, *(vector for _, vector in fitting)], exclude=exclude, engine=engine)
    gram = torch.stack([totals[name] for name in sorted(totals)]).sum(0)
    theta = math.sqrt(float(gram[0, 0]))
    for index, (name, _) in enumerate(fitting, 1):
        norm = math.sqrt(float(gram[index, index]))
        place = next(i for i, model in enumerate(found) if model.name == name and model.norm is None and not model.problems)
        shift = norm / theta if theta else math.inf
        found[place] = Model(**{**asdict(found[place]), "norm": norm, "shift": shift, "fits_base": shift <= FAR})
    names = tuple(name for name, _ in fitting)
    matrix = cosines(gram[1:, 1:]).tolist() if names else []
    parts = _parts(base, totals, names)
    described = _describe(base.name or base.label, base)
    whole = Model(**{**asdict(described), "norm": theta})
    return Inspection(base=whole, models=tuple(found), parts=parts, compared=names, cosine=tuple(map(tuple, matrix)))


def _align(base: Expression, vector: Expression, exclude: Sequence[str]) -> None:
    from thetau.checkpoint import align

    sources = {source.key: source for source in [*base.sources(), *vector.sources()]}
    align(base.specs(), base.label, list(sources.values()), exclude)


def _describe(name: str, model: Expression, problems: tuple[str, ...] = ()) -> Model:
    specs = model.terms[-1][1].specs if model.terms else {}
    dtypes: dict[str, int] = {}
    for spec in specs.values():
        dtypes[dtype_name(spec.dtype)] = dtypes.get(dtype_name(spec.dtype), 0) + 1
    notes = tuple(note for _, source in model.terms for note in source.notes)
    parameters = sum(spec.elements for spec in specs.values())
    return Model(name=name, tensors=len(specs), parameters=parameters, dtypes=dtypes, notes=notes, problems=problems)


def _parts(base: Expression, totals: Mapping[str, torch.Tensor], names: Sequence[str]) -> tuple[Part, ...]:
    specs = base.specs()
    groups: dict[str, list[str]] = {}
    for name in totals:
        groups.setdefault(kind_of(name, specs[name].shape).value, []).append(name)
    parts = []
    for kind, members in groups.items():
        gram = torch.stack([totals[name] for name in members]).sum(0)
        theta = math.sqrt(float(gram[0, 0]))
        shift = {name: math.sqrt(float(gram[i, i])) / theta if theta else math.inf for i, name in enumerate(names, 1)}
        parts.append(
            Part(kind=kind, tensors=len(members), parameters=sum(specs[n].elements for n in members), norm=theta, shift=shift)
        )
    return tuple(sorted(parts, key=lambda part: -part.parameters))
