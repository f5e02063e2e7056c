"""Grids that widen until the best is inside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thetau.errors import DataError
from thetau.evaluate import Accuracy, choose_scale
from thetau.evaluate.grids import LOWEST, search


@given(best=st.floats(0.03, 5.0))
def test_the_best_of_a_bowl_is_inside(best: float) -> None:
    found = search((0.5, 1.0), lambda value: -((value - best) ** 2))
    assert not found.at_end
    ordered = sorted(found.tried)
    place = ordered.index(found.best)
    assert ordered[place - 1] <= best <= ordered[place + 1], "the neighbours bracket the true maximum"


def test_what_still_lies_at_an_end_says_so() -> None:
    low = search((0.2, 0.4), lambda value: -value)
    assert (low.best, low.at_end) == (LOWEST, True)
    high = search((0.5, 1.0), lambda value: value)
    assert (high.best, high.at_end) == (10.0, True)


def test_zero_wins_only_where_it_is_better() -> None:
    assert search((0.0, 0.5, 1.0), lambda value: -value).best == 0.0
    assert search((0.0, 0.5, 1.0), lambda value: 1.0).best == LOWEST, "among equals the smallest above 0"
    assert search((0.0, 0.5, 1.0), lambda value: 1.0, zero_wins_ties=True).best == 0.0
    assert not search((0.0, 0.5), lambda value: -value).at_end, "below 0 there is nothing to try"


def test_one_value_is_given_and_negative_ones_are_left_alone() -> None:
    seen: list[float] = []
    assert search((1.0,), lambda value: seen.append(value) or 0.0).tried == (1.0,)  # type: ignore[func-returns-value]
    assert seen == [1.0]
    assert search((-1.0, 0.0, 1.0), lambda value: value).tried == (-1.0, 0.0, 1.0)
    assert search((-1.0, 0.0, 1.0), lambda value: value).at_end


@pytest.mark.parametrize("grid", [(), (0.5, 0.5)])
def test_no_grid(grid: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"different numbers, at least one"):
        search(grid, lambda value: 0.0)


def test_the_choice_of_lambda_goes_on_below_the_grid() -> None:
    """The grid of a suite began at 0.5 while the best of a sum of many vectors was 0.1."""
    curve = {0.5: 40, 0.7: 30, 0.25: 60, 0.125: 80, 0.0625: 70}
    chosen = choose_scale([0.5, 0.7], lambda scale: {"a": Accuracy.of(curve[scale], 100)}, {"a": Accuracy.of(80, 100)})
    assert (chosen.scale, chosen.at_end) == (0.125, False)
    assert [trial.scale for trial in chosen.trials] == [0.5, 0.7, 0.25, 0.125, 0.0625]
