"""F1, Matthews' and Pearson's correlation, each with a 95 % interval. (Accuracy and its interval are in `thetau.evaluate`.)

Values through scikit-learn and scipy. The intervals of F1 and Matthews are percentile bootstraps (Efron & Tibshirani, 1993):
resampling n examples with replacement is a multinomial draw of the confusion matrix, so that 1,000 of them cost next to nothing.
Pearson's is Fisher's z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from thetau.errors import DataError

RESAMPLES = 1000
_SEED = 0


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """`value` of the metric `name` on `n` examples, with the 95 % interval `low`..`high`."""

    name: str
    value: float
    n: int
    low: float
    high: float


def f1(predictions: Sequence[int], labels: Sequence[int], average: str = "binary") -> Score:
    """F1 of class 1 (`binary`), or the mean of F1 over the classes that occur (`macro`); 0 where a class is never right.

    Raises `DataError`: lengths, labels that are not of two classes, no example of class 1.
    """
    if average not in ("binary", "macro"):
        raise DataError(f"`f1(average=...)` must be binary or macro. Got {average!r}.")
    _check(predictions, labels, "F1")
    if average == "binary":
        if not {*predictions, *labels} <= {0, 1}:
            got = sorted({*predictions, *labels})
            raise DataError(f"binary F1 needs labels 0 and 1. Got {got[:8]}; use average='macro'.")
        if 1 not in labels:
            raise DataError(f"binary F1 needs at least one example of class 1. Got none of {len(labels)}; take more examples.")
    value = float(_sklearn().f1_score(labels, predictions, average=average, zero_division=0))
    matrix = _confusion(predictions, labels)
    low, high = _bootstrap(matrix, _f1_of if average == "macro" else _binary_f1_of)
    return Score(name=f"{average} F1", value=value, n=len(labels), low=low, high=high)


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    """Matthews' correlation, of any number of classes; 0 for constant predictions, as GLUE has it.

    Raises `DataError`: lengths, or labels of one class only, for which it is not defined.
    """
    _check(predictions, labels, "Matthews' correlation")
    if len(set(labels)) < 2:
        raise DataError(f"Matthews' correlation needs labels of at least two classes. Got only {labels[0]}; take more examples.")
    value = float(_sklearn().matthews_corrcoef(labels, predictions))
    low, high = _bootstrap(_confusion(predictions, labels), _matthews_of)
    return Score(name="Matthews", value=value, n=len(labels), low=low, high=high)


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> Score:
    """Pearson's correlation; 0 for predictions that are constant, up to rounding: a model that has collapsed tells nothing, and a run goes on.

    Raises `DataError`: lengths, fewer than 4 examples, numbers that are not finite, and constant labels, for which it is not defined.
    """
    _check(predictions, labels, "Pearson's correlation")
    if len(labels) < 4:
        raise DataError(f"Pearson's correlation with an interval needs at least 4 examples. Got {len(labels)}.")
    for name, numbers in (("predictions", predictions), ("labels", labels)):
        if not all(map(math.isfinite, numbers)):
            raise DataError(f"Pearson's correlation needs finite {name}. Got NaN or Inf; look at the weights or the rows.")
    if _flat(labels):
        raise DataError(
            f"Pearson's correlation is not defined for constant labels. Got {labels[0]!r} for all {len(labels)}; take other examples."
        )
    if _flat(predictions):
        return Score(name="Pearson", value=0.0, n=len(labels), low=0.0, high=0.0)
    from scipy import stats

    found: Any = stats.pearsonr(predictions, labels)
    interval = found.confidence_interval(0.95)
    return Score(name="Pearson", value=float(found.statistic), n=len(labels), low=float(interval.low), high=float(interval.high))


def _flat(numbers: Sequence[float]) -> bool:
    """Whether they are constant up to rounding: scipy's own bound, a deviation of ε^¾ of the mean."""
    values = np.asarray(numbers, dtype=np.float64)
    middle = float(values.mean())
    return bool(float(np.linalg.norm(values - middle)) <= float(np.finfo(np.float64).eps) ** 0.75 * abs(middle))


def _check(predictions: Sequence[float], labels: Sequence[float], name: str) -> None:
    if len(predictions) != len(labels) or not labels:
        raise DataError(
            f"{name} needs as many predictions as labels, and at least one. Got {len(predictions)} and {len(labels)}."
        )


def _sklearn() -> Any:
    try:
        return import_module("sklearn.metrics")
    except ImportError as error:
        raise DataError("F1 and Matthews' correlation need scikit-learn. Install it: pip install scikit-learn") from error


def _confusion(predictions: Sequence[int], labels: Sequence[int]) -> NDArray[np.int64]:
    """Counts, `[label, prediction]`, over the classes that occur, in their order; 0 and 1 always."""
    classes = {number: place for place, number in enumerate(sorted({0, 1, *predictions, *labels}))}
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(matrix, ([classes[label] for label in labels], [classes[guess] for guess in predictions]), 1)
    return matrix


def _bootstrap(matrix: NDArray[np.int64], metric: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a metric of confusion matrices `[resample, label, prediction]`."""
    n = int(matrix.sum())
    draws = np.random.default_rng(_SEED).multinomial(n, matrix.ravel() / n, size=RESAMPLES)
    low, high = np.percentile(metric(draws.reshape(RESAMPLES, *matrix.shape).astype(np.float64)), [2.5, 97.5])
    return float(low), float(high)


def _f1_of(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """2·hits / (labels + predictions) of each class, averaged over those that occur."""
    hits, both = np.einsum("rkk->rk", matrices), matrices.sum(1) + matrices.sum(2)
    each = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(each.sum(1) / (both > 0).sum(1))


def _binary_f1_of(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    hits, both = matrices[:, 1, 1], matrices[:, :, 1].sum(1) + matrices[:, 1, :].sum(1)
    return np.asarray(np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0))


def _matthews_of(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The covariance of labels and predictions over the root of both variances (Gorodkin, 2004)."""
    n, hits = matrices.sum((1, 2)), np.einsum("rkk->r", matrices)
    true, told = matrices.sum(2), matrices.sum(1)
    spread = np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (told**2).sum(1)))
    return np.asarray(np.divide(hits * n - (true * told).sum(1), spread, out=np.zeros_like(spread), where=spread > 0))
