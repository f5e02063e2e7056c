"""The figures of the search's page are those of the trials that stand beside it."""

from __future__ import annotations

import pytest

from experiments.common import DOCS, EXPERIMENTS
from thetau.diagnostics.results import load_result
from thetau.studies import Searched

ROWS = {"the recipe as it was": ("by_task", False), "one λ": ("one", True), "λ by task": ("by_task", True)}


@pytest.mark.parametrize("start", ROWS)
def test_a_row_is_what_the_trials_say(start: str) -> None:
    name, best = ROWS[start]
    found = load_result(Searched, EXPERIMENTS / "search" / f"{name}.json")
    number = found.best[0] if best else found.start
    assert number is not None
    trial = found.trial(number)
    test = next(one for one in found.test if one.number == (number if best else None))
    assert test.absolute is not None and test.normalised is not None
    figures = [trial.objectives["normalised"], trial.objectives["worst"], test.absolute, test.normalised]
    page = (DOCS / "search.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [f"{100 * figure:.1f}" for figure in figures]
    if best:
        assert f"best of {len(found.trials)}" in row
    states = [one.state for one in load_result(Searched, EXPERIMENTS / "search" / "by_task.json").trials]
    told = f"Of {len(states)} trials {states.count('complete')} were measured on all 150 examples a task and {states.count('pruned')} stopped"
    assert told in page
