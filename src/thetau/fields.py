"""What a field of hyper-parameters may hold: its range, said once on the field, from which come the check, the help and the pages.

    density: Annotated[float, Within("(0, 1]"), "share of the entries that is kept."] = 0.2

A rule among the annotations is the range, a string is the meaning. Where there is no rule the type is one: `bool`, `int`, `float`, `str`,
a `Literal` of words, or a class of which the value is an instance. `None` is allowed where the type says so. A class whose
`__post_init__` calls `check` needs no other check of a single field.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class PerTask:
    """A field's value by task; tasks are named as in the recipe. A task's value may itself vary by pattern (layer-wise coefficients)."""

    values: Mapping[str, float | PerPattern]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("`PerTask` needs a value for at least one task.")


@dataclass(frozen=True)
class PerPattern:
    """A field's value by tensor name: the first shell-style pattern that fits decides, `"*"` last for the rest."""

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("`PerPattern` needs at least one pattern.")

    @cached_property
    def plain(self) -> bool:
        """Whether every pattern is a tensor's own name, so that none needs to be tried before another."""
        return not any(letter in pattern for pattern in self.values for letter in "*?[")


Varying = float | tuple[float, ...] | PerTask | PerPattern  # a tuple stands in the order in which the tasks are given


def each_number(value: Varying) -> Iterator[float]:
    """Every number that a varying field holds."""
    if isinstance(value, PerTask | PerPattern):
        for one in value.values.values():
            yield from each_number(one)
    elif isinstance(value, tuple):
        yield from value
    else:
        yield value


def by_pattern(value: Varying) -> bool:
    """Whether a field's value hangs on the tensor's name, for some task at least."""
    if isinstance(value, PerTask):
        return any(isinstance(one, PerPattern) for one in value.values.values())
    return isinstance(value, PerPattern)


