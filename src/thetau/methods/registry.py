"""Methods by name: thetau's own, those that a program registers, and those of installed packages.

A package brings methods by entry points of the group `thetau.methods`, `name = "module:Class"`; each is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

from thetau._version import __version__
from thetau.errors import RecipeError, nearest
from thetau.fields import Field, declared
from thetau.parts import Method, PerPattern, PerTask

T = TypeVar("T", bound=type[Method])
GROUP = "thetau.methods"
RESERVED = ("name", "package")  # keys of a method in a recipe that are no fields
_METHODS: dict[str, type[Method]] = {}
_PAPERS: dict[str, str] = {}


def register(name: str, *, paper: str) -> Callable[[T], T]:
    """Make a method known by name; `paper` is its source.

    Raises:
        ValueError: another class has that name.
        TypeError: the class is no frozen dataclass below `Method`, or one of its fields has a name that a recipe needs itself.
    """

    def add(cls: T) -> T:
        if not (issubclass(cls, Method) and is_dataclass(cls)):
            raise TypeError(f"`register({name!r})` takes a dataclass below `thetau.parts.Method`. Got {cls!r}.")
        taken = [field.name for field in fields(cls) if field.name in RESERVED]
        if taken:
            raise TypeError(f"`{cls.__name__}`: a field may not be called `{taken[0]}`, which is a recipe's own key.")
        other = _METHODS.get(name)
        if other is not None and _place(other) != _place(cls):
            raise ValueError(
                f"two methods are called {name!r}: {_place(other)} of {_origin(other)} and {_place(cls)} of {_origin(cls)}. Rename one."
            )
        _METHODS[name] = cls
        _PAPERS[name] = paper
        return cls

    return add


def names() -> list[str]:
    """All methods, sorted; those of installed packages too, which need not be importable."""
    return sorted({*_METHODS, *plugins()})


def get(name: str) -> type[Method]:
    """A method's class.

    Raises:
        RecipeError: no method has that name, and the message says which is near; two have it; or its package cannot be imported.
    """
    offered = plugins().get(name, ())
    if name in _METHODS and not offered:  # whom it would be told from needs a look at every installed package
        return _METHODS[name]
    rivals = [f"{entry.value} of {_told(entry)}" for entry in offered]
    if name in _METHODS and not any(_top(entry.module) == _top(_METHODS[name].__module__) for entry in offered):
        rivals.insert(0, f"{_place(_METHODS[name])} of {_origin(_METHODS[name])}")
    if len(rivals) > 1:
        raise RecipeError([f"two methods are called {name!r}: {' and '.join(rivals)}. Uninstall one."], "method")
    if name not in _METHODS and offered:
        _load(name, offered[0])
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
    """A method's fields: range, default and meaning as they are declared."""
    cls: Any = get(name)
    return list(declared(cls).values())


def package_of(cls: type[Method]) -> str | None:
    """The package that a method comes from and its version, "thetau-median 0.1.0"; None for thetau's own.

    A class of no installed package (a notebook's, a script's) is given with its module.
    """
    return None if _top(cls.__module__) == "thetau" else _origin(cls)


