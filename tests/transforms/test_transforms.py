"""The parts of the chains, called without the engine: blocks, tasks alone, corner cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from synthetic import site
from thetau.errors import RecipeError
from thetau.methods.reductions import DisjointMean, Mean, Scale, Sum
from thetau.parts import PerPattern, PerTask, Transform
from thetau.statistics import Collect, Gram, MagnitudeQuantile, SignTotals
from thetau.sums import sum_in_order, weighted_sum
from thetau.transforms import Disentangle, Drop, Elect, Rescale, Trim, Weigh

TASKS = ("a", "b", "c")
SHAPE = (12, 7)
PLACE = site(TASKS, shape=SHAPE)


def stack(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def whole(statistic: Any, given: Tensor) -> Any:
    """All rounds over one block."""
    seen = None
    for _ in range(statistic.rounds):
        seen = statistic.finish(statistic.add(None, given, PLACE, seen), seen)
    return seen


def state_of(part: Transform, given: Tensor) -> Any:
    statistic = part.requires()
    if statistic is None:
        return part.prepare(None, TASKS)
    found = whole(statistic, given)
    return part.prepare({PLACE.name: found} if statistic.per_tensor else found, TASKS)


PARTS: list[Any] = [
    Trim(density=0.3),
    Trim(density=1.0),
    Drop(rate=0.5),
    Drop(rate=PerTask({"a": 0.5, "b": 0.0, "c": 0.9}), rescale=False),
    Trim(density=0.3, gamma=0.1, count="floor"),
    Weigh(weights=PerTask({"a": 0.5, "b": -1.0, "c": 0.0})),
    Rescale(masking=Trim(density=0.3), scope="vector"),
    Rescale(masking=Trim(density=0.3, scope="tensor")),
    Rescale(masking=Drop(rate=0.5, rescale=False)),
    Elect(cancelled="positive"),
    Elect(),
    Elect(cancelled="majority"),
    Disentangle(),
    Disentangle(scope="row"),
]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_any_rows_at_a_time_give_the_same_bits_and_the_input_stays(part: Any) -> None:
    given = stack()
    before = given.clone()
    state = state_of(part, given)
    once = part.apply(given, state, PLACE)
    assert torch.equal(given, before)
    assert once.shape == given.shape
    for step in (5,) if part == Disentangle(scope="row") else (1, 5):
        pieces = [
            part.apply(given[:, row : row + step], state, site(TASKS, shape=SHAPE, start=row)) for row in range(0, SHAPE[0], step)
        ]
        if part == Disentangle(scope="row"):  # batches of another size: equal but for rounding; the engine's blocks are fixed
            torch.testing.assert_close(torch.cat(pieces, 1), once, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(torch.cat(pieces, 1), once)


BY_TASK = [
    part for part in PARTS if part.per_task and "PerTask" not in repr(part)
]  # numbers by task are checked against all tasks


@pytest.mark.parametrize("part", BY_TASK, ids=repr)
def test_parts_that_say_so_treat_each_task_alone(part: Any) -> None:
    given = stack()
    state = state_of(part, given)
    together = part.apply(given, state, PLACE)
    for index, task in enumerate(TASKS):
        assert torch.equal(part.apply(given[index : index + 1], state, site([task], shape=SHAPE))[0], together[index])


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 2, 5), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_any_number_of_axes(part: Any, shape: tuple[int, ...]) -> None:
    given = stack(1, shape)
    out = part.apply(given, state_of(part, given), site(TASKS, shape=shape))
    assert out.shape == given.shape
    assert bool(out.isfinite().all())


def test_what_each_part_asks_for() -> None:
    assert Trim(density=0.2).requires() == MagnitudeQuantile(density=0.2)
    assert Trim(density=0.2, scope="tensor").requires() == MagnitudeQuantile(density=0.2, per_tensor=True)
    assert Trim(density=1.0).requires() is None
    assert Drop(rate=0.1).requires() is None
    assert Elect().requires() is None
    assert Elect(cancelled="majority").requires() == SignTotals()
    assert Disentangle().requires() == Gram()
    assert Disentangle(scope="tensor").requires() == Gram(per_tensor=True)
    assert Disentangle(scope="row").requires() is None
    assert Disentangle(solver="adam").requires() == Collect()


def test_trim_keeps_signs_values_and_what_equals_the_cut() -> None:
    given = torch.tensor([[[3.0, -1.0, 0.5, -0.5]], [[1.0, 1.0, 1.0, 1.0]], [[0.0, -0.0, 2.0, 0.0]]])
    out = Trim(density=0.5).apply(given, state_of(Trim(density=0.5), given), site(TASKS, shape=(1, 4)))
    assert out.tolist() == [[[3.0, -1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 2.0, 0.0]]]


def test_elect() -> None:
    given = torch.tensor([[[1.0, -1.0, 2.0, 0.0, 5.0]], [[1.0, 3.0, -1.0, 0.0, -5.0]], [[-1.0, 0.0, -1.0, 0.0, 0.0]]])
    place = site(TASKS, shape=(1, 5))
    zero = Elect().apply(given, 0.0, place)
    assert zero.tolist() == [[[1, 0, 0, 0, 0]], [[1, 3, 0, 0, 0]], [[0, 0, 0, 0, 0]]]
    for sign, want in ((1.0, [[2.0, 5.0], [0.0, 0.0], [0.0, 0.0]]), (-1.0, [[0.0, 0.0], [-1.0, -5.0], [-1.0, 0.0]])):
        out = Elect(cancelled="majority").apply(given, sign, place)
        assert out[:, 0, [2, 4]].tolist() == want
        assert torch.equal(out[..., [0, 1, 3]], zero[..., [0, 1, 3]])


def test_majority_sign_of_the_totals() -> None:
    part = Elect(cancelled="majority")
    assert [part.prepare(total, TASKS) for total in (5, -3, 0)] == [1.0, -1.0, 0.0]


def test_drop_rescales() -> None:
    given = stack(shape=(200, 50))
    out = Drop(rate=0.75).apply(given, None, site(TASKS, shape=(200, 50)))
    kept = out != 0
    assert torch.equal(out[kept], given[kept] * 4)
    assert abs(float(kept.double().mean()) - 0.25) < 0.02
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(Drop(rate=0.0).apply(given, None, PLACE), given)


@pytest.mark.parametrize("rate", [1 - 1e-12, math.nextafter(1.0, 0.0)])
def test_drop_of_all_but_nothing_stays_finite(rate: float) -> None:
    out = Drop(rate=rate).apply(stack(), None, PLACE)
    assert not out.isnan().any()
    assert not out.any()


# Reductions and the scale.


def test_reductions() -> None:
    given = torch.tensor([[[1.0, 0.0, -2.0]], [[3.0, 0.0, 0.0]], [[0.0, 0.0, 4.0]]])
    place = site(TASKS, shape=(1, 3))
    assert Sum().reduce(given, None, place).tolist() == [[4, 0, 2]]
    assert Sum(scale=PerTask({"c": 0.5, "a": 2.0, "b": -1.0})).reduce(given, None, place).tolist() == [[-1, 0, -2]]
    assert Mean().reduce(given, None, place).tolist() == [[pytest.approx(4 / 3), 0, pytest.approx(2 / 3)]]
    assert DisjointMean().reduce(given, None, place).tolist() == [[2, 0, 1]]


def test_sums_run_in_the_order_of_the_tasks() -> None:
    """1e8 + 1 − 1e8 is 0 in float32, 1e8 − 1e8 + 1 is 1."""
    given = torch.tensor([1e8, 1.0, -1e8])[:, None]
    assert sum_in_order(given).item() == 0
    assert sum_in_order(given[[0, 2, 1]]).item() == 1
    assert weighted_sum(given, [1.0, 2.0, 1.0]).item() == 0
    one = torch.ones(1, 3)
    assert sum_in_order(one) is not one
    assert sum_in_order(one).data_ptr() != one.data_ptr()


@pytest.mark.parametrize("step", [1, 3, 8])
def test_sums_do_not_depend_on_the_block(step: int) -> None:
    given = stack(shape=(12, 33))
    cut = torch.cat([sum_in_order(given[:, row : row + step]) for row in range(0, 12, step)])
    assert torch.equal(cut, sum_in_order(given))
    weights = [0.3, -1.1, 0.7]
    cut = torch.cat([weighted_sum(given[:, row : row + step], weights) for row in range(0, 12, step)])
    assert torch.equal(cut, weighted_sum(given, weights))


def test_scale_by_pattern() -> None:
    merged = stack()[0]
    part = Scale(scale=PerPattern({"layers.0.*": 0.5, "*.bias": 3.0, "*": 1.0}))
    for name, factor in (("layers.0.bias", 0.5), ("layers.1.bias", 3.0), ("head.weight", 1.0)):
        assert torch.equal(part.adjust(merged, None, None, site(TASKS, name)), merged * factor)
    with pytest.raises(RecipeError, match=r"no pattern fits 'x'; end with `\"\*\": value`. Got a, b."):
        Scale(scale=PerPattern({"a": 1.0, "b": 2.0})).adjust(merged, None, None, site(TASKS, "x"))


def test_a_field_that_does_not_vary_by_task_says_so() -> None:
    with pytest.raises(RecipeError, match="cannot vary by task"):
        PLACE.value(PerTask({"a": 1.0}))


def test_values_by_task_must_name_every_task() -> None:
    with pytest.raises(RecipeError) as caught:
        PLACE.per_task(PerTask({"a": 1.0, "bb": 2.0}))
    assert caught.value.problems == [
        "no value for the task 'b'.",
        "no value for the task 'c'.",
        "'bb' is not a task. Did you mean 'b'? Tasks: a, b, c.",
    ]
    assert PLACE.per_task(PerTask({"c": 3.0, "a": 1.0, "b": 2.0})) == [1.0, 2.0, 3.0]
    assert PLACE.per_task(0.5) == [0.5] * 3


def test_empty_values_are_refused() -> None:
    for kind in (PerTask, PerPattern):
        with pytest.raises(ValueError, match="needs"):
            kind({})
