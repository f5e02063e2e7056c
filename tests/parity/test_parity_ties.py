"""TIES, TopK, DARE and the sums against direct whole-vector implementations, bit for bit."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from synthetic import State, differences, merged, merged_vector, models
from thetau.methods import Average, DareLinear, DareTies, TaskArithmetic, Ties, TopK
from thetau.transforms import Drop

SHAPES = {
    "layers.0.mlp.fc1.weight": (37, 19),
    "layers.0.attn.q_proj.weight": (12, 12),
    "norm.weight": (19,),
    "scale": (),
    "conv.weight": (4, 3, 2, 2),
}
TASKS = ("a", "b", "c", "d")


def whole(state: State) -> Tensor:
    """One vector, the tensors in the order of their names."""
    return torch.cat([state[name].reshape(-1).float() for name in sorted(state)])


def trim_whole(vector: Tensor, density: float) -> Tensor:
    """Zero all below the ⌈density · n⌉-th largest magnitude, found by `torch.kthvalue`; equal ones stay."""
    keep = ceil(round(density * len(vector), 9))
    cut = vector.abs().kthvalue(len(vector) - keep + 1).values
    return torch.where(vector.abs() >= cut, vector, torch.zeros_like(vector))


def ties(vectors: list[Tensor], density: float, *, majority: bool = False, trimmed: list[Tensor] | None = None) -> Tensor:
    """The authors' steps on whole vectors: trim, elect the sign of the sum, mean over what agrees; sums in the order given."""
    kept = trimmed or [trim_whole(v, density) for v in vectors]
    total = torch.zeros_like(kept[0])
    for v in kept:
        total = total + v
    sign = torch.sign(total)
    if majority:  # resolve_zero_signs(sign, "majority")
        sign = torch.where(sign == 0, torch.sign(sign.sum()), sign)
    picked = [torch.where(torch.where(sign > 0, v > 0, (sign < 0) & (v < 0)), v, torch.zeros_like(v)) for v in kept]
    top, count = torch.zeros_like(total), torch.zeros_like(total)
    for v in picked:
        top = top + v
        count = count + (v != 0)
    return top / count.clamp(min=1)


def split(vector: Tensor, like: State) -> State:
    names = sorted(like)
    pieces = vector.split([like[name].numel() for name in names])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}


def check(got: State, want: State) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("cancelled", ["zero", "majority"])
def test_ties_bit_for_bit(density: float, dtype: torch.dtype, cancelled: Any) -> None:
    """Differences of bfloat16 numbers have many equal magnitudes, at the cut too, and many exact cancellations."""
    base, tuned = models(SHAPES, TASKS, dtype=dtype)
    tau = differences(base, tuned)
    want = split(ties([whole(tau[task]) for task in TASKS], density, majority=cancelled == "majority"), base)
    check(merged_vector(base, tuned, Ties(density=density, cancelled=cancelled)), want)
    model = {name: (base[name].float() + want[name]).to(dtype) for name in base}
    check(merged(base, tuned, Ties(density=density, cancelled=cancelled)), model)


