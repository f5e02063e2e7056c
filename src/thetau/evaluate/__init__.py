"""Evaluation: accuracy with its uncertainty, normalised accuracy, the choice of λ, and the run of a whole suite."""

from thetau.evaluate.accuracy import Accuracy as Accuracy
from thetau.evaluate.evaluator import Evaluator as Evaluator
from thetau.evaluate.normalised import average as average
from thetau.evaluate.normalised import normalised as normalised
from thetau.evaluate.results import SuiteResults as SuiteResults
from thetau.evaluate.results import load_results as load_results
from thetau.evaluate.search import ScaleSearch as ScaleSearch
from thetau.evaluate.search import choose_scale as choose_scale
from thetau.evaluate.tables import markdown_table as markdown_table

__all__ = [
    "Accuracy",
    "Evaluator",
    "ScaleSearch",
    "SuiteResults",
    "average",
    "choose_scale",
    "load_results",
    "markdown_table",
    "normalised",
]
