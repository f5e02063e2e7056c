"""What is found about a recipe before anything is read: problems, warnings and remarks, each told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 6  # of several things that a message names


@dataclass
class Findings:
    """What is wrong, what deserves a second look, and what is only said."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _found: dict[str, dict[str, None]] = field(default_factory=dict)

    def wrong(self, problem: str, tensor: str | None = None) -> None:
        """Note a problem once; of one that many tensors have, `{}` in it stands for their names."""
        names = self._found.setdefault(problem, {})
        if tensor is not None:
            names[tensor] = None

    def warn(self, warning: str) -> None:
        """Note a warning once."""
        if warning not in self.warnings:
            self.warnings.append(warning)

    def note(self, note: str) -> None:
        """Note what is only said, once."""
        if note not in self.notes:
            self.notes.append(note)

    @property
    def problems(self) -> list[str]:
        """All problems, each once."""
        return [problem.replace("{}", several([*names])) if names else problem for problem, names in self._found.items()]


def several(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    more = len(names) - 1
    return names[0] + (f" and {more} other tensor{'s' if more > 1 else ''}" if more else "")


def some(things: Sequence[str], between: str = ", ") -> str:
    """The first of several things, and whether there are more."""
    return between.join(things[:SHOWN]) + (" …" if len(things) > SHOWN else "")
