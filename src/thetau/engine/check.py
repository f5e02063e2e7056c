"""What can be wrong with a method once the tensors and tasks are known: patterns that fit nothing, tasks that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        for patterns in _patterns(value):
            problems += check_patterns(patterns.values, names, f"{field}.per_pattern")
        for site in sites:
            try:
                site.per_task(value)
            except RecipeError as error:
                problems += [
                    f"{field}.{problem}" if problem.startswith("per_") else f"{field}: {problem}" for problem in error.problems
                ]
                break  # the other tensors would say the same
    for part in [] if problems else chain.stages:
        for site in sites:
            try:
                part.check(site)
            except RecipeError as error:
                problems += error.problems
                break
    if problems:
        # A method may be its own part, and its fields stand in two then.
        raise RecipeError(list(dict.fromkeys(problems)), "method")


def _patterns(value: PerTask | PerPattern) -> Iterator[PerPattern]:
    inside = value.values.values() if isinstance(value, PerTask) else (value,)
    yield from (one for one in inside if isinstance(one, PerPattern))
