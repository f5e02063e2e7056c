"""A method on the whole stack, written three ways: the same result."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthetic import differences, merged_vector, models, relative
from thetau.testing import SHAPES, check_method

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TASKS = ("zebra", "ape", "Cat")


@pytest.fixture(scope="module")
def ways() -> ModuleType:
    spec = importlib.util.spec_from_file_location("three_ways", EXAMPLES / "three_ways.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["three_ways"] = module  # its annotations are read from there
    spec.loader.exec_module(module)
    return module


def test_the_three_agree_and_are_the_best_of_their_rank(ways: Any) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and 0 not in shape}
    base, tuned = models(shapes, TASKS)
    whole, streamed, chained = (merged_vector(base, tuned, cls(rank=3)) for cls in (ways.Whole, ways.Streamed, ways.Projected))
    tau = differences(base, tuned)
    for name in shapes:
        total = sum(tau[task][name].double() for task in TASKS)
        u, s, vt = torch.linalg.svd(total, full_matrices=False)  # type: ignore[arg-type]
        for got in (whole[name], streamed[name], chained[name]):
            assert relative(got, (u[:, :3] * s[:3]) @ vt[:3]) < 1e-5, name


def test_the_stream_passes_the_common_tests(ways: Any) -> None:
    check_method(ways.Streamed())
