"""Two models beside each other, as data: tensor by tensor, by kind and block, whole, and in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from thetau.diagnostics.beside import Beside
from thetau.diagnostics.results import Result
from thetau.diagnostics.spectra import Directions


@final
@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row of an embedding or a head, and how far it moved: ‖a − b‖ of the row, and over ‖a‖ of the row."""

    row: int
    token: str | None
    distance: float
    relative: float | None


@final
@dataclass(frozen=True, kw_only=True)
class TensorPair:
    """One tensor of both.

    - `other`: what B calls it, where that is another name.
    - `distance`: ‖a − b‖; `relative`: the same over ‖a‖.
    - `cosine`: of the two; with a base, of a − θ₀ and b − θ₀. None where one of them is zero.
    - `shift_a`, `shift_b`: ‖a − θ₀‖ and ‖b − θ₀‖, with a base that has this tensor and no NaN or infinite value in it.
    - `changed`: entries that differ. `beyond`: those that differ by more than a rounding to the coarser dtype explains.
    - `largest`: the largest |a − b|, and `at`: where.
    - `directions`: of matrices, by what: `difference` (b − a), and with a base `a` and `b` (their task vectors).
    - `rows`: of a vocabulary's tensor, those that moved most.
    - `not_finite`: entries of either that are NaN or infinite; then only `changed` counts, and the figures are None.
    """

    name: str
    other: str | None
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    norm_a: float | None
    norm_b: float | None
    distance: float | None
    relative: float | None
    cosine: float | None
    shift_a: float | None
    shift_b: float | None
    changed: int
    beyond: int
    largest: float | None
    at: tuple[int, ...]
    directions: Mapping[str, Directions] = field(default_factory=dict)
    rows: tuple[TokenRow, ...] = ()
    not_finite: int = 0

    @property
    def elements(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """Tensors of one kind or one block together; `cosine` as in `TensorPair`."""

    by: str
    name: str
    tensors: int
    parameters: int
    norm_a: float
    distance: float
    cosine: float | None
    changed: int


@final
@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A tensor that both have, in other shapes."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Everything. `base` is None where none was given; `recipe`: whether B is what a recipe gives, computed anew.

    - `distance`, `relative`, `cosine`: over all tensors that were compared.
    - `buffers`: tensors that are no floats and differ.
    - `beside`: None where B is a recipe's: its config and tokenizer are those of its models.
    - `notes`: names that were told to be the same, what was not done for want of memory.
    """

    a: str
    b: str
    base: str | None
    recipe: bool
    tensors: tuple[TensorPair, ...]
    parts: tuple[Part, ...]
    norm_a: float
    norm_b: float
    distance: float
    relative: float | None
    cosine: float | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misfits: tuple[Misfit, ...]
    buffers: tuple[str, ...]
    beside: Beside | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def complete(self) -> bool:
        """Whether both have the same tensors, of the same shapes."""
        return not (self.only_a or self.only_b or self.misfits)

    @property
    def same(self) -> bool:
        """Whether all values are the same."""
        return self.complete and not self.buffers and not any(one.changed for one in self.tensors)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return self.complete and not self.buffers and not any(one.beyond or one.not_finite for one in self.tensors)

    def largest(self, count: int) -> list[TensorPair]:
        """The tensors that differ most, relative to their own length."""
        found = [one for one in self.tensors if one.changed]
        return sorted(found, key=lambda one: -math.inf if one.relative is None else -one.relative)[:count]

    def verdict(self) -> list[str]:
        """What was found, in sentences."""
        said = []
        changed = [one for one in self.tensors if one.changed]
        beyond = [one for one in changed if one.beyond or one.not_finite]
        what = f"{self.a} is what {self.b} gives" if self.recipe else f"{self.a} and {self.b} hold the same weights"
        if self.same:
            said.append(f"{what}: {len(self.tensors)} tensors, every value.")
        elif self.agrees:
            said.append(
                f"{what} up to rounding: {len(changed)} of {len(self.tensors)} tensors differ, by no more than a step of their dtype."
            )
        elif self.recipe:
            first = f" First: {beyond[0].name!r}, by {_number(beyond[0].largest)} at {list(beyond[0].at)}." if beyond else ""
            said.append(
                f"{self.a} is NOT what {self.b} gives: {len(beyond)} of {len(self.tensors)} tensors differ by more than rounding.{first}"
            )
        else:
            said.append(
                f"{len(changed)} of {len(self.tensors)} tensors differ; ‖A − B‖ = {self.distance:.4g}"
                + (f", {self.relative:.3g} of ‖A‖." if self.relative is not None else ".")
            )
        broken = [one for one in self.tensors if one.not_finite]
        if broken:
            said.append(f"{len(broken)} tensors hold NaN or infinite values, first {broken[0].name!r} ({broken[0].not_finite}).")
        for names, label in ((self.only_a, self.a), (self.only_b, self.b)):
            if names:
                said.append(f"{len(names)} tensors are only in {label}: {some(names)}.")
        if self.misfits:
            one = self.misfits[0]
            said.append(
                f"{len(self.misfits)} tensors have other shapes, first {one.name!r}: {list(one.shape_a)} and {list(one.shape_b)}."
            )
        if self.buffers:
            said.append(f"{len(self.buffers)} tensors that are no floats differ: {some(self.buffers)}.")
        return [*said, *([] if self.beside is None else _side_files(self.beside, self.a, self.b))]


def _side_files(beside: Beside, a: str, b: str) -> list[str]:
    said = list(beside.problems)
    if beside.config:
        shown = "; ".join(f"{one.key}: {one.a or 'absent'} against {one.b or 'absent'}" for one in beside.config[:6])
        said.append(f"Their configs differ in {len(beside.config)} entries: {shown}{' …' if len(beside.config) > 6 else ''}.")
    tokens = beside.tokenizer
    if tokens is not None and not tokens.same:
        parts = [
            f"{one.count} tokens {what} ({some(one.first)})"
            for one, what in ((tokens.only_a, f"only in {a}"), (tokens.only_b, f"only in {b}"), (tokens.moved, "with other ids"))
            if one.count
        ]
        said.append(f"Their tokenizers differ: {', '.join(parts)}.")
    if beside.same_template is False:
        said.append("Their chat templates differ.")
    return said


def some(names: Sequence[str]) -> str:
    """The first four, and how many more there are."""
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
