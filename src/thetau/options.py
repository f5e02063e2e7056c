"""Options as data: what a field of an options dataclass means, how it is called on a command line, and in which range it may be.

A study takes a frozen dataclass of options; the command line makes its options from the same fields, so that none is written twice.
Importing this loads nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, final, get_args, get_origin, get_type_hints

from thetau.errors import RecipeError


@final
@dataclass(frozen=True)
class Option:
    """Of a field, in its `Annotated` type.

    - `help`: a sentence. `flags`: on a command line; by default `--name-of-the-field`.
    - `least`, `most`: the range of a number, ends included.
    - `commas`: a tuple is one text with commas between its values, not a flag that is repeated.
    """

    help: str
    flags: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    commas: bool = False


def option_of(hint: Any) -> tuple[Any, Option | None]:
    """The type of an annotation, and what its `Option` says."""
    if get_origin(hint) is not Annotated:
        return hint, None
    kind, *notes = get_args(hint)
    return kind, next((note for note in notes if isinstance(note, Option)), None)


def check_ranges(options: Any) -> None:
    """Refuse numbers out of the range that their fields declare; for `__post_init__`.

    Raises:
        RecipeError: all that are, each with its range and what was got.
    """
    problems = []
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        option, value = option_of(hint)[1], getattr(options, name)
        if option is None or value is None:
            continue
        if option.least is not None and not value >= option.least:
            problems.append(f"`{name}` must be at least {option.least:g}. Got {value!r}.")
        if option.most is not None and not value <= option.most:
            problems.append(f"`{name}` must be at most {option.most:g}. Got {value!r}.")
    if problems:
        raise RecipeError(problems, type(options).__name__)
