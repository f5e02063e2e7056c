"""Experts of a mixture that one checkpoint keeps in one tensor and another one by one: a view of the one as the other, in both directions.

Fused, `experts.gate_up_proj` is `[expert, out, in]` with the gate's rows before the up projection's, or `[expert, in, out]` with its columns
so; single ones are `experts.N.w1` (gate), `w3` (up) and `w2` (down), or `gate_proj`, `up_proj` and `down_proj`, each `[out, in]`. Which of
the two a fused tensor is, its shape tells, and where that does not, the other one of its pair.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.source import Demand, Source, Spec, span
from thetau.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

_SINGLE = re.compile(r"^(.*(?:^|\.)experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)(?:\.weight)?$")
_FUSED = re.compile(r"^(.*(?:^|\.)experts)\.(gate_up_proj|down_proj)(?:\.weight)?$")
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_HELD = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Stack:
    """A fused tensor out of single experts' matrices: by expert, those whose rows follow each other."""

    parts: tuple[tuple[str, ...], ...]
    transposed: bool


@dataclass(frozen=True)
class _Take:
    """One expert's matrix out of a fused tensor: rows `first` to `last` of its `[out, in]`."""

    fused: str
    expert: int
    first: int
    last: int
    transposed: bool


class ExpertsView(Source):
    """A stored source whose experts stand as another checkpoint has them; all else is as it is."""

    def __init__(self, source: Source, specs: Mapping[str, Spec], ways: Mapping[str, _Stack | _Take]) -> None:
        self.label, self.degree, self.partial, self.folder = source.label, source.degree, source.partial, source.folder
        self.metadata, self.over = source.metadata, source.over
        self.key = f"experts:{source.key}:{hashlib.blake2b(repr(sorted(ways)).encode(), digest_size=8).hexdigest()}"
        self.specs = {**source.specs, **specs}
        self._source, self._ways = source, dict(ways)

    def origins(self) -> Sequence[Source]:
        """What is shown."""
        return (self._source,)

    def fingerprint(self) -> str:
        """That of what is shown."""
        return self._source.fingerprint()

    def changed_files(self) -> list[str]:
        """Those of what is shown."""
        return self._source.changed_files()

    def called(self, name: str) -> str:
        """The fused tensor's name where an expert is out of one; of one that is put together, the first that it is made of."""
        way = self._ways.get(name)
        if way is None:
            return self._source.called(name)
        return self._source.called(way.fused if isinstance(way, _Take) else way.parts[0][0])

    def place(self, name: str) -> tuple[int, int] | None:
        """Where an expert's rows lie, if they lie there as they are."""
        way = self._ways.get(name)
        if way is None:
            return self._source.place(name)
        if isinstance(way, _Stack) or way.transposed or (there := self._source.place(way.fused)) is None:
            return None
        spec = self._source.specs[way.fused]
        before = (way.expert * spec.shape[1] + way.first) * spec.shape[2]
        return there[0], there[1] + before * spec.dtype.itemsize

    def demand(self, name: str) -> Demand:
        """The tensor's own bytes, and one expert's beside them."""
        spec = self.specs[name]
        return Demand(spec.nbytes, spec.row_elements * spec.dtype.itemsize)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows as they would be stored."""
        way = self._ways.get(name)
        if way is None:
            return self._source.read(name, start, stop)
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        if isinstance(way, _Stack):
            found = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype.torch)
            for row, parts in zip(found, way.parts[start:stop], strict=True):
                expert = torch.cat([self._source.read(part) for part in parts])
                row.copy_(expert.T if way.transposed else expert)
            return found
        expert = self._source.read(way.fused, way.expert, way.expert + 1)[0]
        return (expert.T if way.transposed else expert)[way.first + start : way.first + stop].contiguous()


def viewed(
    reference: Mapping[str, Spec], source: Source, wanted: Iterable[str], spelling: Callable[[str], str]
) -> tuple[ExpertsView, dict[str, str], set[str]] | None:
    """A view of the source with experts as the reference has them, the view's name for each of the reference's, and the names that it uses up.

    None where the source does not keep them the other way. `wanted` are the reference's names that the source has not.

    Raises:
        AlignmentError: a fused tensor can be read in both orientations; both are named.
    """
    ways: dict[str, _Stack | _Take] = {}
    fused = _fused(source.specs, spelling)
    single = _single(source.specs, spelling)
    wanted = list(wanted)
    theirs = _fused({name: reference[name] for name in wanted}, spelling)
    for name in wanted:
        way: _Stack | _Take | None
        if (match := _FUSED.match(name)) and (stem := spelling(match[1])) in single:
            way = _stacked(name, reference, match[2], stem, theirs[stem], single[stem], source.label)
        elif (match := _SINGLE.match(name)) and (stem := spelling(match[1])) in fused:
            way = _taken(name, reference, _ROLES[match[3]], int(match[2]), stem, fused[stem], source)
        else:
            continue
        if way is not None:
            ways[name] = way
    if not ways:
        return None
    used = {
        name
        for way in ways.values()
        for name in ([way.fused] if isinstance(way, _Take) else [one for parts in way.parts for one in parts])
    }
    specs = {}
    for name, seen in ways.items():
        origin = source.specs[seen.fused if isinstance(seen, _Take) else seen.parts[0][0]]
        specs[name] = Spec(name=name, shape=reference[name].shape, dtype=origin.dtype, file=origin.file)
    return ExpertsView(source, specs, ways), {name: name for name in ways}, used


def with_fused(source: Source) -> Source:
    """The source with its single experts in one tensor too, `[expert, out, in]`, as live models of transformers have them; as it is without any."""
    specs: dict[str, Spec] = {}
    ways: dict[str, _Stack | _Take] = {}
    for stem, single in _single(source.specs, str).items():
        experts = 1 + max(number for number, _ in single)
        for part, roles in _HELD.items():
            if any((number, role) not in single for number in range(experts) for role in roles):
                continue
            shapes = {single[number, role].shape for number in range(experts) for role in roles}
            if len(shapes) == 1:
                (rows, columns), first = shapes.pop(), single[0, roles[0]]
                name, shape = f"{stem}.{part}", (experts, len(roles) * rows, columns)
                specs[name] = Spec(name=name, shape=shape, dtype=first.dtype, file=first.file)
                parts = tuple(tuple(single[number, role].name for role in roles) for number in range(experts))
                ways[name] = _Stack(parts, transposed=False)
    return ExpertsView(source, specs, ways) if ways else source


def _fused(specs: Mapping[str, Spec], spelling: Callable[[str], str]) -> dict[str, dict[str, Spec]]:
    """By mixture, its fused tensors."""
    found: dict[str, dict[str, Spec]] = {}
    for name, spec in specs.items():
        if (match := _FUSED.match(name)) and len(spec.shape) == 3:
            found.setdefault(spelling(match[1]), {})[match[2]] = spec
    return found


def _single(specs: Mapping[str, Spec], spelling: Callable[[str], str]) -> dict[str, dict[tuple[int, str], Spec]]:
    """By mixture, the matrix of each expert and role."""
    found: dict[str, dict[tuple[int, str], Spec]] = {}
    for name, spec in specs.items():
        if (match := _SINGLE.match(name)) and len(spec.shape) == 2:
            found.setdefault(spelling(match[1]), {})[int(match[2]), _ROLES[match[3]]] = spec
    return found


def _transposed(fused: Mapping[str, Spec], shapes: Mapping[str, Shape], label: str) -> bool | None:
    """Whether fused tensors are `[expert, in, out]`, of single matrices of these shapes by role; None where they are neither.

    Raises:
        AlignmentError: they can be both.
    """
    readings = []
    for transposed in (False, True):
        good = True
        for part, spec in fused.items():
            if not all(role in shapes for role in _HELD[part]):
                continue
            out, inner = sum(shapes[role][0] for role in _HELD[part]), shapes[_HELD[part][0]][1]
            good = good and spec.shape[1:] == ((inner, out) if transposed else (out, inner))
        if good:
            readings.append(transposed)
    if len(readings) == 2:
        names = ", ".join(repr(spec.name) for spec in fused.values())
        raise AlignmentError(
            f"{label}: {names} fit two conversions to single experts, [expert, out, in] and [expert, in, out]: their sides are equal. "
            "Save the model with the library of the other one, so that both keep their experts alike."
        )
    return readings[0] if readings else None


def _stacked(
    name: str,
    reference: Mapping[str, Spec],
    part: str,
    stem: str,
    fused: Mapping[str, Spec],
    single: Mapping[tuple[int, str], Spec],
    label: str,
) -> _Stack | None:
    shapes = {role: spec.shape for (_, role), spec in single.items()}
    transposed = _transposed(fused, shapes, label)
    experts = reference[name].shape[0]
    if transposed is None or any((number, role) not in single for number in range(experts) for role in _HELD[part]):
        return None
    return _Stack(tuple(tuple(single[number, role].name for role in _HELD[part]) for number in range(experts)), transposed)


def _taken(
    name: str, reference: Mapping[str, Spec], role: str, expert: int, stem: str, fused: Mapping[str, Spec], source: Source
) -> _Take | None:
    part = "down_proj" if role == "down" else "gate_up_proj"
    if part not in fused or expert >= fused[part].shape[0]:
        return None
    shapes = {
        _ROLES[match[3]]: spec.shape for one, spec in reference.items() if (match := _SINGLE.match(one)) and int(match[2]) == 0
    }
    transposed = _transposed(fused, shapes, source.label)
    if transposed is None:
        return None
    rows = reference[name].shape[0]
    first = rows if role == "up" else 0
    return _Take(fused[part].name, expert, first, first + rows, transposed)
