r"""The space of a search: which fields of a recipe's method vary, in which ranges, by task and by group of layers.

scale=0.1..2                     a number between the two, ends included
rank=1..64 log                   an integer, as the field is one; drawn by its logarithm
scale=0..1.5 by task             a number a task
scale=0..1.5 by layers 4         a number for each quarter of the blocks, and one for what lies outside the blocks
scale=0..1.5 by task by layers 2
scale=0..1.5 by pattern *attention*, *
solver=[adam, gradient_flow]     one of some values
then.density=0.05..0.5           a field of the method that this one takes
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import yaml

from thetau.checkpoint.naming import place_of
from thetau.errors import RecipeError, nearest
from thetau.fields import Field, Number, OrNone, PerPattern, PerTask, Rule, Varies, declared
from thetau.methods import build, plain
from thetau.parts import Method
from thetau.recipes.reading import parse_yaml

Plain = dict[str, Any]
Scalar = None | bool | int | float | str
OUTSIDE = "other tensors"
WHERE = "--space"
_RANGE = re.compile(r"(\S+?)\.\.(\S+)")
_BY = re.compile(r"\s+by\s+")


@final
@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number or choice that a trial takes.

    - `path`: the field, `density` or `then.density`. `task`, `group`: of which task and which tensors, None for all. `patterns`: the names of these tensors.
    - `low`, `high`, `log`, `whole`: the range, both ends in it; of integers where `whole`. `choices`: the values, where there is no range.
    """

    path: str
    task: str | None = None
    group: str | None = None
    patterns: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Scalar, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in trials, tables and storages.

        Examples:
            >>> Dimension(path="scale", task="sst2", group="blocks 1–3", low=0, high=1).name
            'scale[sst2, blocks 1–3]'
        """
        parts = [part for part in (self.task, self.group) if part is not None]
        return f"{self.path}[{', '.join(parts)}]" if parts else self.path

    def holds(self, value: object) -> bool:
        """Whether a value lies in it."""
        if self.choices:
            return any(value == one and type(value) is type(one) for one in self.choices)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or isinstance(value, int))  # type: ignore[operator]


@final
@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The dimensions over one method. `tasks`: the identities of the recipe's models."""

    method: Method
    dimensions: tuple[Dimension, ...]
    tasks: tuple[str, ...]

    def start(self) -> dict[str, Scalar] | None:
        """The recipe's own values, where all of them lie in the space."""
        found = {one.name: _now(self.method, one) for one in self.dimensions}
        return found if all(one.holds(found[one.name]) for one in self.dimensions) else None

    def method_of(self, values: Mapping[str, Scalar]) -> Plain:
        """The method with a trial's values, by dimension, as a recipe says it. Raises `RecipeError`: they do not fit each other."""
        made = plain(self.method)
        for path in dict.fromkeys(one.path for one in self.dimensions):
            *outer, last = path.split(".")
            place = made
            for part in outer:
                place = place[part]
            place[last] = _nested([one for one in self.dimensions if one.path == path], values)
        return plain(build(made["name"], {key: value for key, value in made.items() if key != "name"}))


def read_space(given: Sequence[str], method: Method, tasks: Sequence[str], tensors: Sequence[str]) -> SearchSpace:
    """The space of texts `FIELD=RANGE` over a method.

    Args:
        given: as above.
        tasks: the identities of the models that are merged.
        tensors: the names of the base's tensors, for groups of layers.

    Raises:
        RecipeError: all that is wrong: a field that is not there, a range outside the one that it declares, a field that does not vary so.
    """
    problems: list[str] = []
    found: dict[str, list[Dimension]] = {}
    if not given:
        problems.append("names no field. Give at least one, such as `--space 'scale=0.1..2'`.")
    for text in given:
        path, equals, said = (part.strip() for part in text.partition("="))
        try:
            if not (path and equals and said):
                raise ValueError("is not of the form FIELD=RANGE, such as `scale=0.1..2` or `solver=[adam, gradient_flow]`.")
            if path in found:
                raise ValueError("is given twice.")
            field = _field(method, path)
            found[path] = list(_dimensions(path, field, said, tasks, tensors))
        except ValueError as error:
            problems.append(f"{path or repr(text)}: {error}")
    problems += [
        f"{one}: lies under {other}, which varies itself." for one in found for other in found if one.startswith(f"{other}.")
    ]
    if problems:
        raise RecipeError(problems, WHERE)
    return SearchSpace(method=method, dimensions=tuple(one for made in found.values() for one in made), tasks=tuple(tasks))


