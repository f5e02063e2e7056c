"""A task's metric on predictions and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from thetau.evaluate.accuracy import Accuracy
from thetau.evaluate.answers import Answers
from thetau.tasks.metrics import Score, f1, matthews, pearson
from thetau.tasks.task import Metric

Measure = Accuracy | Score | Answers
"""What an evaluation gives: `value` with `n` and a 95 % interval `low`..`high`; accuracies and a causal model's answers also have counts."""


@final
@dataclass(frozen=True, kw_only=True)
class Loss:
    """A head's mean loss over `n` examples."""

    value: float
    n: int


def measure(metric: Metric, predictions: Tensor, labels: Sequence[int | float]) -> Measure:
    """The value of `metric`. Raises `DataError` where it is not defined."""
    if metric == "pearson":
        return pearson([float(value) for value in predictions], [float(value) for value in labels])
    guesses, classes = [int(value) for value in predictions], [int(value) for value in labels]
    match metric:
        case "accuracy":
            return Accuracy.of(sum(map(int.__eq__, guesses, classes)), len(classes))
        case "matthews":
            return matthews(guesses, classes)
    return f1(guesses, classes, average={"f1": "binary", "macro_f1": "macro"}[metric])


def perplexities(measures: Mapping[str, Measure]) -> tuple[str, ...]:
    """The tasks whose value is a perplexity: no share of anything, and better when lower."""
    return tuple(task for task, one in measures.items() if isinstance(one, Answers) and one.correct is None)
