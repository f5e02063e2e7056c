"""Laws of the methods that keep a mask for each task, of PCB and MagMax, and of a method inside another."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from synthetic import differences, merged_vector, models, vectors_of
from thetau.engine.executor import Engine
from thetau.errors import RecipeError
from thetau.methods import (
    Awd,
    Consensus,
    ConsensusTa,
    ConsensusTies,
    DareTies,
    Emr,
    MagMax,
    Pcb,
    PerTask,
    TallMasks,
    TaskArithmetic,
    Ties,
    TsvM,
    Twin,
    Wudi,
)
from thetau.testing import LARGE, SHAPES, same
from tiny import one_thread as one_thread

TASKS = ("zebra", "ape", "Cat")
SEVERAL = [
    TallMasks(),
    TallMasks(vector="ties"),
    Emr(),
    Emr(rescale="sums"),
    Twin(),
    Twin(keep="magnitude"),
    Twin(keep="bernoulli"),
]


def each(base: Any, tuned: Any, method: Any, **options: Any) -> dict[str, dict[str, Tensor]]:
    """Every output as a state dict."""
    _, vectors = vectors_of(base, tuned)
    engine = options.get("engine")
    return {name: one.state_dict(engine=engine) for name, one in thetau.outputs(vectors, method, **options).items()}


@pytest.mark.parametrize("method", SEVERAL, ids=repr)
def test_outputs_are_the_tasks_whatever_their_order_workers_and_blocks(method: Any) -> None:
    base, tuned = models(LARGE, TASKS)
    want = each(base, tuned, method, engine=Engine(workers=1))
    assert sorted(want) == sorted(TASKS)
    turned = {task: tuned[task] for task in reversed(TASKS)}
    for other in (each(base, turned, method), each(base, tuned, method, engine=Engine(workers=2, window=1))):
        for task in TASKS:
            same(other[task], want[task], task)


@pytest.mark.parametrize("method", SEVERAL, ids=repr)
def test_outputs_of_every_kind_of_tensor_are_finite(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    for state in each(base, {**tuned, "none": base}, method).values():
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("method", [TallMasks(), Emr(), Emr(rescale="sums"), Emr(cancelled="zero")], ids=repr)
def test_one_task_alone_comes_back_to_the_bit(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS[:1])
    tau = differences(base, tuned)["zebra"]
    got = each(base, tuned, method)["zebra"]
    assert all(torch.equal(got[name], tau[name]) for name in got)


@pytest.mark.parametrize("rule", ["means", "sums"])
def test_emr_of_equal_vectors_gives_each_back_to_the_bit(rule: Any) -> None:
    base, tuned = models(SHAPES, TASKS[:1])
    tau = differences(base, tuned)["zebra"]
    for state in each(base, dict.fromkeys(TASKS, tuned["zebra"]), Emr(rescale=rule)).values():
        assert all(torch.equal(state[name], tau[name]) for name in state)


def test_emr_gives_a_bias_the_weight_of_a_matrix_only_by_means() -> None:
    base = {"w": torch.zeros(100, 10), "b": torch.zeros(10)}
    tuned = {
        "a": {"w": torch.ones(100, 10), "b": torch.full((10,), -1.0)},
        "b": {"w": torch.full((100, 10), 3.0), "b": torch.full((10,), 3.0)},
    }
    # a agrees in the matrix alone, where the unified vector is 3: its own magnitudes are 1 and 1, its masked ones 3 and 0.
    by_means, by_sums = (each(base, tuned, Emr(rescale=rule))["a"]["w"][0, 0] for rule in ("means", "sums"))
    assert float(by_means) == pytest.approx(3 * 2 / 3)
    assert float(by_sums) == pytest.approx(3 * 1010 / 3000)


def test_what_cancels_exactly_is_negative_in_emr_or_left_out() -> None:
    base = {"w": torch.zeros(2)}
    tuned = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-1.0, 2.0])}}
    assert merged_vector(base, tuned, Emr())["w"].tolist() == [-1.0, 2.0]
    assert merged_vector(base, tuned, Emr(cancelled="zero"))["w"].tolist() == [0.0, 2.0]
    assert each(base, tuned, Emr(rescale="none"))["a"]["w"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "method", [Emr(cancelled="zero"), MagMax(), Pcb(), ConsensusTa(), ConsensusTies(), TallMasks()], ids=repr
)
def test_negating_every_task_negates_the_result(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    tau = differences(base, tuned)
    once = merged_vector(zero, tau, method)
    turned = merged_vector(zero, {task: {name: -t for name, t in state.items()} for task, state in tau.items()}, method)
    for name in once:
        assert torch.equal(turned[name], -once[name]), name


def test_threshold_zero_is_task_arithmetic_and_beyond_all_tasks_nothing() -> None:
    base, tuned = models(SHAPES, TASKS)
    same(merged_vector(base, tuned, ConsensusTa(least=0, scale=1.0)), merged_vector(base, tuned, TaskArithmetic(scale=1.0)), "TA")
    assert not any(bool(tensor.any()) for tensor in merged_vector(base, tuned, ConsensusTa(least=4)).values())


def test_a_threshold_by_task() -> None:
    base = {"w": torch.zeros(3)}
    tuned = {"a": {"w": torch.tensor([1.0, 1.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.5, 2.0])}}
    # |τ_m − τ_t| is the other task's entry: a keeps 1 > λ_a (1, 0.5, ·), b keeps (1, 0.5, 2) > λ_b (1, 1, 0).
    strict = each(base, tuned, TallMasks(selectivity=PerTask({"a": 1.5, "b": 0.4})))
    assert strict["a"]["w"].tolist() == [0.0, 1.5, 0.0]
    assert strict["b"]["w"].tolist() == [2.0, 1.5, 2.0]
    with pytest.raises(RecipeError, match="'c' is not a task"):
        each(base, tuned, TallMasks(selectivity=PerTask({"a": 1.0, "b": 1.0, "c": 1.0})))
    with pytest.raises(ValueError, match=r"selectivity=.*of at least 0"):
        TallMasks(selectivity=-0.1)


def test_masks_of_ties_are_of_the_whole_vectors() -> None:
    """An entry that TIES trimmed from a task is still in its mask where the task is nearer to the merged vector than to the base."""
    base = {"w": torch.zeros(4)}
    tuned = {"a": {"w": torch.tensor([4.0, 1.0, 0.0, 0.0])}, "b": {"w": torch.tensor([0.0, 1.5, 3.0, 0.0])}}
    method = TallMasks(vector="ties", density=0.5, selectivity=0.5)
    # Half of each vector stays: a: 4, 1; b: 1.5, 3.
    assert merged_vector(base, tuned, method)["w"].tolist() == [4.0, 2.5, 3.0, 0.0]
    trimmed = TallMasks(vector="ties", density=0.25, selectivity=0.5)
    assert merged_vector(base, tuned, trimmed)["w"].tolist() == [4.0, 0.0, 3.0, 0.0]
    wider = ConsensusTies(density=0.5, selectivity=0.5, scale=1.0)
    assert merged_vector(base, tuned, wider)["w"].tolist() == [0.0, 2.5, 0.0, 0.0]


NESTED = [
    Ties(),
    Ties(trim="tensor"),
    Ties(trim="tensor", cancelled="majority"),
    Ties(cancelled="majority"),
    DareTies(drop=0.5),
    TsvM(),
]


@pytest.mark.parametrize("inner", NESTED, ids=repr)
def test_a_method_inside_another_merges_as_alone(inner: Any) -> None:
    """Through one stage it has the bits that it has as a chain of its own, whatever its passes."""
    base, tuned = models(LARGE, TASKS)
    alone = merged_vector(base, tuned, inner)
    within = merged_vector(base, tuned, Consensus(then=inner, least=0, scale=1.0))
    same(within, alone, "inside consensus")
    same(merged_vector(base, tuned, Twin(then=inner)), alone, "inside twin")


def test_what_cannot_stand_inside_is_refused_where_it_is_written() -> None:
    with pytest.raises(
        ValueError, match=r"`Consensus\(then=...\)` must be a method without transforms.*Got Interference after Disentangle"
    ):
        Consensus(then=Awd(then=Wudi()))
    with pytest.raises(ValueError, match=r"`Twin\(then=...\)` must be a method with one output"):
        Twin(then=Emr())


def test_pcb_of_one_task_keeps_its_largest_entries_clipped() -> None:
    base = {"w": torch.zeros(20, 50)}
    tau = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    got = merged_vector(base, {"a": {"w": tau}}, Pcb())["w"]
    ranked = tau.abs().reshape(-1).sort().values
    kept = got != 0
    assert int(kept.sum()) == 49  # of 5 % the smallest is the quantile, whose weight is 0
    assert float(tau.abs()[kept].min()) > float(tau.abs()[~kept].max())
    torch.testing.assert_close(got[kept], 1.2 * (tau.sign() * tau.abs().clamp(max=ranked[989]))[kept])


def test_pcb_keeps_no_more_than_its_share_of_each_task() -> None:
    base, tuned = models({"w": (40, 50)}, TASKS)
    for density in (0.01, 0.05, 0.3):
        got = merged_vector(base, tuned, Pcb(density=density))["w"]
        assert 0 < int((got != 0).sum()) <= 3 * density * 2000


def test_only_the_product_variant_of_pcb_keeps_its_choice_when_vectors_grow() -> None:
    base, tuned = models({"w": (40, 50)}, TASKS, rms=0.5)
    tau = {task: state["w"] - base["w"] for task, state in tuned.items()}
    for variant, stays in (("products", True), ("sum", False), ("raw", False)):
        kept = [
            merged_vector({"w": torch.zeros(40, 50)}, {t: {"w": f * v} for t, v in tau.items()}, Pcb(variant=variant))["w"] != 0  # type: ignore[arg-type]
            for f in (1.0, 4.0)
        ]
        assert torch.equal(*kept) == stays, variant


def test_many_tasks_do_not_overflow_pcb() -> None:
    base = {"w": torch.zeros(30, 10)}
    generator = torch.Generator().manual_seed(0)
    tuned = {f"t{i:03d}": {"w": torch.randn(30, 10, generator=generator)} for i in range(120)}
    got = merged_vector(base, tuned, Pcb())["w"]
    assert bool(got.isfinite().all())
    assert bool(got.any())


def test_magmax_does_not_hang_on_the_order_and_ties_go_to_the_later_name() -> None:
    base = {"w": torch.zeros(3)}
    tuned = {"a": {"w": torch.tensor([1.0, -2.0, 0.5])}, "b": {"w": torch.tensor([-1.0, 1.0, 0.5])}, "c": {"w": torch.zeros(3)}}
    for order in permutations(tuned):
        got = merged_vector(base, {task: tuned[task] for task in order}, MagMax(scale=1.0))["w"]
        assert got.tolist() == [-1.0, -2.0, 0.5]


def test_twin_keeps_a_low_rank_beside_what_is_shared() -> None:
    base, tuned = models({"w": (20, 30), "b": (20,)}, TASKS)
    tau = differences(base, tuned)
    shared = merged_vector(base, tuned, Twin())
    exclusive = each(base, tuned, Twin(part="exclusive"))
    for task, state in each(base, tuned, Twin()).items():
        assert torch.linalg.matrix_rank(exclusive[task]["w"], rtol=1e-4) == 2  # a tenth of 20
        torch.testing.assert_close(state["w"], shared["w"] + exclusive[task]["w"])
        torch.testing.assert_close(state["b"], tau[task]["b"])
        left = (tau[task]["w"] - shared["w"] - exclusive[task]["w"]).norm()
        best = torch.linalg.svdvals((tau[task]["w"] - shared["w"]).double())[2:].square().sum().sqrt()
        assert float(left) == pytest.approx(float(best), rel=1e-4)  # Eckart and Young


def test_twin_gives_back_vectors_and_scalars_that_the_shared_method_leaves_alone() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    averaged = each(base, tuned, Twin(then=TsvM()))  # matrices, and the mean of all others
    for task, state in averaged.items():
        for name in ("layers.0.norm.weight", "logit_scale"):
            torch.testing.assert_close(state[name], tau[task][name], rtol=0, atol=1e-8)
    alone = each(base, tuned, Twin(then=TsvM(), part="exclusive"))
    assert not bool(alone["ape"]["conv.weight"].any())  # four axes: no matrix of TSV-M's, so the mean alone
    assert torch.equal(averaged["ape"]["conv.weight"], merged_vector(base, tuned, TsvM())["conv.weight"])


@pytest.mark.parametrize("method", [TallMasks(vector="ties"), Emr(), Twin(), Twin(keep="magnitude")], ids=repr)
def test_a_task_is_saved_as_it_is_in_memory(tmp_path: Path, method: Any) -> None:
    base, tuned = models(SHAPES, TASKS, dtype=torch.bfloat16)
    opened, vectors = vectors_of(base, tuned)
    model = opened + thetau.outputs(vectors, method)["ape"]
    model.save(tmp_path / "ape")
    same(thetau.open(tmp_path / "ape").state_dict(), model.state_dict(), "saved")