def test_the_bfloat16_case_has_what_it_is_there_for() -> None:
    base, tuned = models(SHAPES, TASKS, dtype=torch.bfloat16)
    vectors = [whole(v) for v in differences(base, tuned).values()]
    kept = [trim_whole(v, 0.5) for v in vectors]
    assert any(int((v != 0).sum()) > ceil(0.5 * len(v)) for v in kept)  # ties at the cut
    total = kept[0] + kept[1] + kept[2] + kept[3]
    assert bool(((total == 0) & (kept[0] != 0)).any())  # exact cancellation
    assert not torch.equal(ties(vectors, 0.5), ties(vectors, 0.5, majority=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_per_tensor(dtype: torch.dtype) -> None:
    base, tuned = models(SHAPES, TASKS, dtype=dtype)
    tau = differences(base, tuned)
    want = {name: ties([tau[task][name].reshape(-1) for task in TASKS], 0.3).reshape(base[name].shape) for name in base}
    check(merged_vector(base, tuned, Ties(density=0.3, trim="tensor")), want)
    assert not torch.equal(want["norm.weight"], merged_vector(base, tuned, Ties(density=0.3))["norm.weight"])


def test_majority_is_that_of_all_entries_and_of_the_whole_vector() -> None:
    """An entry that cancels gets the sign that most other entries have, those of other tensors too."""
    base = {"w": torch.zeros(1, 5), "v": torch.zeros(2)}
    tuned = {
        "a": {"w": torch.tensor([[1.0, -1.0, -1.0, -1.0, 2.0]]), "v": torch.tensor([1.0, -4.0])},
        "b": {"w": torch.tensor([[1.0, -1.0, -1.0, -1.0, -2.0]]), "v": torch.tensor([1.0, -4.0])},
    }
    zero = merged_vector(base, tuned, Ties(density=1.0))
    majority = merged_vector(base, tuned, Ties(density=1.0, cancelled="majority"))
    assert zero["w"].tolist() == [[1, -1, -1, -1, 0]]
    assert majority["w"].tolist() == [[1, -1, -1, -1, -2]]
    assert torch.equal(zero["v"], majority["v"])


def test_kept_entries_round_up() -> None:
    """⌈0.2 · 11⌉ = 3, and 0.2 · 10 is 2."""
    for size, kept in ((11, 3), (10, 2), (1, 1)):
        vector = torch.arange(1.0, size + 1)
        got = merged_vector({"w": torch.zeros(size)}, {"a": {"w": vector}}, Ties(density=0.2))["w"]
        assert torch.equal(got, torch.where(vector > size - kept, vector, torch.zeros(size)))


def test_entries_at_the_cut_all_stay() -> None:
    vector = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])
    got = merged_vector({"w": torch.zeros(6)}, {"a": {"w": vector}}, Ties(density=2 / 6))["w"]
    assert got.tolist() == [3, -2, 2, 2, 0, 0]


