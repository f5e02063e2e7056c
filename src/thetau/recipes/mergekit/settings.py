"""A parameter's value at one tensor: filters, gradients over the layers, and which of several levels counts.

mergekit's rules: the levels are asked from the model to the whole recipe, at each the first choice whose filter fits; a list of n values is
spread evenly over the layers of a slice and interpolated, one of words or switches is picked from; outside the layers its first value holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from thetau.errors import nearest
from thetau.recipes.mergekit.schema import Choice, Scalar, Setting, Settings, Where


class Resolver:
    """Looks settings up, and remembers which choices ever held."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names  # of all tensors of the output
        self.asked: dict[Where, Choice] = {}
        self.held: set[Where] = set()

    def value(self, key: str, levels: Iterable[Settings], name: str, t: float) -> Scalar | None:
        """The value for a tensor at depth t of its slice, from 0 to 1; None where no level gives one."""
        for level in levels:
            setting = level.get(key)
            if setting is None:
                continue
            for choice in setting.choices:
                self.asked[choice.where] = choice
                if self.fits(choice, name):
                    self.held.add(choice.where)
                    return at(choice.value, t)
        return None

    def fits(self, choice: Choice, name: str) -> bool:
        """Whether a filter takes a tensor: as a part of its name, or, where no name holds it, as a regular expression."""
        if choice.filter is None or choice.filter in name:
            return True
        return not self._plain(choice.filter) and _searched(choice.filter, name)

    def _plain(self, text: str) -> bool:
        return any(text in name for name in self.names)

    def idle(self) -> list[tuple[Where, str]]:
        """Each filter that never took a tensor, with where it stands."""
        said = []
        for where, choice in self.asked.items():
            if where in self.held or choice.filter is None:
                continue
            if any(self.fits(choice, name) for name in self.names):
                continue  # an earlier choice took them all
            parts = sorted({part for name in self.names for part in name.split(".") if not part.isdigit()})
            said.append((where, f"the filter {choice.filter!r} fits no tensor.{nearest(choice.filter, parts)}"))
        return said


def at(value: Scalar | tuple[Scalar, ...], t: float) -> Scalar:
    """A value, or a gradient at t in [0, 1].

    Examples:
        >>> at((0.0, 0.5, 0.3), 0.75)
        0.4
        >>> at(("a", "b"), 0.9)
        'a'
    """
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    low = min(int(place), len(value) - 1)
    first = value[low]
    second = value[min(low + 1, len(value) - 1)]
    if isinstance(first, bool | str) or isinstance(second, bool | str):
        return first
    share = place - low
    return (1 - share) * first + share * second


def unknown(settings: Mapping[str, Setting], known: Sequence[str], others: Sequence[str], method: str) -> list[tuple[Where, str]]:
    """A problem for each parameter that no method of mergekit's has; `others` are those of other methods, which it lets pass."""
    return [
        (
            setting.where,
            f"unknown parameter {key!r}.{nearest(key, [*known, *others])} {method} knows: {', '.join(known) or 'none'}.",
        )
        for key, setting in settings.items()
        if key not in known and key not in others
    ]


def _searched(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
