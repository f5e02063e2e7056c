"""What can be wrong with a method once the tensors and tasks are known: patterns that fit nothing, tasks that are not there."""

from __future__ import annotations

from collections.abc import Sequence

from thetau.checkpoint import check_patterns
from thetau.errors import RecipeError
from thetau.parts import SELECTIONS, Chain, PerPattern, PerTask, Site


def check_fields(chain: Chain, names: Sequence[str], sites: Sequence[Site]) -> None:
    """Resolve every field that varies, at every tensor that the chain acts on, before anything is read.

    Raises:
        RecipeError: all that is wrong: a pattern that fits no tensor, a tensor that no pattern fits, a task without a value.
    """
    problems: list[str] = []
    selection = chain.selection.tensors
    if selection not in SELECTIONS:
        problems += check_patterns([selection] if isinstance(selection, str) else selection, names, "tensors")
    for field, value in ((name, value) for _, name, value in chain.fields() if isinstance(value, PerTask | PerPattern)):
        if isinstance(value, PerPattern):
            problems += check_patterns(value.values, names, f"{field}.per_pattern")
        if isinstance(value, PerTask):
            for task, one in value.values.items():
                if isinstance(one, PerPattern):
                    problems += check_patterns(one.values, names, f"{field}.per_task.{task}.per_pattern")
        for site in sites:
            try:
                site.per_task(value)
            except RecipeError as error:
                problems += [
                    f"{field}.{problem}" if problem.startswith("per_") else f"{field}: {problem}" for problem in error.problems
                ]
                break  # the other tensors would say the same
    if problems:
        raise RecipeError(problems, "method")
