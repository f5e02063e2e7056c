"""Command-line options from dataclasses: every field of a verb's options becomes an option, with the help and range that it declares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from thetau.errors import RecipeError
from thetau.options import Option, option_of


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb for typer, whose parameters that are dataclasses are given field by field.

    A field that is itself such a dataclass is given by its own fields, and a parameter that has an `Option` as a field is. Others stay
    as typer reads them.

    On the command line a tuple is a flag that may be repeated (or one text with commas, where its `Option` says so), a mapping is
    `name=value` and may be repeated, and a number or a word (`int | Literal["auto"]`) is one text.

    Raises:
        TypeError: two options of one name, or a field without an `Option`.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(verb).parameters.values():
        hint = hints[parameter.name]
        if _is_group(hint):
            found = _parameters(hint)
        elif option_of(hint)[1] is not None:
            found = {parameter.name: _parameter(parameter.name, hint, parameter.default)}
        else:
            found = {parameter.name: parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)}
        if twice := parameters.keys() & found:
            raise TypeError(f"{verb.__name__}: the option {sorted(twice)[0]!r} is declared twice.")
        parameters |= found

    @functools.wraps(verb)
    def given(**values: Any) -> None:
        verb(**{name: _made(name, hint, values) for name, hint in hints.items() if name != "return"})

    given.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    given.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return given


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _parameters(group: type[Any]) -> dict[str, inspect.Parameter]:
    """The typer parameters of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    found: dict[str, inspect.Parameter] = {}
    for field in fields(group):
        hint = hints[field.name]
        if _is_group(hint):
            found |= _parameters(hint)
        elif option_of(hint)[1] is None:
            raise TypeError(f"{group.__name__}.{field.name}: has no `Option` that says its help.")
        else:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            found[field.name] = _parameter(field.name, hint, None if field.default_factory is not MISSING else default)
    return found


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """One field as typer has it."""
    kind, option = option_of(hint)
    assert option is not None
    shown = typer.Option(*option.flags, help=option.help, min=option.least, max=option.most)
    words: Any = _words(kind, option)
    annotation: Any = Annotated[words, shown]
    if isinstance(default, tuple | Mapping) and not default:
        default = None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _made(name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    """What a parameter or a field holds, from what the command line gave."""
    if _is_group(hint):
        hints = get_type_hints(hint, include_extras=True)
        return hint(**{field.name: _made(field.name, hints[field.name], values) for field in fields(hint)})
    kind, option = option_of(hint)
    return values[name] if option is None else _value(name, kind, option, values[name])


def _words(kind: Any, option: Option) -> Any:
    """The type under which typer reads a field."""
    inner = _optional(kind)
    if get_origin(inner) is tuple and not option.commas:
        return list[get_args(inner)[0]] | None  # type: ignore[misc]
    if get_origin(inner) is Mapping:
        return list[str] | None
    if option.commas or _literals(inner):
        return str if inner is kind else str | None
    return kind


def _value(name: str, kind: Any, option: Option, given: Any) -> Any:
    """What a field holds, from typer's reading of it. Raises `RecipeError`."""
    inner, flag = _optional(kind), (option.flags or (f"--{name.replace('_', '-')}",))[0]
    if get_origin(inner) is Mapping:
        return _paths(given or [], flag) if get_args(inner)[1] is Path else parse_fields(given or [], flag)
    if get_origin(inner) is tuple and not option.commas:
        return tuple(given or ())
    if given is None:
        return None
    if option.commas:
        return (
            parse_numbers(given, flag) if get_args(inner)[0] is float else tuple(filter(None, map(str.strip, given.split(","))))
        )
    if words := _literals(inner):
        return _number_or(words, given, flag) if get_origin(inner) is not Literal else _word(name, words, given)
    return given


def _optional(kind: Any) -> Any:
    """The type without None."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    others = [one for one in get_args(kind) if one is not type(None)]
    return kind if len(others) == len(get_args(kind)) else Union[tuple(others)]  # noqa: UP007  (made at run time)


def _literals(kind: Any) -> tuple[str, ...]:
    """The words that a field may be, or that may stand for a number in it."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) not in (Union, UnionType):
        return ()
    return tuple(word for one in get_args(kind) if get_origin(one) is Literal for word in get_args(one))


def _word(name: str, words: Sequence[str], given: str) -> str:
    if given not in words:
        raise RecipeError([f"`options({name}=...)` must be one of {', '.join(words)}. Got {given!r}."], "options")
    return given


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