def _field(method: Method, path: str) -> Field:
    """The field of a method, or of one that it takes. Raises `ValueError`."""
    *outer, last = path.split(".")
    for part in outer:
        value = method.__dict__.get(part)
        if not isinstance(value, Method):
            known = [name for name, one in method.__dict__.items() if isinstance(one, Method)]
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise ValueError(f"{type(method).__name__} takes no method as `{part}`.{nearest(part, known)} {takes}")
        method = value
    fields = declared(type(method))
    if last not in fields:
        raise ValueError(
            f"no such field of {plain(method)['name']}.{nearest(last, fields)} Fields: {', '.join(sorted(fields)) or 'none'}."
        )
    return fields[last]


def _dimensions(path: str, field: Field, said: str, tasks: Sequence[str], tensors: Sequence[str]) -> Iterator[Dimension]:
    """The dimensions of one text. Raises `ValueError`."""
    head, *ways = _BY.split(said)
    by_task, groups = _ways(ways, tensors)
    rule = field.rule.rule if isinstance(field.rule, OrNone) else field.rule
    may = rule if isinstance(rule, Varies) else Varies()
    for asked, allowed, what in ((by_task, may.task, "task"), (bool(groups), may.pattern, "layer or pattern")):
        if asked and not allowed:
            raise ValueError(f"does not vary by {what}: it is {rule.text or 'one value'}.")
    listed = head.startswith("[")
    made = (
        Dimension(path=path, choices=_choices(head, field)) if listed else _range(path, head, may.each if rule is may else rule)
    )
    if made.choices and (by_task or groups) and not all(_is_number(one) for one in made.choices):
        raise ValueError(f"varies by task or layer in numbers. Got {head}.")
    for task in tasks if by_task else (None,):
        for group, patterns in groups.items() if groups else ((None, ()),):
            yield replace(made, task=task, group=group, patterns=patterns)


def _ways(ways: Sequence[str], tensors: Sequence[str]) -> tuple[bool, dict[str, tuple[str, ...]]]:
    """Whether by task, and the groups of tensors by name. Raises `ValueError`."""
    by_task = False
    groups: dict[str, tuple[str, ...]] = {}
    for way in ways:
        word, _, rest = way.strip().partition(" ")
        match word:
            case "task" if not rest:
                by_task = True
            case "layers" if not groups and (not rest or (rest.isdigit() and int(rest) > 0)):
                groups = layer_groups(tensors, int(rest) if rest else None)
            case "pattern" if not groups and rest:
                groups = {one: (one,) for one in map(str.strip, rest.split(",")) if one}
                if list(groups)[-1:] != ["*"]:
                    raise ValueError(f"patterns must end with `*`, which takes the rest. Got {rest}.")
            case _:
                raise ValueError(f"varies `by task`, and `by layers`, `by layers N` or `by pattern P, …, *`. Got `by {way}`.")
    return by_task, groups


def layer_groups(tensors: Sequence[str], count: int | None = None) -> dict[str, tuple[str, ...]]:
    """Patterns of names for runs of blocks, as equal as can be in every tower, and for what lies outside the blocks; a group a block by default.

    Raises:
        ValueError: no tensor belongs to a block.

    Examples:
        >>> names = ["embed.weight", *(f"layer.{i}.mlp.up_proj.weight" for i in range(4))]
        >>> layer_groups(names, 2)
        {'blocks 0–1': ('layer.0.*', 'layer.1.*'), 'blocks 2–3': ('layer.2.*', 'layer.3.*'), 'other tensors': ('*',)}
    """
    towers: dict[str, set[int]] = {}
    for place in map(place_of, tensors):
        if place is not None:
            towers.setdefault(place[0], set()).add(place[1])
    if not towers:
        raise ValueError("the base has no blocks of layers that its tensors' names tell. Take `by pattern`.")
    depth = max(len(numbers) for numbers in towers.values())
    count = min(count or depth, depth)
    members: list[list[str]] = [[] for _ in range(count)]
    spans: list[set[int]] = [set() for _ in range(count)]
    for tower, numbers in towers.items():
        for rank, number in enumerate(sorted(numbers)):
            group = rank * count // len(numbers)
            members[group].append(f"{_literal(tower)}.{number}.*")
            spans[group].add(number)
    found: dict[str, tuple[str, ...]] = {}
    for patterns, span in zip(members, spans, strict=True):
        first, last = min(span), max(span)
        name = f"block {first}" if first == last else f"blocks {first}–{last}"
        found[name if name not in found else f"{name} ({len(found)})"] = tuple(patterns)
    return {**found, OUTSIDE: ("*",)}


