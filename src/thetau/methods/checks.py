"""The checks of fields, in one wording: which argument of what, the rule, what was got."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from thetau.parts import PerPattern, PerTask


def number(
    owner: str,
    name: str,
    value: object,
    rule: str,
    *,
    low: int | float = -math.inf,
    high: int | float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """A finite number between two bounds; `rule` is what the message says.

    Raises:
        ValueError: it is not.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good:
        assert isinstance(value, int | float)
        good = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not good:
        raise ValueError(f"`{owner}({name}=...)` must be {rule}. Got {value!r}.")


def varying(
    owner: str, name: str, value: object, rule: str = "a finite number, a tuple, `PerTask` or `PerPattern`", *, tasks: bool = True
) -> None:
    """A finite number, or one by pattern or (where `tasks`) by task: `PerTask`, or a tuple in the order in which tasks are given.

    Raises:
        ValueError: it is not.
    """
    ones: Iterable[object] = [value]
    if isinstance(value, PerPattern) or (tasks and isinstance(value, PerTask)):
        ones = value.values.values()
    elif tasks and isinstance(value, tuple) and value:
        ones = value
    for one in ones:
        number(owner, name, one, rule if tasks else rule.replace(", a tuple, `PerTask`", ""))


def whole(owner: str, name: str, value: object, *, low: int) -> None:
    """An integer of at least `low`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"`{owner}({name}=...)` must be an integer of at least {low}. Got {value!r}.")


def flag(owner: str, name: str, value: object) -> None:
    """True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{owner}({name}=...)` must be true or false. Got {value!r}.")


def choice(owner: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """One of some words.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"`{owner}({name}=...)` must be one of {', '.join(allowed)}. Got {value!r}.")


def rank(owner: str, name: str, value: object) -> None:
    """A rank: an integer of at least 1, a share in (0, 1], or None.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    if not isinstance(value, float) or not 0 < value <= 1:
        raise ValueError(f"`{owner}({name}=...)` must be an integer of at least 1, a share in (0, 1], or None. Got {value!r}.")
