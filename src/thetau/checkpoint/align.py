"""Fitting checkpoints to each other: names, shapes, dtypes, ties. Nothing is left out without a note; all problems come together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from thetau._lazy import torch
from thetau.checkpoint.companions import compared
from thetau.checkpoint.dtypes import dtype_name
from thetau.checkpoint.memory import ZERO_3
from thetau.checkpoint.names import Matched, match
from thetau.checkpoint.naming import Kind, is_statistic, kind_of
from thetau.checkpoint.source import Source, Spec
from thetau.checkpoint.ties import Ties
from thetau.errors import AlignmentError, nearest

SHOWN = 8  # problems of one kind that a message spells out
STATISTIC = "running statistics or tables, no weights,"
REMEDY = "Compute them anew on data after a merge, where the model has batch norms."
TIED = (
    " If a head is tied to the embedding there, give the folder with its config.json, which says so (`tie_word_embeddings`): "
    "equal values alone do not."
)


@dataclass(frozen=True)
class Alignment:
    """How sources map onto the reference's names.

    `names` take part in arithmetic; `kept` are the reference's other tensors and why they do not; `maps[key][name]` is the name in
    the source of that key, absent where a partial source has no such tensor.

    - `specs`: the reference's tensors, and those that it ties to others and does not store, where some source has one of its own.
    - `tied`: copies of another tensor, in all sources; the two are one in all arithmetic, and both come out alike.
    - `own`: what the reference ties and comes out as a tensor of its own.
    - `alarms`: where configs differ from the reference's, for warnings.
    - `views`: by a source's key, the source in the reference's layout, where it keeps some tensors otherwise.
    """

    specs: Mapping[str, Spec]
    names: tuple[str, ...]
    kept: Mapping[str, str]
    maps: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    views: Mapping[str, Source] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()

    def seen(self, source: Source) -> Source:
        """A source as it stands under the reference's names and layout."""
        return self.views.get(source.key, source)


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
        sources: all weights that take part; the base is known among them by its tensors being the reference.
        exclude: shell-style patterns of tensors that do not take part: the output keeps the base's, and others' are left out.
        shapes: whether shapes and dtypes must agree; those of evidence need not.

    Raises:
        AlignmentError: missing or extra tensors that `exclude` does not name, other shapes, or a pattern that matches nothing.
    """
    found = _Findings()
    everything = [*reference, *(name for source in sources for name in source.specs)]
    if shapes:  # evidence need not hold what is excluded
        found.problems += check_patterns(exclude, everything, "exclude")
    base = next((source for source in sources if source.specs is reference), None)
    alarms: list[str] = []
    for source in sources if base is not None and shapes else ():
        if source is not base and base is not None and source.degree == 1 and not source.children():
            refused, told = compared(base, source)
            found.problems += [refused] if refused is not None else []
            alarms += told
    fits = [_Fit(source, match(reference, source, folder=base.folder if base is not None else None)) for source in sources]
    for fit in fits:
        found.notes += fit.matched.notes
    out = {name for name in reference if matches(name, exclude) or any(matches(fit.theirs(name), exclude) for fit in fits)}
    for fit in fits:
        fit.gone = {name for name in fit.source.specs if matches(name, exclude)} | {fit.theirs(name) for name in out}
        found.problems += [said for said, names in fit.matched.problems.items() if not fit.gone.issuperset(names)]
    tying = _Tying(reference, base, label, fits, found) if shapes else None
    if tying is not None:
        tying.settle(out)
    specs = {**reference, **(tying.added if tying is not None else {})}
    excluded = [name for name in reference if name in out]
    kept = dict.fromkeys(excluded, "excluded by the recipe")
    for fit in fits:
        _complete(specs, label, fit, out, found, shapes)
    maps = {fit.source.key: fit.mapping for fit in fits}
    for name, spec in reference.items():
        if name not in kept and not spec.dtype.is_floating_point:
            kept[name] = _buffer(name, spec, sources, maps)
        elif name not in kept and is_statistic(name):
            kept[name] = STATISTIC
    found.several(f"{label}: {len(excluded)} tensors are excluded and stay the base's", excluded, "", found.notes)
    statistics = [name for name, why in kept.items() if why == STATISTIC]
    buffers = [f"{name} ({why})" for name, why in kept.items() if name not in excluded and why != STATISTIC]
    found.several(
        f"{label}: {len(buffers)} tensors are not floating-point and are copied from the base", buffers, "", found.notes
    )
    found.several(f"{label}: {len(statistics)} tensors are {STATISTIC} and stay the base's", statistics, REMEDY, found.notes)
    if found.problems:
        raise AlignmentError("\n".join(dict.fromkeys(found.problems)))
    tied = {name: keeper for name, keeper in tying.copies.items() if name not in kept} if tying is not None else {}
    names = tuple(name for name in specs if name not in kept and name not in tied)
    own = tying.own if tying is not None else ()
    views = {fit.source.key: fit.matched.view for fit in fits if fit.matched.view is not None}
    return Alignment(specs, names, kept, maps, tuple(found.notes), tied, tuple(own), views, tuple(alarms))


@dataclass
class _Fit:
    """One source, how its names stand for the reference's, and its excluded names in either spelling."""

    source: Source
    matched: Matched
    gone: set[str] = field(default_factory=set)
    mapping: dict[str, str] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)  # its names that mean something, besides those that are mapped

    def __post_init__(self) -> None:
        self.mapping = self.matched.names

    def theirs(self, name: str) -> str:
        """What the source calls, or would call, a tensor of the reference."""
        return self.matched.theirs(name)

    def spec(self, name: str) -> Spec:
        """Of one of its names, or of its view's."""
        return (self.matched.view or self.source).specs[name]


