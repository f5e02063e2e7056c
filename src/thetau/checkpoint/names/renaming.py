"""Renames that a user gives: regular expressions, replaced in the names of a checkpoint before anything else looks at them."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
    names = {name: name for name in source.specs}
    for pattern, replacement in compiled(rename):
        if not any(pattern.search(name) for name in names.values()):
            raise AlignmentError(
                f"{source.label}: rename: the pattern {pattern.pattern!r} fits no name. Leave it out, or mend it."
            )
        try:
            names = {own: pattern.sub(replacement, name) for own, name in names.items()}
        except (re.error, IndexError) as error:
            raise RecipeError(
                [f"{pattern.pattern!r}: the replacement {replacement!r} does not fit it ({error})."], "rename"
            ) from error
    back: dict[str, str] = {}
    for own, name in names.items():
        if name in back:
            raise AlignmentError(
                f"{source.label}: rename gives {back[name]!r} and {own!r} one name, {name!r}. Make the pattern narrower."
            )
        back[name] = own
    return Arranged(
        {name: Piece(source, own) for name, own in back.items()},
        label=source.label,
        degree=source.degree,
        partial=source.partial,
        folder=source.folder,
        metadata=source.metadata,
    )