def test_negated_tasks_negate_the_merge() -> None:
    """The departure from the authors' code: entries that cancel give 0."""
    base, tuned = models(SHAPES, TASKS, dtype=torch.bfloat16)
    tau = differences(base, tuned)
    zero = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    plus = merged_vector(zero, tau, Ties(density=0.5))
    minus = merged_vector(zero, {task: {name: -v for name, v in state.items()} for task, state in tau.items()}, Ties(density=0.5))
    check(minus, {name: 0 - v for name, v in plus.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trim", ["vector", "tensor"])
def test_topk_bit_for_bit(dtype: torch.dtype, trim: Any) -> None:
    base, tuned = models(SHAPES, TASKS, dtype=dtype)
    tau = differences(base, tuned)
    if trim == "vector":
        trimmed = {task: split(trim_whole(whole(tau[task]), 0.1), base) for task in TASKS}
    else:
        trimmed = {task: {n: trim_whole(v.reshape(-1), 0.1).reshape(v.shape) for n, v in tau[task].items()} for task in TASKS}
    want = {}
    for name in base:
        total = torch.zeros(base[name].shape)
        for task in TASKS:
            total = total + trimmed[task][name]
        want[name] = total / len(TASKS) * 2.0
    check(merged_vector(base, tuned, TopK(density=0.1, trim=trim, scale=2.0)), want)


def test_sums_and_means_bit_for_bit() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    weights = (0.3, -0.1, 1.7, 0.0)
    total = {name: tau["a"][name] * weights[0] for name in base}
    for task, weight in zip(TASKS[1:], weights[1:], strict=True):
        total = {name: total[name] + tau[task][name] * weight for name in base}
    check(merged_vector(base, tuned, TaskArithmetic(scale=weights)), total)
    mean = {name: (((tau["a"][name] + tau["b"][name]) + tau["c"][name]) + tau["d"][name]) / 4 for name in base}
    check(merged_vector(base, tuned, Average()), mean)


# DARE.

WIDE = {"layers.0.mlp.fc1.weight": (300, 300), "layers.1.mlp.fc1.weight": (300, 300)}


def ones(tasks: tuple[str, ...] = TASKS) -> tuple[State, dict[str, State]]:
    """Task vectors of ones, so that a merge shows its masks."""
    base = {name: torch.zeros(shape) for name, shape in WIDE.items()}
    return base, {task: {name: torch.ones(shape) for name, shape in WIDE.items()} for task in tasks}


def masks(rate: float, task: str, *, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> State:
    """What one task keeps: the weighted sum with all other weights zero, without the rescaling."""
    base, tuned = ones(tasks)
    weights = tuple(float(one == task) for one in tasks)
    got = merged_vector(base, tuned, DareLinear(drop=rate, scale=weights), seed=seed)
    return {name: (value * (1 - rate)).round() for name, value in got.items()}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_drop_rate_and_expectation(rate: float) -> None:
    n = 90_000
    spread = (rate * (1 - rate) / n) ** 0.5
    for name, mask in masks(rate, "b").items():
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert abs(float((mask == 0).double().mean()) - rate) < 5 * spread, name
    base, tuned = ones()
    mean = merged_vector(base, tuned, DareLinear(drop=rate, scale=1.0))["layers.0.mlp.fc1.weight"]
    assert abs(float(mean.double().mean()) - 4) < 5 * 4 * spread / (1 - rate)


def test_nothing_dropped_is_task_arithmetic_and_ties() -> None:
    base, tuned = models(SHAPES, TASKS)
    check(merged_vector(base, tuned, DareLinear(drop=0.0)), merged_vector(base, tuned, TaskArithmetic(scale=0.3)))
    check(merged_vector(base, tuned, DareTies(drop=0.0)), merged_vector(base, tuned, Ties()))


def test_masks_are_independent_of_each_other() -> None:
    """By task, by tensor and by seed: correlations within 5 standard deviations of zero."""
    a, b, other = masks(0.5, "a"), masks(0.5, "b"), masks(0.5, "a", seed=1)
    first, second = WIDE
    pairs = [
        (a[first], b[first]),
        (a[first], a[second]),
        (a[first], other[first]),
        (a[first], a[first].T),
        (a[first][1:], a[first][:-1]),
    ]
    for x, y in pairs:
        correlation = float(((x - 0.5) * (y - 0.5)).double().mean() * 4)
        assert abs(correlation) < 5 / x.numel() ** 0.5
    assert not torch.equal(a[first], other[first])


def test_a_mask_depends_on_its_own_task_alone() -> None:
    want = masks(0.5, "b")
    for tasks in (("b",), ("d", "b"), ("z", "c", "b", "a")):
        check(masks(0.5, "b", tasks=tasks), want)
    other = masks(0.5, "e", tasks=("a", "e"))
    assert not torch.equal(other["layers.0.mlp.fc1.weight"], want["layers.0.mlp.fc1.weight"])


def test_dare_ties_is_ties_over_the_dropped_vectors() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    dropped = {}
    for index, task in enumerate(TASKS):
        weights = tuple(float(i == index) for i in range(4))
        dropped[task] = merged_vector(base, tuned, DareLinear(drop=0.4, scale=weights), seed=3)
        kept = {name: v != 0 for name, v in dropped[task].items()}
        for name in base:  # what is kept is rescaled, the rest is gone
            factor = torch.tensor(1 / 0.6)
            assert torch.equal(
                dropped[task][name], torch.where(kept[name], tau[task][name] * factor, torch.zeros(base[name].shape))
            )
    want = split(ties([whole(dropped[task]) for task in TASKS], 0.3), base)
    check(merged_vector(base, tuned, DareTies(drop=0.4, density=0.3), seed=3), want)


def test_a_rate_next_to_one_drops_nearly_all() -> None:
    base, tuned = ones()
    got = merged_vector(base, tuned, DareLinear(drop=1 - 1e-7, scale=1.0))
    assert all(bool(value.isfinite().all()) for value in got.values())
    assert sum(int((value != 0).sum()) for value in got.values()) < 20
    assert Drop(rate=0.5).per_task
