"""Command-line options from dataclasses: every field of a verb's options becomes an option, with the help and range that it declares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from thetau.errors import RecipeError
from thetau.options import Option, option_of


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb for typer, whose parameters that are dataclasses are given field by field.

    A field that is itself such a dataclass is given by its own fields. Other parameters stay as typer reads them.

    On the command line a tuple is a flag that may be repeated (or one text with commas, where its `Option` says so), a mapping is
    `name=value` and may be repeated, and a number or a word (`int | Literal["auto"]`) is one text.

    Raises:
        TypeError: two fields of one name, or a field without an `Option`.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(verb).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            found = _parameters(kind)
        else:
            found = {parameter.name: parameter.replace(annotation=kind)}
        if twice := parameters.keys() & found:
            raise TypeError(f"{verb.__name__}: the option {sorted(twice)[0]!r} is declared twice.")
        parameters |= found

    @functools.wraps(verb)
    def given(**values: Any) -> None:
        made = {name: _made(kind, values) for name, kind in groups.items()}
        verb(**made, **{name: value for name, value in values.items() if name in hints and name not in groups})

    given.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    given.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return given


def _parameters(group: type[Any]) -> dict[str, inspect.Parameter]:
    """The typer parameters of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    found: dict[str, inspect.Parameter] = {}
    for field in fields(group):
        kind, option = option_of(hints[field.name])
        if is_dataclass(kind) and isinstance(kind, type):
            found |= _parameters(kind)
            continue
        if option is None:
            raise TypeError(f"{group.__name__}.{field.name}: has no `Option` that says its help.")
        shown = typer.Option(*option.flags, help=option.help, min=option.least, max=option.most)
        words, default = _words(kind, option), _default(field, kind)
        found[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[words, shown]
        )
    return found


def _made(group: type[Any], values: Mapping[str, Any]) -> Any:
    """The dataclass, from what the command line gave."""
    hints = get_type_hints(group, include_extras=True)
    made = {}
    for field in fields(group):
        kind, option = option_of(hints[field.name])
        if option is None:
            made[field.name] = _made(kind, values)
        else:
            made[field.name] = _value(
                kind, option, values[field.name], (option.flags or (f"--{field.name.replace('_', '-')}",))[0]
            )
    return group(**made)


def _words(kind: Any, option: Option) -> Any:
    """The type under which typer reads a field."""
    inner = _optional(kind)
    if option.commas or _literals(inner):
        return str | None if inner is not kind else str
    if get_origin(inner) is Literal:
        return StrEnum("Choice", {word: word for word in get_args(inner)})
    if get_origin(inner) is tuple:
        return list[get_args(inner)[0]] | None  # type: ignore[misc]
    return list[str] | None if get_origin(inner) is Mapping else kind


def _default(field: Field[Any], kind: Any) -> Any:
    if field.default_factory is not MISSING or get_origin(_optional(kind)) is Mapping:
        return None
    if field.default is MISSING:
        return inspect.Parameter.empty
    return None if field.default == () else field.default


def _value(kind: Any, option: Option, given: Any, flag: str) -> Any:
    """What a field holds, from typer's reading of it. Raises `RecipeError`."""
    inner = _optional(kind)
    if option.commas and given is not None:
        return (
            parse_numbers(given, flag) if get_args(inner)[0] is float else tuple(filter(None, map(str.strip, given.split(","))))
        )
    if option.commas:
        return None
    if get_origin(inner) is Literal:
        return str(given)
    if words := _literals(inner):
        return None if given is None else _number_or(words, given, flag)
    if get_origin(inner) is tuple:
        return tuple(given or ())
    if get_origin(inner) is Mapping:
        return _paths(given or [], flag) if get_args(inner)[1] is Path else parse_fields(given or [], flag)
    return given


def _optional(kind: Any) -> Any:
    """The type without None."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    others = [one for one in get_args(kind) if one is not type(None)]
    return kind if len(others) == len(get_args(kind)) else Union[tuple(others)]  # noqa: UP007  (made at run time)


def _literals(kind: Any) -> tuple[str, ...]:
    """The words that may stand for a number."""
    if get_origin(kind) not in (Union, UnionType):
        return ()
    return tuple(word for one in get_args(kind) if get_origin(one) is Literal for word in get_args(one))


def _number_or(words: Sequence[str], given: str, flag: str) -> int | str:
    try:
        return given if given in words else int(given)
    except ValueError as error:
        raise RecipeError([f"must be a number or {' or '.join(words)}. Got {given!r}."], flag) from error


def _paths(given: Sequence[str], flag: str) -> dict[str, Path]:
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise RecipeError([f"must be NAME=PATH. Got {text!r}."], flag)
        found[name] = Path(path)
    return found


def parse_numbers(given: str, flag: str) -> tuple[float, ...]:
    """Finite numbers with commas between them. Raises `RecipeError`."""
    from math import isfinite

    try:
        values = tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise RecipeError([f"{flag} must be numbers with commas between them. Got {given!r}."], "options") from error
    if not all(map(isfinite, values)):
        raise RecipeError([f"{flag} must be finite. Got {given!r}."], "options")
    return values


def parse_fields(given: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """`["density=0.1", "then.density=0.2"]` → nested mapping; values are YAML.

    Raises:
        RecipeError: an entry has no `=`, or its value is not YAML.
    """
    import yaml

    from thetau.recipes.reading import parse_yaml

    out: dict[str, Any] = {}
    problems = []
    for entry in given:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            problems.append(f"{entry!r} is not of the form field=value.")
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            problems.append(f"{entry!r}: {' '.join(str(error).split())}")
            continue
        place = out
        *path, last = key.split(".")
        for part in path:
            inner = place.get(part)
            if not isinstance(inner, dict):  # `then=ties` before `then.density=…`
                inner = {"name": inner} if isinstance(inner, str) else {}
                place[part] = inner
            place = inner
        if isinstance(place.get(last), dict) and isinstance(value, str):
            place[last]["name"] = value  # `then.density=…` before `then=ties`
        else:
            place[last] = value
    if problems:
        raise RecipeError(problems, flag)
    return out
