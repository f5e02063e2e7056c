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
    from thetau.studies.banks import BasesAdded as BasesAdded
    from thetau.studies.banks import BasisNegated as BasisNegated
    from thetau.studies.banks import TaskServed as TaskServed
    from thetau.studies.banks import add_bases as add_bases
    from thetau.studies.banks import bank_model as bank_model
    from thetau.studies.banks import negate_basis as negate_basis
    from thetau.studies.banks import serve_task as serve_task
    from thetau.studies.by_paradigm import AlphaCurves as AlphaCurves
    from thetau.studies.by_paradigm import Costs as Costs
    from thetau.studies.by_paradigm import SingleTasks as SingleTasks
    from thetau.studies.by_paradigm import alpha_curves as alpha_curves
    from thetau.studies.by_paradigm import costs as costs
    from thetau.studies.by_paradigm import single_tasks as single_tasks
    from thetau.studies.checkpoints import CheckpointMeasured as CheckpointMeasured
    from thetau.studies.checkpoints import evaluate_checkpoint as evaluate_checkpoint
    from thetau.studies.harness import HarnessMeasured as HarnessMeasured
    from thetau.studies.harness import evaluate_harness as evaluate_harness
    from thetau.studies.measures import bounds as bounds
    from thetau.studies.measures import cosines as cosines
    from thetau.studies.measures import disentanglement as disentanglement
    from thetau.studies.measures import kernel as kernel
    from thetau.studies.measures import tau_jp as tau_jp
    from thetau.studies.mixing import Family as Family
    from thetau.studies.mixing import MixedBases as MixedBases
    from thetau.studies.mixing import mixed_bases as mixed_bases
    from thetau.studies.options import AddBases as AddBases
    from thetau.studies.options import CompareBases as CompareBases
    from thetau.studies.options import DisentanglementGrid as DisentanglementGrid
    from thetau.studies.options import Evaluate as Evaluate
    from thetau.studies.options import Finding as Finding
    from thetau.studies.options import LossBounds as LossBounds
    from thetau.studies.options import NegateBasis as NegateBasis
    from thetau.studies.options import Outer as Outer
    from thetau.studies.options import Search as Search
    from thetau.studies.options import ServeTask as ServeTask
    from thetau.studies.options import Sweep as Sweep
    from thetau.studies.options import Tune as Tune
    from thetau.studies.paradigms import ParadigmResults as ParadigmResults
    from thetau.studies.paradigms import load_paradigm_results as load_paradigm_results
    from thetau.studies.paradigms import run_paradigms as run_paradigms
    from thetau.studies.partitions import Bench as Bench
    from thetau.studies.partitions import PartitionStudy as PartitionStudy
    from thetau.studies.partitions import Savings as Savings
    from thetau.studies.partitions import study_partitions as study_partitions
    from thetau.studies.savings import BasesCompared as BasesCompared
    from thetau.studies.savings import compare_bases as compare_bases
    from thetau.studies.searching import Searched as Searched
    from thetau.studies.searching import SearchTrial as SearchTrial
    from thetau.studies.searching import best_recipe as best_recipe
    from thetau.studies.searching import search as search
    from thetau.studies.suite import run_suite as run_suite
    from thetau.studies.suite_results import SuiteResults as SuiteResults
    from thetau.studies.suite_results import load_results as load_results
    from thetau.studies.sweeps import Swept as Swept
    from thetau.studies.sweeps import sweep as sweep
    from thetau.studies.tables import markdown_table as markdown_table
    from thetau.studies.tuning import Tuned as Tuned
    from thetau.studies.tuning import tune as tune

