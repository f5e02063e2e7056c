"""Matching the names of two checkpoints: plain names first, then spellings, then what a library says; each name is given once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

from thetau.checkpoint.names.experts import viewed
from thetau.checkpoint.names.library import library_of
from thetau.checkpoint.names.spelling import bare, spelled, unwrapped
from thetau.checkpoint.source import Source, Spec
from thetau.errors import AlignmentError

SHOWN = 4
_SAMPLED = 8  # names of which a leading part is guessed
Spelling = Callable[[str], str]


@dataclass
class Matched:
    """How one checkpoint's names stand for another's.

    - `names`: the reference's name → the source's, or the view's.
    - `used`: the source's own names that stand for something; more than `names` has where a view puts several together.
    - `view`: the source with tensors in the reference's layout, where some are kept otherwise.
    - `lead`: `(taken off, put before)` the reference's names where one side's names have a leading part that the other's have not.
    """

    names: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    view: Source | None = None
    lead: tuple[str, str] = ("", "")
    notes: list[str] = field(default_factory=list)
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)  # a sentence → the source's names that it is about

    def theirs(self, name: str) -> str:
        """What the source would call a tensor of the reference that it may not have."""
        return self.names.get(name) or self.lead[1] + name.removeprefix(self.lead[0])

    def ours(self, name: str) -> str:
        """What the reference would call a tensor of the source that it may not have."""
        known = {theirs: mine for mine, theirs in self.names.items()}
        return known.get(name) or self.lead[0] + name.removeprefix(self.lead[1])


@dataclass
class Names:
    """A checkpoint's names, in which other spellings are looked up. `folder` is where its config lies, if anywhere."""

    names: Iterable[str]
    folder: Path | None = None

    def find(self, name: str, *, among: str = "the base", leading: bool = True) -> str | None:
        """The checkpoint's name of a tensor that another one, an adapter or a live model calls `name`; None where it has none.

        `leading` is whether one of the two may have a word before it that the other has not.

        Raises:
            AlignmentError: several fit; they are named.
        """
        if name in self._known:
            return name
        for spelling in self._ways():
            forms = self._forms(spelling)
            said = spelling(name)
            found = forms.get(said, [])
            if not found and leading:
                longer = [
                    one
                    for form, ones in forms.items()
                    if form.endswith(f".{said}") and "." not in form[: -len(said) - 1]
                    for one in ones
                ]
                shorter = forms.get(said.split(".", 1)[-1], []) if "." in said else []
                found = longer or shorter
            if len(found) > 1:
                raise AlignmentError(
                    f"{name!r} stands for {found[0]!r} or {found[1]!r} of {among}: two conversions fit it. Say which with `rename`."
                )
            if found:
                return found[0]
        return None

    def _ways(self) -> Iterable[Spelling]:
        yield from (unwrapped, spelled, bare)
        if self._live is not None:
            yield self._live

    @cached_property
    def _live(self) -> Spelling | None:
        library = library_of(self.folder)
        return None if library is None else lambda name: library.live(unwrapped(name))

    def _forms(self, spelling: Spelling) -> dict[str, list[str]]:
        if spelling not in self._cache:
            forms: dict[str, list[str]] = {}
            for name in self.names:
                forms.setdefault(spelling(name), []).append(name)
            self._cache[spelling] = forms
        return self._cache[spelling]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _cache(self) -> dict[Spelling, dict[str, list[str]]]:
        return {}


_NAMES: WeakKeyDictionary[Source, Names] = WeakKeyDictionary()  # an adapter asks for hundreds of one base's names


def names_of(source: Source) -> Names:
    """A checkpoint's names, to look others up in."""
    if source not in _NAMES:
        _NAMES[source] = Names(source.specs, source.folder)
    return _NAMES[source]


@dataclass(frozen=True)
class _Way:
    """One way to spell both sides' names."""

    ours: Spelling
    theirs: Spelling
    by: str


