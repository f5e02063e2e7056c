"""What a causal language model's evaluation gives: a value with its interval, and all that was counted besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Answers:
    """`value` of the metric `name` on `n` examples, with the 95 % interval `low`..`high`.

    - `correct`: the examples that are right; None for a perplexity.
    - `too_long`: examples that do not fit the context, counted as wrong; of a perplexity texts that were scored in several windows.
    - `unfinished`: generations that no end token and no stop string ended. `unread`: answers that could not be extracted, counted as wrong; `shown` has
      some of them.
    """

    name: str
    value: float
    n: int
    low: float
    high: float
    correct: int | None = None
    too_long: int = 0
    unfinished: int = 0
    unread: int = 0
    shown: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was counted besides, in sentences."""
        windows = "scored in several windows" if self.correct is None else "counted as wrong"
        told = (
            (self.too_long, f"longer than the context, {windows}"),
            (self.unfinished, "generated without an end"),
            (self.unread, "without an answer that could be extracted, counted as wrong: " + "; ".join(map(repr, self.shown))),
        )
        return tuple(f"{count} {said}" for count, said in told if count)