_HOMES = {
    "AddBases": "thetau.studies.options",
    "Addition": "thetau.studies.arithmetic",
    "AlphaCurves": "thetau.studies.by_paradigm",
    "Analogy": "thetau.studies.arithmetic",
    "BasesAdded": "thetau.studies.banks",
    "BasesCompared": "thetau.studies.savings",
    "BasisNegated": "thetau.studies.banks",
    "Bench": "thetau.studies.partitions",
    "CheckpointMeasured": "thetau.studies.checkpoints",
    "CompareBases": "thetau.studies.options",
    "Costs": "thetau.studies.by_paradigm",
    "DisentanglementGrid": "thetau.studies.options",
    "Evaluate": "thetau.studies.options",
    "Family": "thetau.studies.mixing",
    "Finding": "thetau.studies.options",
    "LossBounds": "thetau.studies.options",
    "MixedBases": "thetau.studies.mixing",
    "NegateBasis": "thetau.studies.options",
    "Negation": "thetau.studies.arithmetic",
    "OutOfDistribution": "thetau.studies.arithmetic",
    "Outer": "thetau.studies.options",
    "ParadigmResults": "thetau.studies.paradigms",
    "PartitionStudy": "thetau.studies.partitions",
    "Savings": "thetau.studies.partitions",
    "Search": "thetau.studies.options",
    "SearchTrial": "thetau.studies.searching",
    "Searched": "thetau.studies.searching",
    "ServeTask": "thetau.studies.options",
    "SingleTasks": "thetau.studies.by_paradigm",
    "SuiteResults": "thetau.studies.suite_results",
    "Sweep": "thetau.studies.options",
    "Swept": "thetau.studies.sweeps",
    "TaskServed": "thetau.studies.banks",
    "Tune": "thetau.studies.options",
    "Tuned": "thetau.studies.tuning",
    "add_bases": "thetau.studies.banks",
    "addition": "thetau.studies.arithmetic",
    "alpha_curves": "thetau.studies.by_paradigm",
    "analogy": "thetau.studies.arithmetic",
    "bank_model": "thetau.studies.banks",
    "best_recipe": "thetau.studies.searching",
    "bounds": "thetau.studies.measures",
    "compare_bases": "thetau.studies.savings",
    "cosines": "thetau.studies.measures",
    "costs": "thetau.studies.by_paradigm",
    "disentanglement": "thetau.studies.measures",
    "HarnessMeasured": "thetau.studies.harness",
    "evaluate_checkpoint": "thetau.studies.checkpoints",
    "evaluate_harness": "thetau.studies.harness",
    "kernel": "thetau.studies.measures",
    "load_paradigm_results": "thetau.studies.paradigms",
    "load_results": "thetau.studies.suite_results",
    "markdown_table": "thetau.studies.tables",
    "mixed_bases": "thetau.studies.mixing",
    "negate_basis": "thetau.studies.banks",
    "negation": "thetau.studies.arithmetic",
    "out_of_distribution": "thetau.studies.arithmetic",
    "run_paradigms": "thetau.studies.paradigms",
    "run_suite": "thetau.studies.suite",
    "search": "thetau.studies.searching",
    "serve_task": "thetau.studies.banks",
    "single_tasks": "thetau.studies.by_paradigm",
    "study_partitions": "thetau.studies.partitions",
    "sweep": "thetau.studies.sweeps",
    "tau_jp": "thetau.studies.measures",
    "tune": "thetau.studies.tuning",
}
__all__ = [
    "AddBases",
    "Addition",
    "AlphaCurves",
    "Analogy",
    "BasesAdded",
    "BasesCompared",
    "BasisNegated",
    "Bench",
    "CheckpointMeasured",
    "CompareBases",
    "Costs",
    "DisentanglementGrid",
    "Evaluate",
    "Family",
    "Finding",
    "HarnessMeasured",
    "LossBounds",
    "MixedBases",
    "NegateBasis",
    "Negation",
    "OutOfDistribution",
    "Outer",
    "ParadigmResults",
    "PartitionStudy",
    "Savings",
    "Search",
    "SearchTrial",
    "Searched",
    "ServeTask",
    "SingleTasks",
    "SuiteResults",
    "Sweep",
    "Swept",
    "TaskServed",
    "Tune",
    "Tuned",
    "add_bases",
    "addition",
    "alpha_curves",
    "analogy",
    "bank_model",
    "best_recipe",
    "bounds",
    "compare_bases",
    "cosines",
    "costs",
    "disentanglement",
    "evaluate_checkpoint",
    "evaluate_harness",
    "kernel",
    "load_paradigm_results",
    "load_results",
    "markdown_table",
    "mixed_bases",
    "negate_basis",
    "negation",
    "out_of_distribution",
    "run_paradigms",
    "run_suite",
    "search",
    "serve_task",
    "single_tasks",
    "study_partitions",
    "sweep",
    "tau_jp",
    "tune",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
