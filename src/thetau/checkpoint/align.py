"""Fitting checkpoints to each other: names, shapes, dtypes, ties. Nothing is left out without a note; all problems come together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from thetau.checkpoint.dtypes import dtype_name
from thetau.checkpoint.naming import Kind, kind_of
from thetau.checkpoint.source import Source, Spec
from thetau.errors import AlignmentError, nearest

SHOWN = 8  # problems of one kind that a message spells out
COMPARE_ROWS = 4096


@dataclass(frozen=True)
class Alignment:
    """How sources map onto the reference's names.

    `names` take part in arithmetic; `kept` are the reference's other tensors and why they do not; `maps[key][name]` is the name in
    the source of that key, absent where a partial source has no such tensor.
    """

    specs: Mapping[str, Spec]
    names: tuple[str, ...]
    kept: Mapping[str, str]
    maps: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def several(self, head: str, names: Sequence[str], tail: str, into: list[str]) -> None:
        into += named(head, names, tail)


def named(head: str, names: Sequence[str], tail: str = "") -> list[str]:
    """One sentence about some tensors that names the first of them; none where there are none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{head}: {', '.join(repr(n) for n in names[:SHOWN])}{more}. {tail}".rstrip()] if names else []


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name fits any of the shell-style patterns (`*`, `?`, `[...]`)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str) -> list[str]:
    """A problem for each pattern that matches no name."""
    known = dict.fromkeys(names)
    return [
        f"{where}: the pattern {p!r} matches no tensor.{nearest(p, known)}"
        for p in patterns
        if p not in known and not any(fnmatchcase(n, p) for n in known)
    ]


def align(
    reference: Mapping[str, Spec], label: str, sources: Sequence[Source], exclude: Sequence[str] = (), *, shapes: bool = True
) -> Alignment:
    """Map every source's names onto the reference's.

    Args:
        reference: the base's tensors, or those of a task vector where there is no base.
        label: what messages call the reference.
        sources: all weights that take part.
        exclude: shell-style patterns of tensors that do not take part: the output keeps the base's, and others' are left out.
        shapes: whether shapes and dtypes must agree; those of evidence need not.

    Raises:
        AlignmentError: missing or extra tensors that `exclude` does not name, other shapes, or a pattern that matches nothing.
    """
    found = _Findings()
    everything = [*reference, *(name for source in sources for name in source.specs)]
    if shapes:  # evidence need not hold what is excluded
        found.problems += check_patterns(exclude, everything, "exclude")
    renames = {source.key: _prefix(reference, source, found) for source in sources}
    out = {
        name for name in reference if matches(name, exclude) or any(matches(rename(name), exclude) for rename in renames.values())
    }
    excluded = [name for name in reference if name in out]
    kept = dict.fromkeys(excluded, "excluded by the recipe")
    maps = {}
    for source in sources:
        rename = renames[source.key]
        gone = out | {name for name in source.specs if matches(name, exclude)} | {rename(name) for name in out}
        maps[source.key] = _map_names(reference, label, source, sources, rename, gone, found, shapes)
    for name, spec in reference.items():
        if name not in kept and not spec.dtype.is_floating_point:
            kept[name] = _buffer(name, spec, sources, maps)
    found.several(f"{label}: {len(excluded)} tensors are excluded and stay the base's", excluded, "", found.notes)
    buffers = [f"{name} ({why})" for name, why in kept.items() if name not in excluded]
    found.several(
        f"{label}: {len(buffers)} tensors are not floating-point and are copied from the base", buffers, "", found.notes
    )
    if found.problems:
        raise AlignmentError("\n".join(found.problems))
    names = tuple(name for name in reference if name not in kept)
    return Alignment(reference, names, kept, maps, tuple(found.notes))


def _map_names(
    reference: Mapping[str, Spec],
    label: str,
    source: Source,
    sources: Sequence[Source],
    rename: _Rename,
    gone: Set[str],
    found: _Findings,
    shapes: bool,
) -> dict[str, str]:
    """Reference name → source name; `gone` are the excluded names, in either spelling."""
    mapping = {name: rename(name) for name in reference if rename(name) in source.specs}
    missing = [name for name in reference if name not in mapping and name not in gone]
    buffers = [name for name in missing if not reference[name].dtype.is_floating_point]
    if not source.partial:
        head = f"{source.label}: lacks {len(buffers)} buffers of {label}, which are not merged"
        found.several(head, buffers, "", found.notes)
    missing = [name for name in missing if name not in buffers]
    if missing and not source.partial:
        for name in list(missing):
            twin = _twin_elsewhere(name, [other for other in sources if other is not source])
            if twin is not None and rename(twin) in source.specs:
                mapping[name] = rename(twin)
                missing.remove(name)
                found.notes.append(f"{source.label}: has no {name!r}; it is tied to {twin!r}, which is used for it.")
        found.several(
            f"{source.label}: lacks {len(missing)} tensors of {label}",
            missing,
            "Give a complete checkpoint, or leave them out: `exclude: [pattern]` (`--exclude`).",
            found.problems,
        )
    used = set(mapping.values())
    extra = [name for name in source.specs if name not in used and name not in gone]
    ties = {name: twin for name in extra if (twin := _twin(source, name)) in used}
    for name, twin in ties.items():
        found.notes.append(f"{source.label}: {name!r} is tied to {twin!r} and adds nothing.")
    integer = [name for name in extra if not source.specs[name].dtype.is_floating_point]
    found.several(f"{source.label}: {len(integer)} buffers that {label} lacks are left out", integer, "", found.notes)
    extra = [name for name in extra if name not in ties and name not in integer]
    hint = nearest(extra[0], reference) if extra else ""
    found.several(
        f"{source.label}: has {len(extra)} tensors that {label} lacks",
        extra,
        f"If they are a task's head, leave them out: `exclude: [pattern]` (`--exclude`).{hint}",
        found.problems,
    )
    dropped = [name for name in source.specs if name not in used and name in gone]
    found.several(f"{source.label}: {len(dropped)} tensors are excluded and left out", dropped, "", found.notes)
    for name, theirs in mapping.items():
        if shapes and name not in gone:
            _check(reference[name], label, source.specs[theirs], source.label, found)
    return mapping


