"""Evaluation: accuracy with its uncertainty, normalised accuracy, the choice of λ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau._lazy import lazy

if TYPE_CHECKING:
    from thetau.evaluate.accuracy import Accuracy as Accuracy
    from thetau.evaluate.answers import Answers as Answers
    from thetau.evaluate.evaluator import Evaluator as Evaluator
    from thetau.evaluate.means import average as average
    from thetau.evaluate.means import normalised as normalised
    from thetau.evaluate.measures import Loss as Loss
    from thetau.evaluate.measures import Measure as Measure
    from thetau.evaluate.options import Backbone as Backbone
    from thetau.evaluate.options import Limits as Limits
    from thetau.evaluate.options import Reading as Reading
    from thetau.evaluate.options import Sample as Sample
    from thetau.evaluate.search import ScaleSearch as ScaleSearch
    from thetau.evaluate.search import choose_scale as choose_scale
    from thetau.evaluate.session import Session as Session

_HOMES = {
    "Accuracy": "thetau.evaluate.accuracy",
    "Answers": "thetau.evaluate.answers",
    "Backbone": "thetau.evaluate.options",
    "Evaluator": "thetau.evaluate.evaluator",
    "Limits": "thetau.evaluate.options",
    "Loss": "thetau.evaluate.measures",
    "Measure": "thetau.evaluate.measures",
    "Reading": "thetau.evaluate.options",
    "Sample": "thetau.evaluate.options",
    "ScaleSearch": "thetau.evaluate.search",
    "Session": "thetau.evaluate.session",
    "average": "thetau.evaluate.means",
    "choose_scale": "thetau.evaluate.search",
    "normalised": "thetau.evaluate.means",
}
__all__ = [
    "Accuracy",
    "Answers",
    "Backbone",
    "Evaluator",
    "Limits",
    "Loss",
    "Measure",
    "Reading",
    "Sample",
    "ScaleSearch",
    "Session",
    "average",
    "choose_scale",
    "normalised",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