class Rule(ABC):
    """What a field's value must be."""

    none: str = ""  # what None stands for, where the type allows it: ends the sentence

    @property
    def by_task(self) -> bool:
        """Whether a tuple, in the order in which the tasks are given, is values by task."""
        return False

    @property
    @abstractmethod
    def text(self) -> str:
        """The rule as a message says it, after `must be`."""

    @abstractmethod
    def faults(self, value: object) -> Iterator[object]:
        """What of the value breaks the rule: itself, or some of the numbers that it holds."""

    def check(self, owner: str, name: str, value: object) -> None:
        """Nothing where the rule is kept.

        Raises:
            ValueError: it is broken; the message says where, the rule, and what was got.
        """
        for fault in self.faults(value):
            raise ValueError(f"`{owner}({name}=...)` must be {self.text}. Got {fault!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Number(Rule):
    """Any finite number."""

    @property
    def text(self) -> str:
        """The rule in words."""
        return "a finite number"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is no number, or not finite."""
        if not _is_number(value):
            yield value


@dataclass(frozen=True)
class Within(Rule):
    """A finite number in an interval as it is written in mathematics: `"(0, 1]"`, `"[0, inf)"`.

    `none` says what None stands for, where the type allows it: `none="to round"`.
    """

    interval: str
    none: str = ""

    def __post_init__(self) -> None:
        text = self.interval
        try:
            low, high = map(float, text[1:-1].split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or not low < high:
            raise ValueError(f'`Within(...)` must be an interval such as "(0, 1]" or "[0, inf)". Got {text!r}.')

    @property
    def ends(self) -> tuple[float, float]:
        """The bounds."""
        low, high = map(float, self.interval[1:-1].split(","))
        return low, high

    @property
    def text(self) -> str:
        """The rule in words, where one side has no bound."""
        low, high = self.ends
        if math.isinf(high):
            if low == 0 and self.interval[0] == "(":
                return "a positive number"
            return f"a number {'above' if self.interval[0] == '(' else 'of at least'} {low:g}"
        return f"in {self.interval}"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is no number, or outside."""
        low, high = self.ends
        if _is_number(value):
            assert isinstance(value, int | float)
            above = low < value if self.interval[0] == "(" else low <= value
            below = value < high if self.interval[-1] == ")" else value <= high
            if above and below:
                return
        yield value


@dataclass(frozen=True)
class AtLeast(Rule):
    """An integer from `low` on."""

    low: int
    none: str = ""

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"an integer of at least {self.low}"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is no integer, or too small."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.low:
            yield value


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some words; a `Literal` says so by itself."""

    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"one of {', '.join(self.words)}"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is none of them."""
        if value not in self.words:
            yield value


@dataclass(frozen=True)
class Rank(Rule):
    """A rank: an integer from 1 on, a share of the smaller dimension, one of some words, or None."""

    words: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The rule in words."""
        said = "".join(f'"{word}", ' for word in self.words)
        return f"an integer of at least 1, a share in (0, 1], {said}or None"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is none of these."""
        if value is None or value in self.words or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return
        if not isinstance(value, float) or not 0 < value <= 1:
            yield value


@dataclass(frozen=True)
class Directions(Rule):
    """How many directions a sketch keeps: an integer from 1 on, or a word."""

    @property
    def text(self) -> str:
        """The rule in words."""
        return 'an integer of at least 1, "auto" or "full"'

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is none of these."""
        if isinstance(value, str):
            if value not in ("auto", "full"):
                yield value
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield value


@dataclass(frozen=True)
class Numbers(Rule):
    """A tuple of finite numbers, at least one."""

    @property
    def text(self) -> str:
        """The rule in words."""
        return "one or more finite numbers"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is no tuple of numbers."""
        if not isinstance(value, tuple) or not value or not all(map(_is_number, value)):
            yield value


@dataclass(frozen=True)
class Patterns(Rule):
    """A selection of tensors: a word that `Selection` knows, or shell-style patterns of names."""

    @property
    def text(self) -> str:
        """The rule in words."""
        return '"all", "linear" or patterns of names'

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is no text and no tuple of texts."""
        if not isinstance(value, str) and not (isinstance(value, tuple) and value and all(isinstance(one, str) for one in value)):
            yield value


@dataclass(frozen=True)
class Varies(Rule):
    """A number, or numbers by task or by pattern (or by task and by pattern); a range beside it holds for each of them."""

    task: bool = False
    pattern: bool = False
    each: Rule = Number()

    @property
    def by_task(self) -> bool:
        """Whether a tuple, in the order in which the tasks are given, is values by task."""
        return self.task

    @property
    def text(self) -> str:
        """The rule in words."""
        ways = ["a tuple", "`PerTask`"] * self.task + ["`PerPattern`"] * self.pattern
        plain = self.each == Number()
        listed = " or ".join([", ".join(["a finite number" if plain else "a number", *ways[:-1]]), *ways[-1:]])
        return listed if plain else f"{listed}, each {self.each.text}"

    def check(self, owner: str, name: str, value: object) -> None:
        """Nothing where the rule is kept.

        Raises:
            ValueError: it is broken: the range alone is told where the fault is a single value.
        """
        for fault in self.faults(value):
            rule: Rule = self.each if not isinstance(fault, tuple | PerTask | PerPattern) and self.each != Number() else self
            raise ValueError(f"`{owner}({name}=...)` must be {rule.text}. Got {fault!r}.")

    def faults(self, value: object) -> Iterator[object]:
        """The numbers that break the range, or the whole where it varies in a way that it may not."""
        if (isinstance(value, PerTask) and self.task) or (isinstance(value, PerPattern) and self.pattern):
            for number in value.values.values():
                yield from self.faults(number) if isinstance(number, PerPattern) and self.pattern else self.each.faults(number)
        elif isinstance(value, tuple) and value and self.task:
            for number in value:
                yield from self.each.faults(number)
        else:
            yield from self.each.faults(value)


@dataclass(frozen=True)
class Flag(Rule):
    """True or false."""

    @property
    def text(self) -> str:
        """The rule in words."""
        return "true or false"

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is neither."""
        if not isinstance(value, bool):
            yield value


@dataclass(frozen=True)
class Instance(Rule):
    """A value of one of some classes: what a type without a rule says."""

    kinds: tuple[type, ...]

    @property
    def text(self) -> str:
        """The rule in words."""
        names = {int: "an integer", float: "a number", str: "a text", tuple: "a tuple", dict: "a mapping"}
        return " or ".join(names.get(kind, f"a {kind.__name__.lower()}") for kind in self.kinds)

    def faults(self, value: object) -> Iterator[object]:
        """Whatever is of none of them."""
        if not isinstance(value, self.kinds) or (isinstance(value, bool) and bool not in self.kinds):
            yield value


@dataclass(frozen=True)
class Anything(Rule):
    """No rule: a type of which nothing is known here."""

    @property
    def text(self) -> str:
        """Nothing."""
        return ""

    def faults(self, value: object) -> Iterator[object]:
        """None."""
        yield from ()


@dataclass(frozen=True)
class OrNone(Rule):
    """None, or what the rule says."""

    rule: Rule

    @property
    def by_task(self) -> bool:
        """As the rule has it."""
        return self.rule.by_task

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"{self.rule.text}, or None {self.rule.none}".rstrip()

    def faults(self, value: object) -> Iterator[object]:
        """What breaks the rule."""
        if value is not None:
            yield from self.rule.faults(value)


@dataclass(frozen=True)
class Field:
    """One hyper-parameter as its class declares it; `range` is empty where nothing is known of the type."""

    name: str
    rule: Rule
    default: Any  # None where it must be given
    meaning: str
    required: bool = False

    @property
    def range(self) -> str:
        """What its value must be, in words."""
        return self.rule.text

    def holds(self, kind: type) -> bool:
        """Whether its type is such a class."""
        rule = self.rule.rule if isinstance(self.rule, OrNone) else self.rule
        return isinstance(rule, Instance) and any(issubclass(one, kind) for one in rule.kinds)


def declared(cls: type) -> Mapping[str, Field]:
    """The fields of a dataclass by name; meanings come from the annotations, or from the list in its docstring, which counts first."""
    return _declared(cls)


@cache
def _declared(cls: Any) -> Mapping[str, Field]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"`{cls.__name__}`: the type of a field cannot be read: {error}. Import it outside `TYPE_CHECKING`."
        ) from error
    told = _listed(cls.__doc__ or "")
    found = {}
    for entry in fields(cls):
        _, extras = _split(hints[entry.name])
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        meaning = told.get(entry.name, next((extra for extra in reversed(extras) if isinstance(extra, str)), ""))
        required = default is MISSING
        found[entry.name] = Field(entry.name, rule_of(hints[entry.name]), None if required else default, meaning, required)
    return found


