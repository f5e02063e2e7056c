"""Evaluation: accuracy with its uncertainty, normalised accuracy, the choice of λ, and the run of a whole suite."""

from thetau.evaluate.accuracy import Accuracy as Accuracy
from thetau.evaluate.arithmetic import Addition as Addition
from thetau.evaluate.arithmetic import Analogy as Analogy
from thetau.evaluate.arithmetic import Negation as Negation
from thetau.evaluate.arithmetic import OutOfDistribution as OutOfDistribution
from thetau.evaluate.arithmetic import addition as addition
from thetau.evaluate.arithmetic import analogy as analogy
from thetau.evaluate.arithmetic import negation as negation
from thetau.evaluate.arithmetic import out_of_distribution as out_of_distribution
from thetau.evaluate.evaluator import Evaluator as Evaluator
from thetau.evaluate.measures import Loss as Loss
from thetau.evaluate.measures import Measure as Measure
from thetau.evaluate.mixing import Family as Family
from thetau.evaluate.mixing import MixedBases as MixedBases
from thetau.evaluate.mixing import mixed_bases as mixed_bases
from thetau.evaluate.normalised import average as average
from thetau.evaluate.normalised import normalised as normalised
from thetau.evaluate.results import SuiteResults as SuiteResults
from thetau.evaluate.results import load_results as load_results
from thetau.evaluate.search import ScaleSearch as ScaleSearch
from thetau.evaluate.search import choose_scale as choose_scale
from thetau.evaluate.tables import markdown_table as markdown_table

__all__ = [
    "Accuracy",
    "Addition",
    "Analogy",
    "Evaluator",
    "Family",
    "Loss",
    "Measure",
    "MixedBases",
    "Negation",
    "OutOfDistribution",
    "ScaleSearch",
    "SuiteResults",
    "addition",
    "analogy",
    "average",
    "choose_scale",
    "load_results",
    "markdown_table",
    "mixed_bases",
    "negation",
    "normalised",
    "out_of_distribution",
]