class _Tying:
    """Tied tensors of the base and of the others, brought together.

    - `copies`: names of the reference that are copies of another one in every source: one tensor, of which the output stores as many copies.
    - `added`: tensors that the base does not store, since it ties them, and of which some source has one of its own.
    - `own`: names that the base ties and that come out as tensors of their own.
    """

    def __init__(
        self, reference: Mapping[str, Spec], base: Source | None, label: str, fits: Sequence[_Fit], found: _Findings
    ) -> None:
        self.label, self.fits, self.found, self.base = label, fits, found, base
        self.added: dict[str, Spec] = {}
        self.own: list[str] = []
        self.copies: dict[str, str] = {}
        self._reference = reference
        heir = Ties(base) if base is not None else None
        self._ties = {fit.source.key: Ties(fit.source, heir if fit.source is not base else None) for fit in fits}
        if heir is not None:
            self.copies = heir.copies()

    def settle(self, out: set[str]) -> None:
        """Find which copies are torn apart, which names are new, and what stands for what each source does not store."""
        base = self.base
        if base is None:
            return
        for name, keeper in list(self.copies.items()):
            torn = [fit for fit in self.fits if self._torn(fit, name, keeper)]
            if torn or (name in out) != (keeper in out):
                del self.copies[name]
                self.own.append(name)
                self._say(torn, name, keeper)
        for fit in self.fits:
            if fit.source is not base:
                self._new(fit, out)
        for name in [*self._reference, *self.added]:
            for fit in self.fits:
                self._fill(fit, name)
        for name, keeper in self.copies.items():
            for fit in self.fits:  # one identity: whatever the other copy holds
                if name in fit.mapping and keeper in fit.mapping:
                    fit.spent.add(fit.mapping[name])
                if keeper in fit.mapping:
                    fit.mapping[name] = fit.mapping[keeper]
                else:
                    fit.mapping.pop(name, None)

    def _torn(self, fit: _Fit, name: str, keeper: str) -> bool:
        """Whether a source changes two names apart that the base ties."""
        here, there = fit.mapping.get(name), fit.mapping.get(keeper)
        if here is None or there is None or here == there:
            return fit.source.apart and (here is None) != (there is None)
        if fit.source.degree == 1 and self._ties[fit.source.key].words is False:
            return True
        return here in fit.source.specs and there in fit.source.specs and not self._ties[fit.source.key].agree(here, there)

    def _new(self, fit: _Fit, out: set[str]) -> None:
        """Names of a source that the base ties and does not store."""
        base = self.base
        assert base is not None
        used = set(fit.mapping.values()) | fit.matched.used
        for theirs, spec in fit.source.specs.items():
            if theirs in used or theirs in fit.gone or not spec.dtype.is_floating_point:
                continue
            mine = self._ties[fit.source.key].keeper(theirs)
            if mine in used and mine in fit.source.specs and self._ties[fit.source.key].agree(theirs, mine):
                fit.spent.add(theirs)
                self.found.notes.append(f"{fit.source.label}: {theirs!r} is tied to {mine!r} and adds nothing.")
                continue
            name = fit.matched.ours(theirs)
            keeper = self._ties[base.key].keeper(name)
            if keeper is None or keeper not in self._reference or spec.shape != self._reference[keeper].shape:
                continue
            embedding = fit.mapping.get(keeper)
            ties = self._ties[fit.source.key]
            tied = embedding is not None and ties.words is not False and ties.agree(theirs, embedding)
            fit.spent.add(theirs)
            if tied or (embedding is None and not fit.source.partial):
                if embedding is None:
                    fit.mapping[keeper] = theirs
                self.found.notes.append(f"{fit.source.label}: {theirs!r} is tied to {embedding or keeper!r} and adds nothing.")
                continue
            fit.mapping[name] = theirs
            self._add(name, keeper, fit)
        head = self._ties[base.key].head() if fit.source.apart else None
        if head is not None and head[0] not in self.added and head[1] in fit.mapping and head[0] not in out:
            self._add(*head, fit)  # the embedding was trained and the head was not

    def _add(self, name: str, keeper: str, fit: _Fit) -> None:
        if name not in self.added:
            spec = self._reference[keeper]
            self.added[name] = replace(spec, name=name)
            self.own.append(name)
        self._say([fit], name, keeper)

    def _fill(self, fit: _Fit, name: str) -> None:
        """What a source that does not store a name has for it: what the name is tied to there."""
        base = self.base
        assert base is not None
        if name in fit.mapping or fit.theirs(name) in fit.gone:
            return
        source = fit.source
        if source.partial:
            keeper = self.copies.get(name) or (self._ties[base.key].keeper(name) if name in self.own else None)
            if keeper is not None and keeper in fit.mapping and not source.apart:
                fit.mapping[name] = fit.mapping[keeper]
            return
        mine = self._ties[source.key].keeper(fit.theirs(name))
        if mine is None or mine not in source.specs:
            return
        spec = self._reference.get(name) or self.added[name]
        if source.specs[mine].shape != spec.shape:
            return
        fit.mapping[name] = mine
        if source is not base and not source.children():
            self.found.notes.append(f"{source.label}: has no {name!r}; it is tied to {mine!r}, which is used for it.")

    def _say(self, torn: Sequence[_Fit], name: str, keeper: str) -> None:
        for fit in torn:
            self.found.notes.append(
                f"{fit.source.label}: {name!r}, which {self.label} ties to {keeper!r}, is a tensor of its own there; so it is in the output."
            )


