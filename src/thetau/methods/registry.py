"""Methods by name, and what a table or a form needs to know of their fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from inspect import cleandoc
from typing import Any, TypeVar, get_type_hints

from thetau.errors import RecipeError, nearest
from thetau.parts import Method, PerPattern, PerTask

T = TypeVar("T", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}
_PAPERS: dict[str, str] = {}


@dataclass(frozen=True)
class Field:
    """One hyper-parameter: its name, type as text, default and meaning."""

    name: str
    type: str
    default: Any
    meaning: str


def register(name: str, *, paper: str) -> Callable[[T], T]:
    """Make a method known by name; `paper` is its source."""

    def add(cls: T) -> T:
        _METHODS[name] = cls
        _PAPERS[name] = paper
        return cls

    return add


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(_METHODS)


def get(name: str) -> type[Method]:
    """A method's class.

    Raises:
        RecipeError: no method has that name; the message says which is near.
    """
    if name not in _METHODS:
        raise RecipeError([f"unknown method {name!r}.{nearest(name, names())} See `thetau methods`."], "method")
    return _METHODS[name]


def paper(name: str) -> str:
    """Where a method comes from."""
    get(name)
    return _PAPERS[name]


def name_of(method: Method) -> str:
    """The name under which a method's class is registered."""
    for name, cls in _METHODS.items():
        if type(method) is cls:
            return name
    return type(method).__name__


def describe(name: str) -> list[Field]:
    """A method's fields; meanings come from the list in its docstring."""
    cls: Any = get(name)
    meanings = {}
    for line in cleandoc(cls.__doc__ or "").splitlines():
        if line.startswith("- `") and "`: " in line:
            key, meaning = line[3:].split("`: ", 1)
            meanings[key] = meaning
        elif meanings and line.startswith("  "):
            last = next(reversed(meanings))
            meanings[last] += " " + line.strip()
    hints = {field.name: str(field.type) for field in fields(cls)}
    return [
        Field(
            f.name,
            hints[f.name],
            f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None,
            meanings.get(f.name, ""),
        )
        for f in fields(cls)
    ]


def build(name: str, values: Mapping[str, Any]) -> Method:
    """A method from plain values, as a recipe or a command line gives them.

    Nested methods are `{"name": ..., fields...}` or a name; `{"per_task": {...}}` and `{"per_pattern": {...}}` vary a field; lists
    become tuples.

    Raises:
        RecipeError: with every problem: unknown fields (and the nearest known one), values of the wrong type or out of range.
    """
    cls: Any = get(name)
    known = {field.name for field in fields(cls)}
    problems = [
        f"{name}: unknown field {key!r}.{nearest(key, known)} Fields: {', '.join(sorted(known))}."
        for key in values
        if key not in known
    ]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key in known:
            try:
                given[key] = _value(key, value, cls)
            except RecipeError as error:
                problems += [f"{name}.{key}: {problem}" for problem in error.problems]
            except (TypeError, ValueError) as error:
                problems.append(f"{name}.{key}: {error}")
    for key, value in given.items():  # one by one, so that every field is heard
        try:
            cls(**{key: value})
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    if not problems:
        try:
            method: Method = cls(**given)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        else:
            return method
    raise RecipeError(problems, "method")


def _value(key: str, value: Any, cls: type) -> Any:
    hint = get_type_hints(cls, include_extras=False).get(key)
    if hint is Method:
        if isinstance(value, str):
            return build(value, {})
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return build(value["name"], {k: v for k, v in value.items() if k != "name"})
        raise ValueError(f"must be a method's name, or a mapping with `name` and its fields. Got {value!r}.")
    if isinstance(value, Mapping):
        if set(value) == {"per_task"} and isinstance(value["per_task"], Mapping):
            return PerTask({str(task): _number(number) for task, number in value["per_task"].items()})
        if set(value) == {"per_pattern"} and isinstance(value["per_pattern"], Mapping):
            return PerPattern({str(pattern): _number(number) for pattern, number in value["per_pattern"].items()})
        raise ValueError(f"a mapping must be `per_task: {{task: value}}` or `per_pattern: {{pattern: value}}`. Got {value!r}.")
    return tuple(value) if isinstance(value, list) else value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number. Got {value!r}.")
    return float(value)


def plain(method: Method) -> dict[str, Any]:
    """The inverse of `build`: a mapping of plain values with `name`, complete, so that a run can be repeated from it."""
    out: dict[str, Any] = {"name": name_of(method)}
    for field in fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if isinstance(value, PerTask):
            value = {"per_task": dict(value.values)}
        elif isinstance(value, PerPattern):
            value = {"per_pattern": dict(value.values)}
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Method):
            value = plain(value)
        out[field.name] = value
    return out
