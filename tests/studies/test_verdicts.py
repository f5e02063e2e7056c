"""The rules of verdicts: intervals against brute force and a textbook, words, equal control."""

from __future__ import annotations

import math
from itertools import product
from statistics import mean, stdev

import pytest

from thetau.errors import DataError
from thetau.studies.verdicts import _variances, at_control, at_end, few_examples, judge, lead_of


def test_with_one_seed_the_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    lead = lead_of({str(i): [value] for i, value in enumerate(values)})
    half = 3.182446305284263 * stdev(values) / 2  # t of 3 degrees of freedom, from tables
    assert (lead.low, lead.high) == pytest.approx((mean(values) - half, mean(values) + half), rel=1e-12)


def test_the_variance_is_that_of_drawing_tasks_and_seeds_apart() -> None:
    """Every resample of 3 tasks and 2 seeds, each as likely; the closed form's parts are unbiased, so they are brought back first."""
    rows = [[1.0, 3.0], [2.0, 2.5], [6.0, 4.0]]
    means = [
        mean(rows[i][j] for i in tasks for j in seeds)
        for tasks in product(range(3), repeat=3)
        for seeds in product(range(2), repeat=2)
    ]
    every = mean((value - mean(means)) ** 2 for value in means)
    (by_task, _), (by_seed, _), (left, _) = _variances(rows)
    assert by_task * 2 / 3 + by_seed / 2 + left * 2 / 6 == pytest.approx(every, rel=1e-12)


def test_degrees_of_freedom_fall_to_those_of_the_part_that_varies() -> None:
    """Tasks alike, seeds apart: all the variance is that of two seeds, so t has one degree of freedom."""
    lead = lead_of({task: [0.0, 2.0] for task in "abcdef"})
    assert lead.high - lead.value == pytest.approx(12.706204736174698 * 1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "lower", "word"),
    [
        ([1.0, 1.5, 2.0], False, "holds"),
        ([1.0, 1.5, 2.0], True, "does not hold"),
        ([-1.0, -1.5, -2.0], True, "holds"),
        ([-1.0, 1.0, 0.5], False, "not told apart"),
        ([0.0, 0.0, 0.0], False, "not told apart"),
        ([3.0], False, "no verdict"),
    ],
)
def test_words(values: list[float], lower: bool, word: str) -> None:
    assert judge({str(i): [value] for i, value in enumerate(values)}, lower=lower).word == word


def test_an_objection_takes_the_verdict_and_leaves_the_lead() -> None:
    found = judge({"a": [1.0], "b": [1.5], "c": [2.0]}, reasons=few_examples(60))
    assert found.word == "no verdict"
    assert (
        str(found)
        == "no verdict (+1.5, +0.3 to +2.7; 3 tasks): from 60 validation examples a task, where 500, or all that there are, are needed"
    )
    assert str(judge({})) == "no verdict: not measured"
    alone = lead_of({"a": [1.0]})
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match=r"same seeds for every task. Got a: 1, b: 2"):
        lead_of({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"floor, 0.9. Got 0.8 at α = 0"):
        at_control([(0.0, 0.5, 0.8)], 0.9)


def test_sizes_and_ends() -> None:
    assert few_examples(500) == []
    assert few_examples(200, 200) == []
    assert few_examples(100, 200) == ["from 100 validation examples a task, where 200 are needed"]
    assert at_end([(0.0, (0.0, 1.0)), (1.0, (0.0, 1.0)), (0.5, (0.0, 0.5, 1.0))]) == [
        "1 of 3 coefficients at the end of their grid"
    ]


def test_equal_control_is_read_between_the_points() -> None:
    curve = [(0.0, 0.9, 0.8), (1.0, 0.2, 0.78), (2.0, 0.6, 0.70)]
    found = at_control(curve, 0.74)
    assert (found.alpha, found.inside) == (pytest.approx(1.5), True)
    assert found.target == pytest.approx(0.2), "a smaller α that keeps the control forgets more than the crossing's 0.4"
    over = at_control(curve, 0.5)
    assert (over.alpha, over.inside) == (2.0, False)


def test_one_example_of_the_control_decides_nothing() -> None:
    """71 of 100 where 71.25 was needed: the grid alone falls back to α = 0, the crossing moves by a hair."""
    kept = at_control([(0.0, 0.7, 0.75), (0.1, 0.4, 0.72)], 0.7125)
    lost = at_control([(0.0, 0.7, 0.75), (0.1, 0.4, 0.71)], 0.7125)
    assert kept.target == pytest.approx(0.4)
    assert lost.target == pytest.approx(0.7 - 0.3 * 0.0375 / 0.04)