def _check(want: Spec, label: str, got: Spec, source: str, found: _Findings) -> None:
    if got.dtype.is_floating_point != want.dtype.is_floating_point:
        found.problems.append(
            f"{source}: {got.name!r} is {dtype_name(got.dtype)} where {label} has {dtype_name(want.dtype)}. "
            "Quantised weights cannot be merged: give the float checkpoint."
        )
    elif got.shape != want.shape:
        table = kind_of(want.name, want.shape) in (Kind.EMBEDDING, Kind.HEAD)
        vocabulary = table and len(want.shape) == len(got.shape) == 2 and got.shape[1] == want.shape[1]
        why = (
            f"another vocabulary: {got.shape[0]} rows instead of {want.shape[0]}"
            if vocabulary
            else f"shape {list(got.shape)} instead of {list(want.shape)}"
        )
        found.problems.append(
            f"{source}: {got.name!r} has {why} (in {label}). Models must share one architecture; leave such tensors out with `exclude`."
        )


class _Rename:
    """Reference name → source name, by a leading part that one of them has and the other has not."""

    def __init__(self, strip: str = "", add: str = "") -> None:
        self.strip, self.add = strip, add

    def __call__(self, name: str) -> str:
        return self.add + (name[len(self.strip) :] if name.startswith(self.strip) else name)


def _prefix(reference: Mapping[str, Spec], source: Source, found: _Findings) -> _Rename:
    """`bert.encoder…` against `encoder…`: found only where the plain names do not meet at all."""
    if any(name in source.specs for name in reference):
        return _Rename()
    heads = {name[: -len(other) - 1] for name in source.specs for other in list(reference)[:3] if name.endswith("." + other)}
    for head in sorted(heads):
        if sum(f"{head}.{name}" in source.specs for name in reference) > len(reference) // 2:
            found.notes.append(f"{source.label}: its names start with {head + '.'!r}, which is taken off.")
            return _Rename(add=head + ".")
    ours = {name[: -len(other) - 1] for name in reference for other in list(source.specs)[:3] if name.endswith("." + other)}
    for head in sorted(ours):
        if (
            sum(name.startswith(head + ".") and name[len(head) + 1 :] in source.specs for name in reference)
            > len(source.specs) // 2
        ):
            found.notes.append(f"{source.label}: its names lack the leading {head + '.'!r}, which is put before them.")
            return _Rename(strip=head + ".")
    return _Rename()


def _same(source: Source, a: str, b: str) -> bool:
    rows = source.specs[a].rows
    return all(
        torch.equal(
            source.read(a, start, min(start + COMPARE_ROWS, rows)), source.read(b, start, min(start + COMPARE_ROWS, rows))
        )
        for start in range(0, rows, COMPARE_ROWS)
    )


def _twin(source: Source, name: str) -> str | None:
    """Another tensor of the same source with the very same values: a tied weight that was stored twice."""
    spec = source.specs[name]
    if len(spec.shape) < 2 or not spec.elements:
        return None
    for other, theirs in source.specs.items():
        alike = other != name and theirs.shape == spec.shape and theirs.dtype == spec.dtype
        if alike and torch.equal(source.read(name, 0, 1), source.read(other, 0, 1)) and _same(source, name, other):
            return other
    return None


def _twin_elsewhere(name: str, sources: Sequence[Source]) -> str | None:
    for source in sources:
        if name in source.specs and (twin := _twin(source, name)) is not None:
            return twin
    return None


def _buffer(name: str, spec: Spec, sources: Sequence[Source], maps: Mapping[str, Mapping[str, str]]) -> str:
    values = [source.read(maps[source.key][name]) for source in sources if name in maps[source.key]]
    same = all(value.shape == values[0].shape and torch.equal(value, values[0]) for value in values[1:])
    return f"{dtype_name(spec.dtype)}, {'the same in all' if same else 'different among the models'}"
