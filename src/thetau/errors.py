"""One root error and its few kinds.

Every message says the rule, what was got and what to do, and names the file and the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ThetauError(Exception):
    """The root of every error that thetau raises on purpose."""


class CheckpointError(ThetauError):
    """A file or a folder of weights cannot be read, or is not what it says it is."""


class AlignmentError(ThetauError):
    """Checkpoints do not fit each other: names, shapes, dtypes, bases."""


class RecipeError(ThetauError):
    """A recipe, or the options of a command, are wrong; `problems` holds every one that was found."""

    def __init__(self, problems: Sequence[str], where: str = "recipe") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{where}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))
        self._where = where

    def __reduce__(self) -> tuple[type, tuple[list[str], str]]:
        return RecipeError, (self.problems, self._where)


class OutputError(ThetauError):
    """An output cannot be written; nothing that looks whole was left behind."""


class BankError(ThetauError):
    """A bank of bases cannot be read, or cannot do what is asked of it."""


class DataError(ThetauError):
    """A task's data, labels or model do not fit each other."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` when a known name is near, else the empty string; made to end a message.

    Examples:
        >>> nearest("tise", ["ties", "dare_ties"])
        " Did you mean 'ties'?"
    """
    close = get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class PartError(ThetauError):
    """A part of a method failed; the message names the part, the tensor and what went wrong."""
