"""The experiments of the papers, over sessions: each takes a frozen dataclass of options and gives a frozen result, which is JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau._lazy import lazy

if TYPE_CHECKING:
    from thetau.studies.arithmetic import Addition as Addition
    from thetau.studies.arithmetic import Analogy as Analogy
    from thetau.studies.arithmetic import Negation as Negation
    from thetau.studies.arithmetic import OutOfDistribution as OutOfDistribution
    from thetau.studies.arithmetic import addition as addition
    from thetau.studies.arithmetic import analogy as analogy
    from thetau.studies.arithmetic import negation as negation
    from thetau.studies.arithmetic import out_of_distribution as out_of_distribution
    from thetau.studies.mixing import Family as Family
    from thetau.studies.mixing import MixedBases as MixedBases
    from thetau.studies.mixing import mixed_bases as mixed_bases
    from thetau.studies.paradigms import ParadigmResults as ParadigmResults
    from thetau.studies.paradigms import load_paradigm_results as load_paradigm_results
    from thetau.studies.paradigms import run_paradigms as run_paradigms
    from thetau.studies.suite import run_suite as run_suite
    from thetau.studies.suite_results import SuiteResults as SuiteResults
    from thetau.studies.suite_results import load_results as load_results
    from thetau.studies.tables import markdown_table as markdown_table

_HOMES = {
    "Addition": "thetau.studies.arithmetic",
    "Analogy": "thetau.studies.arithmetic",
    "Family": "thetau.studies.mixing",
    "MixedBases": "thetau.studies.mixing",
    "Negation": "thetau.studies.arithmetic",
    "OutOfDistribution": "thetau.studies.arithmetic",
    "ParadigmResults": "thetau.studies.paradigms",
    "SuiteResults": "thetau.studies.suite_results",
    "addition": "thetau.studies.arithmetic",
    "analogy": "thetau.studies.arithmetic",
    "load_paradigm_results": "thetau.studies.paradigms",
    "load_results": "thetau.studies.suite_results",
    "markdown_table": "thetau.studies.tables",
    "mixed_bases": "thetau.studies.mixing",
    "negation": "thetau.studies.arithmetic",
    "out_of_distribution": "thetau.studies.arithmetic",
    "run_paradigms": "thetau.studies.paradigms",
    "run_suite": "thetau.studies.suite",
}
__all__ = [
    "Addition",
    "Analogy",
    "Family",
    "MixedBases",
    "Negation",
    "OutOfDistribution",
    "ParadigmResults",
    "SuiteResults",
    "addition",
    "analogy",
    "load_paradigm_results",
    "load_results",
    "markdown_table",
    "mixed_bases",
    "negation",
    "out_of_distribution",
    "run_paradigms",
    "run_suite",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
