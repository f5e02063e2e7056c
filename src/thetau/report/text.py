"""Values and names as a page shows them: numbers with a fixed look, and names in which nothing is hidden."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any, final

LONGEST = 400  # characters of one name; what a checkpoint calls itself may be a book
_KEPT = frozenset("\n\t\u200c\u200d")  # joiners are part of words in some scripts


@final
@dataclass(frozen=True, kw_only=True)
class Span:
    """A measured value with the ends of its interval, and how many examples it is of."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


Value = str | int | float | bool | Span | None


def clean(text: str, longest: int = LONGEST) -> str:
    r"""A name in which every character can be seen: controls, marks that turn the direction of writing and halves of pairs are spelled out.

    Examples:
        >>> clean("a\u202eb\x00")
        'a\\u202eb\\u0000'
    """
    if text.isascii() and text.isprintable():
        shown = text
    else:
        shown = "".join(
            one if one in _KEPT or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co", "Cn") else f"\\u{ord(one):04x}"
            for one in text
        )
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def number(value: float | None, spec: str = ".4g") -> str:
    """A number; `–` where there is none, and `NaN` and `∞` as such.

    Examples:
        >>> [number(one) for one in (0.123456, None, float("nan"), float("-inf"), 12345)]
        ['0.1235', '–', 'NaN', '−∞', '12,345']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    text = f"{value:{spec}}"
    if not any(digit in text for digit in "123456789"):
        text = f"{0.0:{spec}}"  # no sign before a zero
    return text if "e" in text else text.replace("-", "−")


def shown(value: Any, spec: str = ".4g") -> str:
    """Any value of a cell.

    Examples:
        >>> shown(Span(value=85.67, low=81.2, high=89.1), ".1f")
        '85.7 (81.2 to 89.1)'
    """
    if isinstance(value, Span):
        interval = (
            "" if value.low is None or value.high is None else f" ({number(value.low, spec)} to {number(value.high, spec)})"
        )
        return number(value.value, spec) + interval
    if value is None or isinstance(value, int | float):
        return number(value, spec)
    return clean(str(value))


def sort_key(value: Any) -> str | None:
    """What a column is sorted by where the text of a cell does not say it: nothing for all that a script reads as a number."""
    if isinstance(value, Span):
        value = value.value
    return ("1e999" if value > 0 else "-1e999") if isinstance(value, float) and math.isinf(value) else None


def gigabytes(count: float) -> str:
    """Bytes as people say them.

    Examples:
        >>> gigabytes(90_868_376), gigabytes(12)
        ('90.9 MB', '12 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