@cache
def plugins() -> Mapping[str, Sequence[metadata.EntryPoint]]:
    """What installed packages offer, by name; nothing is imported."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _load(name: str, entry: metadata.EntryPoint) -> None:
    try:
        loaded = entry.load()
    except Exception as error:
        _METHODS.pop(name, None)  # half a module may have registered it
        raise RecipeError(
            [f"the method {name!r} of the package {_told(entry)} cannot be imported: {type(error).__name__}: {error}"], "method"
        ) from error
    if _METHODS.get(name) is not loaded:
        raise RecipeError(
            [
                f"the package {_told(entry)} offers {name!r} as {entry.value}, which is no method of that name. "
                f"Its class needs `@register({name!r}, paper=...)`."
            ],
            "method",
        )


def _told(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _top(module: str) -> str:
    return module.split(".")[0]


@cache
def _distributions() -> Mapping[str, Sequence[str]]:
    return metadata.packages_distributions()


def _origin(cls: type) -> str:
    top = _top(cls.__module__)
    if top == "thetau":
        return f"thetau {__version__}"
    for entry in (entry for offered in plugins().values() for entry in offered):
        if _top(entry.module) == top:
            return _told(entry)
    for package in _distributions().get(top, ()):
        return f"{package} {metadata.version(package)}"
    return f"the module {cls.__module__}"


def build(name: str, values: Mapping[str, Any]) -> Method:
    """A method from plain values, as a recipe or a command line gives them.

    Nested methods are `{"name": ..., fields...}` or a name; `{"per_task": {...}}` and `{"per_pattern": {...}}` vary a field, the second also
    inside the first; lists become tuples. `package`, which an output records for a method of another package, must be the one that is
    installed.

    Raises:
        RecipeError: with every problem: unknown fields (and the nearest known one), values of the wrong type or out of range, another package.
    """
    cls: Any = _of_package(name, values["package"]) if "package" in values else get(name)
    known = declared(cls)
    problems = [
        f"{name}: unknown field {key!r}.{nearest(key, known)} Fields: {', '.join(sorted(known))}."
        for key in values
        if key not in known and key != "package"
    ]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key in known:
            try:
                given[key] = _value(known[key], value)
                known[key].rule.check(cls.__name__, key, given[key])
            except RecipeError as error:
                problems += [f"{name}.{key}: {problem}" for problem in error.problems]
            except (TypeError, ValueError) as error:
                problems.append(str(error) if str(error).startswith("`") else f"{name}.{key}: {error}")
    problems += [
        f"{name}: `{key}` must be given: {field.range}." for key, field in known.items() if field.required and key not in values
    ]
    if not problems:
        try:
            method: Method = cls(**given)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        else:
            return method
    raise RecipeError(problems, "method")


def _of_package(name: str, package: object) -> type[Method]:
    """The class of a method that an output recorded with its package."""
    try:
        cls = get(name)
    except RecipeError as error:
        if name in names():
            raise
        problem = f"the method {name!r} is of {package}, which is not installed here. Install it, and try again."
        raise RecipeError([problem], "method") from error
    here = package_of(cls) or "thetau itself"
    if here != package:
        raise RecipeError(
            [
                f"the method {name!r} was of {package}; here it is of {here}. Install that version, or take `package` out of the recipe."
            ],
            "method",
        )
    return cls


def _value(field: Field, value: Any) -> Any:
    if value is None:
        return None
    if field.holds(Method):
        if isinstance(value, str):
            return build(value, {})
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return build(value["name"], {k: v for k, v in value.items() if k != "name"})
        raise ValueError(f"must be a method's name, or a mapping with `name` and its fields. Got {value!r}.")
    if isinstance(value, Mapping) and not field.holds(dict):
        if set(value) == {"per_task"} and isinstance(value["per_task"], Mapping):
            return PerTask({str(task): _number(number) for task, number in value["per_task"].items()})
        return _by_pattern(value)
    return tuple(value) if isinstance(value, list) else value


def _by_pattern(value: Mapping[str, Any]) -> PerPattern:
    if set(value) == {"per_pattern"} and isinstance(value["per_pattern"], Mapping):
        return PerPattern({str(pattern): _only_number(number) for pattern, number in value["per_pattern"].items()})
    raise ValueError(f"a mapping must be `per_task: {{task: value}}` or `per_pattern: {{pattern: value}}`. Got {value!r}.")


def _number(value: Any) -> float | PerPattern:
    return _by_pattern(value) if isinstance(value, Mapping) else _only_number(value)


def _only_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number. Got {value!r}.")
    return float(value)


def plain(method: Method) -> dict[str, Any]:
    """The inverse of `build`: a mapping of plain values with `name`, complete, so that a run can be repeated from it.

    A method of another package has its `package` there too, with the version.

    Raises:
        RecipeError: a field holds what JSON cannot hold, so that no output could say how it was made.
    """
    cls = type(method)
    out: dict[str, Any] = {"name": name_of(method)}
    package = package_of(cls)
    if package is not None:
        out["package"] = package
    problems = []
    for key in declared(cls):
        try:
            out[key] = plain_value(method.__dict__[key])
        except TypeError as error:
            problems.append(
                f"`{cls.__name__}({key}=...)` holds a value of type `{error}`, which no recipe can hold. "
                "A field may be None, true or false, a number, a text, a tuple or a mapping of such, or a method."
            )
    if problems:
        raise RecipeError(problems, "method")
    return out


def plain_value(value: Any) -> Any:
    """A value as JSON holds it; `TypeError` names the type of what it cannot hold."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Method):
        return plain(value)
    if isinstance(value, PerTask):
        return {"per_task": {str(task): plain_value(number) for task, number in value.values.items()}}
    if isinstance(value, PerPattern):
        return {"per_pattern": {str(pattern): plain_value(number) for pattern, number in value.values.items()}}
    if isinstance(value, tuple):
        return [plain_value(one) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain_value(one) for key, one in value.items()}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins."))
