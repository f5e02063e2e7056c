"""What executors run: work on one step at a time, and what they tell of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from thetau.plan import Step


class Work(ABC):
    """A function of a step that may be sent to other processes; it lists whose findings must come back from there."""

    @abstractmethod
    def __call__(self, step: Step) -> Any:
        """Do it."""

    def guards(self) -> Sequence[Any]:
        """Objects with `give` and `take`."""
        return ()


@dataclass(frozen=True)
class Call(Work):
    """A plain function as work."""

    function: Callable[[Step], Any]

    def __call__(self, step: Step) -> Any:
        """Call it."""
        return self.function(step)


@runtime_checkable
class Progress(Protocol):
    """Told of work in bytes."""

    def begin(self, description: str, total: int) -> None:
        """Some work of so many bytes begins."""

    def advance(self, done: int) -> None:
        """So many bytes are done."""

    def end(self) -> None:
        """It has ended, well or not."""


class Silent:
    """No progress bar."""

    def begin(self, description: str, total: int) -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def gigabytes(count: float) -> str:
    """`"1.50 GB"`, or in MB or kB where it is less than a tenth of the larger unit."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