def check(value: object) -> None:
    """Check every field of a dataclass against what it declares.

    Raises:
        ValueError: one is not what it must be; the message says which, the rule, and what was got.
    """
    cls = type(value)
    for field in declared(cls).values():
        field.rule.check(cls.__name__, field.name, value.__dict__[field.name])


def rule_of(hint: Any) -> Rule:
    """The rule of a type: the one among its annotations, or what the type itself says."""
    hint, extras = _split(hint)
    rules = [extra for extra in extras if isinstance(extra, Rule)]
    varies = next((rule for rule in rules if isinstance(rule, Varies)), None)
    ranges = [rule for rule in rules if not isinstance(rule, Varies)]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional = NoneType in kinds
    if varies is not None:
        rule: Rule = Varies(task=varies.task, pattern=varies.pattern, each=ranges[-1]) if ranges else varies
    elif ranges:
        rule = ranges[-1]
    else:
        rule = _of_types(tuple(kind for kind in kinds if kind is not NoneType))
    return OrNone(rule) if optional and any(True for _ in rule.faults(None)) else rule


def part_of(kind: type, whole: object) -> dict[str, Any]:
    """The fields that a part's class has of a method's, by name: `Disentangle(**part_of(Disentangle, self))`."""
    return {entry.name: whole.__dict__[entry.name] for entry in fields(kind)}


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and its annotations, those of what it is made of first (`Annotated[Density, "…"]`, `Density | None`)."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        hint, before = _split(inner)
        return hint, (*before, *extras)
    if get_origin(hint) in (Union, UnionType):
        pairs = [_split(one) for one in get_args(hint)]
        return Union[tuple(one for one, _ in pairs)], tuple(extra for _, extras in pairs for extra in extras)  # noqa: UP007
    return hint, ()


def _of_types(kinds: tuple[Any, ...]) -> Rule:
    if kinds == (bool,):
        return Flag()
    if float in kinds and set(kinds) <= {int, float}:
        return Number()
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return OneOf(get_args(kinds[0]))
    bare = tuple(get_origin(kind) or kind for kind in kinds)
    if bare and all(isinstance(kind, type) and kind is not Any for kind in bare):
        return Instance((*bare, int) if float in bare and int not in bare else bare)
    return Anything()


def _listed(text: str) -> dict[str, str]:
    """The entries of a docstring's list, "- `name`: what it is", with the lines that continue them."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        entry = line.strip()
        if entry.startswith("- `") and "`: " in entry:
            name, found[name] = entry[3:].split("`: ", 1)
        elif not entry or entry.startswith("- "):
            name = ""
        elif name:
            found[name] += f" {entry}"
    return found