def _literal(text: str) -> str:
    """A shell-style pattern that fits only this text."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _choices(text: str, field: Field) -> tuple[Scalar, ...]:
    """The values of a list. Raises `ValueError`."""
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not a list of values: {' '.join(str(error).split())}") from error
    if not isinstance(values, list) or not all(isinstance(one, Scalar) for one in values):
        raise ValueError(f"must be a list of numbers, words, true, false or null. Got {text}.")
    if len(values) < 2 or any(one in values[:place] for place, one in enumerate(values)):
        raise ValueError(f"needs at least two different values. Got {text}.")
    for value in [] if field.holds(Method) else values:
        for fault in field.rule.faults(value):
            raise ValueError(f"must be {field.range}. Got {fault!r}.")
    return tuple(values)


def _range(path: str, text: str, rule: Rule) -> Dimension:
    """`LOW..HIGH`, perhaps `log`. Raises `ValueError`."""
    words = text.split()
    match = _RANGE.fullmatch(words[0]) if words else None
    if match is None or "..." in words[0] or words[1:] not in ([], ["log"]):
        raise ValueError(f"must be LOW..HIGH, LOW..HIGH log, or a list of values, and perhaps `by task`. Got {text!r}.")
    low, high = ends = [_end(word) for word in match.groups()]
    log = len(words) == 2
    if not low < high:
        raise ValueError(f"must go from a smaller number to a larger one. Got {words[0]}.")
    if log and low <= 0:
        raise ValueError(f"is drawn by its logarithm from positive numbers only. Got {words[0]}.")
    for end in ends:
        for fault in rule.faults(end):
            raise ValueError(f"must be {rule.text}. Got {fault!r}, an end of {words[0]}.")
    inside = low + 0.3819 * (high - low)  # a fraction, whichever the ends
    whole = all(isinstance(end, int) for end in ends) and any(True for _ in rule.faults(inside))
    if not whole and any(True for _ in rule.faults(inside)):
        raise ValueError(f"must be {rule.text}: between the ends of {words[0]} lie others.")
    return Dimension(path=path, low=low, high=high, log=log, whole=whole)


def _end(word: str) -> int | float:
    """An end of a range, as it is written. Raises `ValueError`."""
    value = parse_yaml(word) if re.fullmatch(r"[-+.\deE]+", word) else None
    if not isinstance(value, int | float) or not _is_number(value):
        raise ValueError(f"its ends must be finite numbers. Got {word!r}.")
    return value


def _is_number(value: object) -> bool:
    return not any(True for _ in Number().faults(value))


def _now(method: Method, dimension: Dimension) -> Any:
    """The value that the method has for a dimension; None where it has several there."""
    value: Any = method
    for part in dimension.path.split("."):
        value = value.__dict__[part]
    if isinstance(value, PerTask):
        value = value.values.get(dimension.task) if dimension.task is not None else None
    if isinstance(value, PerPattern):
        same = {value.values.get(pattern) for pattern in dimension.patterns} if dimension.patterns else set()
        value = next(iter(same)) if len(same) == 1 else None
    if isinstance(value, Method):
        return plain(value)["name"]
    if not dimension.choices and not dimension.whole and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _nested(dimensions: Sequence[Dimension], values: Mapping[str, Scalar]) -> Any:
    """One field's value as a recipe says it, by task and by pattern where it varies so."""
    if dimensions[0].task is not None:
        tasks = dict.fromkeys(one.task for one in dimensions)
        return {"per_task": {task: _grouped([one for one in dimensions if one.task == task], values) for task in tasks}}
    return _grouped(dimensions, values)


def _grouped(dimensions: Sequence[Dimension], values: Mapping[str, Scalar]) -> Any:
    if dimensions[0].group is None:
        return values[dimensions[0].name]
    return {"per_pattern": {pattern: values[one.name] for one in dimensions for pattern in one.patterns}}