def match(reference: Mapping[str, Spec], source: Source, *, folder: Path | None = None) -> Matched:
    """Match a source's names with a reference's, whose config lies in `folder`. What finds no counterpart is left to the caller."""
    found = Matched({name: name for name in reference if name in source.specs})
    found.used = set(found.names.values())
    left = [name for name, spec in reference.items() if name not in found.names and spec.dtype.is_floating_point]
    more = [name for name, spec in source.specs.items() if name not in found.used and spec.dtype.is_floating_point]
    if not left or not more:
        return found
    best: tuple[dict[str, str], tuple[str, str], _Way, dict[str, tuple[str, ...]]] = ({}, ("", ""), _Way(str, str, ""), {})
    ours = [name for name in reference if name not in found.names]
    theirs = [name for name in source.specs if name not in found.used]
    met = len(found.names) > min(len(reference), len(source.specs)) // 2
    for way in _ways(folder, source):
        pairs, lead, problems = _paired(ours, theirs, way, guess=not met)
        if len(pairs) > len(best[0]) or (problems and not best[0] and not best[3]):
            best = (pairs, lead, way, problems)
        if all(name in best[0] for name in left) or all(name in best[0].values() for name in more):
            break
    pairs, found.lead, way, problems = best
    found.problems = {f"{source.label}: {problem}": names for problem, names in problems.items()}
    found.names = {name: one for name in reference if (one := found.names.get(name) or pairs.get(name)) is not None}
    found.used |= set(pairs.values())
    _tell(found, pairs, way, source.label)
    wanted = [name for name in left if name not in found.names]
    seen = viewed(reference, source, wanted, way.ours if way.by else bare) if wanted and not source.children() else None
    if seen is not None:
        found.view, names, used = seen
        found.names |= names
        found.used |= used
        found.notes.append(
            f"{source.label}: {len(names)} tensors of experts are kept otherwise than in the base; they are read as it has them."
        )
    return found


def _ways(folder: Path | None, source: Source) -> Iterable[_Way]:
    yield _Way(unwrapped, unwrapped, "wrappers and old words")
    yield _Way(spelled, spelled, "the words of two versions of a library")
    yield _Way(bare, bare, "the words before the layers")
    mine = library_of(folder)
    yours = library_of(source.folder) or mine
    mine = mine or yours
    if mine is not None and yours is not None:
        yield _Way(
            lambda name: mine.live(unwrapped(name)), lambda name: yours.live(unwrapped(name)), "transformers' own conversions"
        )


def _paired(
    ours: Sequence[str], theirs: Sequence[str], way: _Way, *, guess: bool
) -> tuple[dict[str, str], tuple[str, str], dict[str, tuple[str, ...]]]:
    """Reference → source by one way of spelling; the leading part that was taken off or put before; and what fits twice."""
    mine: dict[str, list[str]] = {}
    yours: dict[str, list[str]] = {}
    for name in ours:
        mine.setdefault(way.ours(name), []).append(name)
    for name in theirs:
        yours.setdefault(way.theirs(name), []).append(name)
    lead = _lead(list(mine), list(yours)) if guess and not any(form in yours for form in mine) else ("", "")
    pairs: dict[str, str] = {}
    problems: dict[str, tuple[str, ...]] = {}
    for form, names in mine.items():
        there = yours.get(lead[1] + form.removeprefix(lead[0]), [])
        if len(names) == len(there) == 1:
            pairs[names[0]] = there[0]
        elif there:
            said = f"{' and '.join(map(repr, there[:SHOWN]))} can stand for {' and '.join(map(repr, names[:SHOWN]))}: two conversions fit."
            problems[f"{said} Say which with `rename`, or leave one out with `exclude`."] = tuple(there)
    return pairs, lead, problems


def _lead(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """What is taken off our names and put before them to have theirs, where that makes more than half of the fewer meet."""
    there, here = set(theirs), set(ours)
    most, best = min(len(ours), len(theirs)) // 2, ("", "")
    for head in sorted({name[: -len(other)] for name in theirs for other in ours[:_SAMPLED] if name.endswith(f".{other}")}):
        count = sum(head + name in there for name in ours)
        if count > most:
            most, best = count, ("", head)
    for head in sorted({name[: -len(other)] for name in ours for other in theirs[:_SAMPLED] if name.endswith(f".{other}")}):
        count = sum(head + name in here for name in theirs)
        if count > most:
            most, best = count, (head, "")
    return best


def _tell(found: Matched, pairs: Mapping[str, str], way: _Way, label: str) -> None:
    if found.lead[1]:
        found.notes.append(f"{label}: its names start with {found.lead[1]!r}, which is taken off.")
    if found.lead[0]:
        found.notes.append(f"{label}: its names lack the leading {found.lead[0]!r}, which is put before them.")
    others = [name for name, theirs in pairs.items() if theirs != found.lead[1] + name.removeprefix(found.lead[0])]
    if others:
        some = ", ".join(f"{pairs[name]!r} for {name!r}" for name in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        found.notes.append(f"{label}: {len(others)} tensors have other names, told by {way.by}: {some}{more}.")
