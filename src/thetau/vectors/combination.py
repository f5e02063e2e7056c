"""Linear combinations of weights, kept symbolic until something reads them.

Models and task vectors are one kind of thing: Σ weight · source. A model has degree 1 (the weights of its models sum to one), a task
vector degree 0. The same source in both operands cancels exactly, so `(base + τ) - base` is τ and reads nothing of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from thetau.checkpoint import Source, Spec
from thetau.errors import AlignmentError

Same = TypeVar("Same", bound="Combination")  # not `Self`: the type checker of the tests cannot follow it


class Combination:
    """Σ weight · source. Immutable; every operator returns a new one and reads nothing.

    `reference` names the source whose tensors (names, shapes, dtypes, side files) a result takes: the base. `name` stays through
    `model - base`, scaling and negation; sums and differences of vectors have none.
    """

    __slots__ = ("name", "reference", "terms")

    def __init__(
        self, terms: tuple[tuple[float, Source], ...], *, reference: Source | None = None, name: str | None = None
    ) -> None:
        self.terms = terms
        self.reference = reference
        self.name = name

    @property
    def degree(self) -> float:
        """1 for a model, 0 for a task vector; anything else cannot be saved."""
        return math.fsum(weight * source.degree for weight, source in self.terms)

    @property
    def is_model(self) -> bool:
        """Whether the weights of the models sum to one."""
        return math.isclose(self.degree, 1.0, abs_tol=1e-9)

    @property
    def is_vector(self) -> bool:
        """Whether the weights of the models cancel."""
        return math.isclose(self.degree, 0.0, abs_tol=1e-9)

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or " ".join(
            f"{'+' if w >= 0 else '−'} {f'{abs(w):g}·' if abs(w) != 1 else ''}{s.label}" for w, s in self.terms
        ).removeprefix("+ ")

    def sources(self) -> list[Source]:
        """The distinct sources, the reference first where it is read at all."""
        return [source for _, source in self.terms]

    def specs(self) -> Mapping[str, Spec]:
        """The tensors of a result: the reference's, or the union over partial sources where there is none."""
        if self.reference is not None:
            return self.reference.specs
        models = [source for _, source in self.terms if source.degree == 1]
        if models:
            return models[0].specs
        union: dict[str, Spec] = {}
        for _, source in self.terms:
            for name, spec in source.specs.items():
                union.setdefault(name, spec)
        return union

    def named(self: Same, name: str) -> Same:
        """The same, under a name that messages, recipes and randomness use."""
        return self._with(self.terms, name=name)

    def __add__(self: Same, other: object) -> Same:
        return self._sum(other, 1.0) if isinstance(other, Combination) else NotImplemented

    def __sub__(self: Same, other: object) -> Same:
        return self._sum(other, -1.0) if isinstance(other, Combination) else NotImplemented

    def __mul__(self: Same, factor: object) -> Same:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"Weights can only be scaled by a finite number. Got {factor!r}.")
        return self._with(tuple((weight * factor, source) for weight, source in self.terms if factor), name=self.name)

    __rmul__ = __mul__

    def __truediv__(self: Same, factor: object) -> Same:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self * (1 / factor)

    def __neg__(self: Same) -> Same:
        return self * -1.0

    def __radd__(self: Same, other: object) -> Same:
        if other == 0 and not isinstance(other, Combination):  # `sum(vectors)` starts from 0
            return self
        return NotImplemented

    def __repr__(self) -> str:
        kind = "model" if self.is_model else "task vector" if self.is_vector else f"combination of degree {self.degree:g}"
        return f"<{kind}: {self.label}>"

    def _sum(self: Same, other: Combination, sign: float) -> Same:
        refuse_evidence(self)
        refuse_evidence(other)
        base = sign < 0 and other.is_model  # `model - base` takes its names from the base
        merged: dict[str, tuple[float, Source]] = {source.key: (weight, source) for weight, source in self.terms}
        for weight, source in other.terms:
            old = merged.get(source.key, (0.0, source))[0]
            merged[source.key] = (old + sign * weight, source)
        return self._with(
            tuple(term for term in merged.values() if term[0] != 0),
            reference=(other.reference or self.reference) if base else (self.reference or other.reference),
            name=self.name if base and self.is_model else None,  # a model's vector is called as the model; a sum is nobody's
        )

    def _with(
        self: Same, terms: tuple[tuple[float, Source], ...], *, reference: Source | None = None, name: str | None = None
    ) -> Same:
        return type(self)(terms, reference=reference or self.reference, name=name)


def refuse_evidence(combination: Combination) -> None:
    """Nothing where all terms are weights.

    Raises:
        AlignmentError: one is evidence, which can be read and given to a method, but not added to weights or compared with them.
    """
    for source in combination.sources():
        if source.metadata.get("thetau.kind") == "evidence":
            raise AlignmentError(
                f"{source.label}: is evidence, not a task vector. Give it to a method that needs it: `evidence: {{kind: {{task: file}}}}`."
            )


def require_vector(vector: Combination, what: str) -> Combination:
    """The vector itself, if it is one.

    Raises:
        AlignmentError: it is a model, or no valid difference of models.
    """
    refuse_evidence(vector)
    if not vector.is_vector:
        raise AlignmentError(f"{what} needs task vectors (degree 0). Got {vector!r}: subtract the base, as in `model - base`.")
    return vector