def _complete(specs: Mapping[str, Spec], label: str, fit: _Fit, out: Set[str], found: _Findings, shapes: bool) -> None:
    """Say what a source lacks, what it has beyond the reference, and what has another shape."""
    source, mapping, gone = fit.source, fit.mapping, fit.gone
    missing = [name for name in specs if name not in mapping and name not in out and fit.theirs(name) not in gone]
    buffers = [name for name in missing if not specs[name].dtype.is_floating_point or is_statistic(name)]
    missing = [name for name in missing if name not in buffers]
    if shapes and not source.partial:
        head = f"{source.label}: lacks {len(buffers)} buffers of {label}, which are not merged"
        found.several(head, buffers, "", found.notes)
        tieable = any(Ties(source).ranked(name) for name in missing)
        found.several(
            f"{source.label}: lacks {len(missing)} tensors of {label}",
            missing,
            "Give a complete checkpoint, or leave them out: `exclude: [pattern]` (`--exclude`). If they are called otherwise there, say how: "
            "`rename: {pattern: name}` (`--rename`)." + (TIED if tieable else ""),
            found.problems,
        )
    used = set(mapping.values()) | fit.matched.used | fit.spent
    extra = [name for name in source.specs if name not in used and name not in gone]
    integer = [name for name in extra if not source.specs[name].dtype.is_floating_point or is_statistic(name)]
    found.several(f"{source.label}: {len(integer)} buffers that {label} lacks are left out", integer, "", found.notes)
    extra = [name for name in extra if name not in integer]
    hint = nearest(extra[0], specs) if extra else ""
    found.several(
        f"{source.label}: has {len(extra)} tensors that {label} lacks",
        extra,
        f"If they are a task's head, leave them out: `exclude: [pattern]` (`--exclude`).{hint}",
        found.problems,
    )
    dropped = [name for name in source.specs if name not in used - gone and name in gone]
    found.several(f"{source.label}: {len(dropped)} tensors are excluded and left out", dropped, "", found.notes)
    for name, theirs in mapping.items():
        if shapes and name in specs and name not in out and theirs not in gone and not is_statistic(name):
            _check(specs[name], label, fit.spec(theirs), source.label, found)


def _check(want: Spec, label: str, got: Spec, source: str, found: _Findings) -> None:
    if got.dtype.is_floating_point != want.dtype.is_floating_point:
        found.problems.append(
            f"{source}: {got.name!r} is {dtype_name(got.dtype)} where {label} has {dtype_name(want.dtype)}. "
            "Quantised weights cannot be merged: give the float checkpoint."
        )
    elif got.shape == (0,) != want.shape:
        found.problems.append(f"{source}: {got.name!r} is empty where {label} has {list(want.shape)}. {ZERO_3}")
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


def _buffer(name: str, spec: Spec, sources: Sequence[Source], maps: Mapping[str, Mapping[str, str]]) -> str:
    held = [(source, maps[source.key][name]) for source in sources if name in maps[source.key]]
    same = all(_equal(*held[0], *other) for other in held[1:])
    return f"{dtype_name(spec.dtype)}, {'the same in all' if same else 'different among the models'}"


def _equal(a: Source, name: str, b: Source, theirs: str) -> bool:
    """Whether two tensors hold the same; bytes tell it of integers, and mostly of others too."""
    ours, other = a.specs[name], b.specs[theirs]
    if ours.shape != other.shape:
        return False
    if ours.dtype == other.dtype and (not ours.dtype.is_floating_point or a.raw(name) == b.raw(theirs)):
        return a.raw(name) == b.raw(theirs)
    return torch.equal(a.read(name), b.read(theirs))
