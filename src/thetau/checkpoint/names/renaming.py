"""Renames that a user gives: regular expressions, replaced in the names of a checkpoint before anything else looks at them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from thetau.checkpoint.arranged import Arranged, Piece
from thetau.checkpoint.source import Source
from thetau.errors import AlignmentError, RecipeError


def compiled(rename: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """The expressions, in order.

    Raises:
        RecipeError: all that are no regular expressions.
    """
    problems, found = [], []
    for pattern, replacement in rename.items():
        try:
            found.append((re.compile(pattern), replacement))
        except re.error as error:
            problems.append(f"{pattern!r} must be a regular expression. Got one that cannot be read ({error}).")
    if problems:
        raise RecipeError(problems, "rename")
    return found


def renamed(source: Source, rename: Mapping[str, str]) -> Source:
    """A checkpoint with every pattern replaced in its tensors' names, in the order of the patterns, as `re.sub` does; nothing is copied.

    Raises:
        RecipeError: a pattern is no regular expression, or its replacement names a group that it has not.
        AlignmentError: a pattern fits no name, or two tensors get one name; both are named.
    """
    if not rename:
        return source
    names = new_names(source.label, source.specs, rename)
    spelling = {**names, **_unstored(source, rename)}
    back = {name: own for own, name in names.items()}
    return Arranged(
        {name: Piece(source, own) for name, own in back.items()},
        label=source.label,
        degree=source.degree,
        partial=source.partial,
        folder=source.folder,
        metadata=source.metadata,
        files=source.files,
        quantised=source.quantised,
        coded=frozenset(names[own] for own in source.coded),
        twins={spelling[own]: names[kept] for own, kept in source.twins.items()},
    )


def new_names(label: str, own: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Own name → new name, every pattern replaced in order.

    Raises:
        RecipeError: a pattern is no regular expression, or its replacement names a group that it has not.
        AlignmentError: a pattern fits no name, or two names become one; both are named.
    """
    names = {name: name for name in own}
    for pattern, replacement in compiled(rename):
        if not any(pattern.search(name) for name in names.values()):
            raise AlignmentError(f"{label}: rename: the pattern {pattern.pattern!r} fits no name. Leave it out, or mend it.")
        names = {name: _replaced(pattern, replacement, said) for name, said in names.items()}
    back: dict[str, str] = {}
    for name, said in names.items():
        if said in back:
            raise AlignmentError(
                f"{label}: rename gives {back[said]!r} and {name!r} one name, {said!r}. Make the pattern narrower."
            )
        back[said] = name
    return names


def _replaced(pattern: re.Pattern[str], replacement: str, name: str) -> str:
    try:
        return pattern.sub(replacement, name)
    except (re.error, IndexError) as error:
        raise RecipeError(
            [f"{pattern.pattern!r}: the replacement {replacement!r} does not fit it ({error})."], "rename"
        ) from error


def _unstored(source: Source, rename: Mapping[str, str]) -> dict[str, str]:
    """New names of tensors that stand for others and are not stored."""
    found = {name: name for name in source.twins}
    for pattern, replacement in compiled(rename):
        found = {name: _replaced(pattern, replacement, said) for name, said in found.items()}
    return found
