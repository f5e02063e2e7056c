"""A method on the whole stack, written three ways: the same result."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthetic import merged_vector, models, relative, site
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
    shape = (24, 16)
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    place = site(TASKS, shape=shape)
    u, s, vt = torch.linalg.svd(stack.double().sum(0), full_matrices=False)
    want = (u[:, :3] * s[:3]) @ vt[:3]
    stream = ways.Streamed(rank=3)
    total = stream.init(*shape, len(stack))
    for vector in stack:
        total = stream.add(total, vector, place)
    chain = ways.Projected(rank=3).chain()
    (projection,) = chain.transforms
    for got in (
        ways.Whole(rank=3).reduce(stack, None, place),
        stream.result(total, place),
        chain.reduction.reduce(projection.apply(stack, None, place), None, place),
    ):
        assert relative(got, want) < 1e-5
    assert {way(rank=3).chain().access for way in (ways.Whole, ways.Projected)} == {"whole"}


def test_they_agree_in_a_merge(ways: Any) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and 0 not in shape}
    base, tuned = models(shapes, TASKS)
    whole, streamed, chained = (merged_vector(base, tuned, cls(rank=3)) for cls in (ways.Whole, ways.Streamed, ways.Projected))
    for name in shapes:
        assert relative(streamed[name], whole[name]) < 1e-4, name
        assert relative(chained[name], whole[name]) < 1e-4, name


@pytest.mark.parametrize("way", ["Streamed", "Whole", "Projected"])
def test_they_pass_the_common_tests(ways: Any, way: str) -> None:
    check_method(getattr(ways, way)(), exempt={"round_trip": "examples/ is no package, and nothing there is registered"})
