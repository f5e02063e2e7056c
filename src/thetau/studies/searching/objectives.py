"""What a search makes as good as it can: a number for each objective from the values of the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from thetau.errors import RecipeError, nearest
from thetau.evaluate.means import average, normalised, worthless
from thetau.evaluate.measures import Loss, Measure

WORDS = {
    "normalised": "the mean over tasks of the value over that of the task's own model",
    "worst": "the lowest of these shares",
    "mean": "the mean value over tasks",
    "loss": "the mean loss over tasks, made small",
}


@final
@dataclass(frozen=True, kw_only=True)
class Objective:
    """One of `WORDS`, over the tasks that are merged, or the value of one task. `lower`: that is better when lower, as a perplexity is."""

    name: str
    merged: tuple[str, ...]
    lower: bool = False

    @property
    def smaller(self) -> bool:
        """Whether less is better."""
        return self.lower or self.name == "loss"

    @property
    def of_task(self) -> bool:
        """Whether it is one task's value."""
        return self.name not in WORDS

    def value(self, values: Mapping[str, Measure], losses: Mapping[str, Loss], own: Mapping[str, Measure]) -> float | None:
        """The number, of the tasks that were measured; None where its task was not yet."""
        if self.of_task:
            return values[self.name].value if self.name in values else None
        measured = {task: one for task, one in values.items() if task in self.merged}
        if not measured:
            return None
        match self.name:
            case "normalised":
                return normalised(measured, own)
            case "worst":
                left_out = set(worthless(own))
                shares = [one.value / own[task].value for task, one in measured.items() if task not in left_out]
                return min(shares) if shares else min(one.value for one in measured.values())
            case "mean":
                return average(measured)
        return sum(losses[task].value for task in measured) / len(measured)

    def loss(self, value: float) -> float:
        """The same with less being better."""
        return value if self.smaller else -value


def objectives_of(
    names: Sequence[str], merged: Sequence[str], tasks: Sequence[str], perplexities: Sequence[str] = ()
) -> tuple[Objective, ...]:
    """Objectives by name; by default `normalised`. Raises `RecipeError`: one that is neither known nor a task, one twice, a mean over perplexities.

    - `merged`: the tasks of the models that are merged. `tasks`: all that are measured. `perplexities`: those whose value is a perplexity.
    """
    asked = tuple(names) or ("normalised",)
    known = [*WORDS, *tasks]
    problems = [f"no objective {name!r}.{nearest(name, known)} Known: {', '.join(known)}." for name in asked if name not in known]
    problems += [f"{name!r} is given twice." for name in sorted(set(asked)) if asked.count(name) > 1]
    if none := [task for task in merged if task in perplexities]:
        problems += [
            f"{name!r} is of shares, and {', '.join(none)} is measured by its perplexity. Take `loss`, or the tasks by their names."
            for name in asked
            if name in WORDS and name != "loss"
        ]
    if problems:
        raise RecipeError(problems, "--objective")
    return tuple(Objective(name=name, merged=tuple(merged), lower=name in perplexities) for name in asked)
