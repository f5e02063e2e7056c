"""Measure relative to each task's own fine-tuned model.

Ilharco et al., ICLR 2023, <https://arxiv.org/abs/2212.04089>: the accuracy of a merged model on a task, divided by that of the
model fine-tuned on the task alone; averaged over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

from thetau.errors import DataError
from thetau.evaluate.measures import Measure, perplexities


def check_shares(measures: Mapping[str, Measure]) -> None:
    """Refuse a perplexity where more is taken for better. Raises `DataError`."""
    if controls := perplexities(measures):
        raise DataError(
            "a perplexity is lower where it is better, and no share of anything: it has no part in an average of tasks, and no α is chosen by it. "
            f"Got {', '.join(controls)}; measure it beside the others (thetau evaluate)."
        )


def average(accuracies: Mapping[str, Measure]) -> float:
    """The mean accuracy over tasks, each task counting the same.

    Examples:
        >>> from thetau.evaluate import Accuracy
        >>> average({"sst2": Accuracy.of(90, 100), "mnli": Accuracy.of(70, 100)})
        0.8
    """
    if not accuracies:
        raise DataError("an average needs the accuracy of at least one task. Got none.")
    check_shares(accuracies)
    return sum(accuracy.value for accuracy in accuracies.values()) / len(accuracies)


def normalised(accuracies: Mapping[str, Measure], individual: Mapping[str, Measure]) -> float:
    """The mean over tasks of accuracy / individual accuracy.

    Tasks whose own model is worth nothing (a Matthews or Pearson score of 0 or less) have no share to speak of: they are left out, see
    `worthless`, and where all are, this is the average itself. Raises `DataError` for a task whose individual accuracy is absent.

    Examples:
        >>> from thetau.evaluate import Accuracy
        >>> normalised({"sst2": Accuracy.of(90, 100)}, {"sst2": Accuracy.of(100, 100)})
        0.9
    """
    lacking = [task for task in accuracies if task not in individual]
    if lacking or not accuracies:
        raise DataError(
            f"normalised accuracy needs an individual accuracy for every task. Lacking: {', '.join(lacking) or 'all'}."
        )
    check_shares(accuracies)
    left_out = set(worthless(individual))
    shares = [accuracy.value / individual[task].value for task, accuracy in accuracies.items() if task not in left_out]
    return sum(shares) / len(shares) if shares else average(accuracies)


def worthless(individual: Mapping[str, Measure]) -> tuple[str, ...]:
    """Tasks whose own model scores 0 or less, so that nothing can be relative to it."""
    return tuple(task for task, accuracy in individual.items() if accuracy.value <= 0)
