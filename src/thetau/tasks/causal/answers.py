"""From what a model says to an answer that can be compared: stop strings, extraction, normalisation.

GSM8K's way (Cobbe et al., 2021, <https://arxiv.org/abs/2110.14168>): the number after `####`, else the last number, commas and signs of money aside.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal

Normal = Literal["case", "punctuation", "articles"]
NAMED = ("last_number", "gsm8k")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARKED = re.compile(r"####\s*(" + _NUMBER.pattern + ")")


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings.

    Examples:
        >>> before_stop("4\\n\\nQ: and 5?", ["\\n\\n", "Q:"])
        '4'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def extracted(text: str, how: str | None) -> str | None:
    """The answer in a text: all of it without a rule, a number for `last_number` and `gsm8k`, else the first group (or all) of the first match of a
    regular expression; None where there is none.

    Examples:
        >>> extracted("so 3 x 4 = 1,200.50 in all.", "last_number")
        '1200.5'
        >>> extracted("7 and 8\\n#### 12", "gsm8k")
        '12'
        >>> extracted("The answer is (B).", r"answer is \\((\\w)\\)")
        'B'
    """
    if how is None:
        return text
    if how == "gsm8k" and (marked := _MARKED.search(text)):
        return _number(marked.group(1))
    if how in NAMED:
        numbers = _NUMBER.findall(text)
        return _number(numbers[-1]) if numbers else None
    match = re.search(how, text, re.DOTALL)
    return None if match is None else match.group(1 if match.re.groups else 0)


def normalised(text: str, ways: Sequence[Normal]) -> str:
    """Runs of spaces as one, none at the ends; besides as `ways` say, without case, punctuation, English articles.

    Examples:
        >>> normalised(" The  Cat. ", ["case", "punctuation", "articles"])
        'cat'
    """
    if "case" in ways:
        text = text.lower()
    if "punctuation" in ways:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if "articles" in ways:
        text = re.sub(r"\b(?:a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _number(text: str) -> str | None:
    """One spelling for equal numbers."""
    try:
        value = Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
    plain = f"{value:f}"
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain) or "0"
