"""What two models have in common, and what is left of each: nothing needs to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thetau.checkpoint import Alignment, Source, Spec, matches
from thetau.checkpoint.names import match
from thetau.checkpoint.ties import Ties
from thetau.diagnostics.comparison import Misfit
from thetau.errors import AlignmentError
from thetau.vectors import Combination


@dataclass
class Shared:
    """What all have in common. `missing`: names of the reference that some complete source lacks; `stood`: a source's names that stand for
    something of the reference, in whatever shape."""

    alignment: Alignment
    missing: list[str]
    misfits: list[Misfit]
    stood: dict[str, set[str]]
    buffers: list[str]
    notes: list[str]


def share(
    specs: Mapping[str, Spec], reference: Source, sources: Sequence[Source], base: Combination | None, exclude: Sequence[str]
) -> Shared:
    """Names that every complete source has in one shape, and what of the others is left; the base may lack some."""
    maps: dict[str, dict[str, str]] = {}
    views: dict[str, Source] = {}
    stood: dict[str, set[str]] = {}
    missing: dict[str, None] = {}
    misfits: dict[str, Misfit] = {}
    notes: list[str] = []
    counting = {source.key for source in sources}
    for source in [*sources, *(base.sources() if base is not None else [])]:
        if source.key in maps:
            continue
        counts = source.key in counting
        found = match(specs, source, folder=reference.folder)
        notes += [*found.notes, *found.problems]
        held = (found.view or source).specs
        if found.view is not None:
            views[source.key] = found.view
        mapping, ties = dict(found.names), Ties(source)
        for name, spec in specs.items():
            if name in mapping or source.partial or not spec.dtype.is_floating_point:
                continue
            keeper = ties.keeper(found.theirs(name))
            if keeper is not None and keeper in held and held[keeper].shape == spec.shape:
                mapping[name] = keeper
                notes.append(f"{source.label}: has no {name!r}; it is tied to {keeper!r}, which is used for it.")
        stood[source.key] = {*found.used, *mapping.values()}
        for name, spec in specs.items():
            if name not in mapping:
                if counts and not source.partial:
                    missing[name] = None
            elif counts and held[mapping[name]].shape != spec.shape:
                misfits[name] = Misfit(name=name, shape_a=spec.shape, shape_b=held[mapping[name]].shape)
        maps[source.key] = {name: theirs for name, theirs in mapping.items() if held[theirs].shape == specs[name].shape}
    out = {name for name in specs if matches(name, exclude)}
    left = [name for name in specs if name not in missing and name not in misfits and name not in out]
    names = tuple(name for name in left if specs[name].dtype.is_floating_point)
    buffers = [name for name in left if not specs[name].dtype.is_floating_point]
    alignment = Alignment(specs, names, {}, maps, views=views)
    if not names:
        raise AlignmentError(
            f"{reference.label} and {sources[-1].label} have no tensor in common: {len(missing)} names and {len(misfits)} shapes differ. "
            "Give two models of one architecture."
        )
    return Shared(
        alignment,
        [name for name in missing if name not in out],
        [one for name, one in misfits.items() if name not in out],
        stood,
        buffers,
        notes,
    )


def root_of(one: Combination) -> Source:
    """The source whose folder describes it: the one that is no difference to another."""
    whole = [source for source in one.sources() if source.degree == 1]
    return (whole or one.sources())[0]


def stored_as(one: Combination, shared: Shared, name: str) -> Spec | None:
    """As the model itself has it."""
    for source in one.sources():
        theirs = shared.alignment.maps[source.key].get(name)
        if theirs is not None and source.degree == 1:
            return shared.alignment.seen(source).specs[theirs]
    return next(
        (
            shared.alignment.seen(source).specs[theirs]
            for source in one.sources()
            if (theirs := shared.alignment.maps[source.key].get(name)) is not None
        ),
        None,
    )


def unlike(one: Combination, shared: Shared, exclude: Sequence[str]) -> list[str]:
    """A model's own tensors that stand for nothing of the other's, in whatever shape."""
    used = {name for source in one.sources() for name in shared.stood[source.key]}
    return [name for name in one.specs() if name not in used and not matches(name, exclude)]
