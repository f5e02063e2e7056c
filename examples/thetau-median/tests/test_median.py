"""The common tests, and what only a median does."""

import torch
from thetau_median import Median

from thetau.testing import check_method, merged_vector


def test_it_passes_the_common_tests() -> None:
    """Those of every method of thetau."""
    check_method(Median())
    check_method(Median(), tasks=4)


def test_one_task_that_went_astray_moves_nothing() -> None:
    """The median of 1, 2 and a million is 2."""
    base = {"w": torch.zeros(2)}
    tuned = {name: {"w": torch.tensor([value, -value])} for name, value in (("a", 1.0), ("b", 2.0), ("c", 1e6))}
    assert merged_vector(base, tuned, Median())["w"].tolist() == [2.0, -2.0]
