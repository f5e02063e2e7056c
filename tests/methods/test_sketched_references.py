"""Sketched references: WUDI and bilateral merging against dense solves of the objective that the sketch says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import fed, interference, task_vectors
from synthetic import merged_vector, models, relative
from thetau.engine.executor import Engine
from thetau.linalg.leading import leading
from thetau.methods import Bilateral, Wudi, sketched
from thetau.methods.bilateral_solvers import TwoSided
from thetau.methods.sketched import limit, sketch
from thetau.methods.wudi_solvers import Interference
from thetau.random import stream
from tiny import one_thread as one_thread

FLOAT32 = torch.finfo(torch.float32).eps
SHAPES = [(3, 60, 60), (4, 120, 40), (4, 40, 120), (2, 30, 90)]
FLOW: dict[str, Any] = {"solver": "gradient_flow"}
CLOSED: dict[str, Any] = {"solver": "closed_form"}


def low_rank(tasks: int, d_out: int, d_in: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator) * 1e-4 for _ in range(tasks)
    ]


def objective(vectors: list[Tensor], count: int, tail: Any, salt: str, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A = Σ G_i and B = Σ τ_i G_i in float64, G_i being the dense sketch of (τ_iᵀτ_i)^power at unit length."""
    a, b = 0.0, 0.0
    for index, vector in enumerate(vectors):
        found = leading(vector, count, stream(salt, f"t{index}", "w"))
        made = sketch(found, tail, power=power)
        rows, tau = made.rows.double().numpy(), vector.double().numpy()
        gram = rows.T @ rows + made.rest * np.eye(rows.shape[1])
        a, b = a + gram, b + tau @ gram
    return np.asarray(a), np.asarray(b)


def flowed(a: np.ndarray, b: np.ndarray, start: np.ndarray, s: float) -> np.ndarray:
    """start + R φ(A)."""
    values, vectors = np.linalg.eigh(a)
    values = np.maximum(values, 0)
    gain = np.where(values > 1e-12, -np.expm1(-2 * s * values) / np.maximum(values, 1e-12), 2 * s)
    return start + (b - start @ a) @ (vectors * gain) @ vectors.T


@pytest.mark.parametrize("tail", ["flat", "drop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("time", [0.3, 1.0, 30.0])
def test_the_flow_is_that_of_the_sketched_objective(shape: tuple[int, int, int], tail: str, time: float) -> None:
    vectors = task_vectors(*shape)
    a, b = objective(vectors, 4, tail, "wudi-sketch")
    start = sum(v.double() for v in vectors).numpy()
    want = flowed(a, b, start, time * len(a) / np.trace(a))
    got = interference(vectors, **FLOW, time=time, directions=4, tail=tail)
    assert relative(got, torch.from_numpy(want)) < 1e-5
    assert relative(got, sum(vectors)) > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.0])
def test_the_closed_form_is_that_of_the_sketched_objective(shape: tuple[int, int, int], ridge: float) -> None:
    vectors = task_vectors(*shape)
    a, b = objective(vectors, 4, "flat", "wudi-sketch")
    weights = [1 / float(v.double().square().sum()) for v in vectors]
    mean = sum(w * v.double() for w, v in zip(weights, vectors, strict=True)).numpy() / sum(weights)
    shift = ridge * np.trace(a) / len(a)
    want = np.linalg.solve((a + shift * np.eye(len(a))).T, (b + shift * mean).T).T
    assert relative(interference(vectors, **CLOSED, ridge=ridge, directions=4), torch.from_numpy(want)) < 1e-5


@pytest.mark.parametrize("fields", [FLOW, CLOSED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_many_directions_as_there_are_is_no_sketch(shape: tuple[int, int, int], fields: dict[str, Any]) -> None:
    vectors = task_vectors(*shape)
    whole = interference(vectors, **fields, directions="full")
    most = limit(shape[1:], shape[0])
    for count in (most + 1, min(shape[1:]), 10_000):
        assert torch.equal(interference(vectors, **fields, directions=count), whole)
    assert not torch.equal(interference(vectors, **fields, directions=most), whole)


@pytest.mark.parametrize("tail", ["flat", "drop"])
@pytest.mark.parametrize(
    "fields", [FLOW, {**CLOSED, "ridge": 0.0}, CLOSED, {**FLOW, "start": "zero"}, {**FLOW, "balance": False}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_of_low_rank_lose_nothing(shape: tuple[int, int, int], fields: dict[str, Any], tail: str) -> None:
    vectors = low_rank(*shape, 3)
    got = interference(vectors, **fields, directions=6, tail=tail)
    assert relative(got, interference(vectors, **fields, directions="full")) < 2e-4  # eigenvalues of float32 sums, at both ends


def test_zeros_drop_out_and_one_task_stays_as_it_is() -> None:
    vectors = task_vectors(3, 40, 60)
    zero = torch.zeros(40, 60)
    assert torch.equal(interference(vectors[:1], **FLOW, directions=4), vectors[0])
    assert torch.equal(interference([zero, vectors[0], zero], **FLOW, directions=4), vectors[0])
    assert torch.equal(interference([zero, zero], **FLOW, directions=4), zero)
    two = [v.clone() for v in vectors[:2]]
    alone, beside = Interference(**FLOW, directions=4), fed(Interference(**FLOW, directions=4), [*two, zero])
    assert relative(beside, fed(alone, two)) < 1e-6


def test_equal_tasks_stay_at_their_mean() -> None:
    """Nothing is to be minimised there, and what is left of the differences is rounding."""
    vector = task_vectors(1, 40, 60)[0]
    got = interference([vector] * 4, **FLOW, start="mean", directions=4)
    assert relative(got, vector) < 4 * FLOAT32


def test_scale_of_the_vectors() -> None:
    vectors = task_vectors(3, 40, 60)
    for fields in (FLOW, CLOSED):
        plain = interference(vectors, **fields, directions=4)
        assert relative(interference([2.0**40 * v for v in vectors], **fields, directions=4) * 2.0**-40, plain) < 1e-5


def falling(side: int, length: float, seed: int) -> Tensor:
    """A square matrix whose squared singular values fall by e over so many of them: no end, and no noise."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator)).Q for _ in range(2))
    return (left * (-torch.arange(side) / (2 * length)).exp()) @ right.T


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_task_that_needs_all_its_directions_among_some_that_do_not(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From it on A and B are kept themselves, with the sketches that came before."""
    monkeypatch.setattr(sketched, "SMALLEST", 1)
    vectors = [falling(160, 4, seed) for seed in range(8)]
    vectors[at] = falling(160, 20, at)
    a, b = 0.0, 0.0
    for index, vector in enumerate(vectors):
        found = sketched.directions(
            vector, "auto", 8, float(vector.double().square().sum()), stream("wudi-sketch", f"t{index}", "w")
        )
        assert (found is None) == (index == at)
        unit = vector.double().numpy() / float(vector.double().norm())
        gram = unit.T @ unit
        if found is not None:
            made = sketch(found, "flat")
            gram = made.rows.double().numpy().T @ made.rows.double().numpy() + made.rest * np.eye(160)
        a, b = a + gram, b + vector.double().numpy() @ gram
    start = sum(v.double() for v in vectors).numpy()
    want = flowed(np.asarray(a), np.asarray(b), start, 160 / np.trace(a))
    assert relative(interference(vectors, **FLOW, directions="auto"), torch.from_numpy(want)) < 1e-5


def test_small_matrices_are_never_sketched_by_themselves() -> None:
    vectors = task_vectors(3, 60, 80)
    assert torch.equal(interference(vectors, **FLOW, directions="auto"), interference(vectors, **FLOW, directions="full"))


# Bilateral merging.


def one_sided(vectors: list[Tensor], left: bool, **fields: Any) -> Tensor:
    part = TwoSided(**{"p": float(left), "q": float(not left), "solver": "flow", **fields})
    return fed(part, vectors)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("tail", ["flat", "drop"])
def test_one_side_sketched_is_wudi_of_that_side(left: bool, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketched, "SMALLEST", 1)
    vectors = task_vectors(3, 150, 170)
    faced = [v.T.contiguous() if left else v for v in vectors]
    a, b = 0.0, 0.0
    for index, vector in enumerate(faced):
        found = leading(vector, 6, stream("bilateral-sketch", f"t{index}", "w"))
        made = sketch(found, tail)  # type: ignore[arg-type]
        rows = made.rows.double().numpy()
        gram = rows.T @ rows + made.rest * np.eye(rows.shape[1])
        a, b = a + gram, b + vector.double().numpy() @ gram
    seen = len(a) if tail == "flat" else 18  # eigenvalues that are not 0
    want = flowed(np.asarray(a), np.asarray(b), sum(v.double() for v in faced).numpy(), seen / np.trace(a))
    got = one_sided(vectors, left, rank=6, tail=tail)
    assert relative(got.T if left else got, torch.from_numpy(want)) < 1e-5


def test_bilateral_auto_and_full() -> None:
    vectors = task_vectors(3, 60, 80)
    for left in (False, True):
        full = one_sided(vectors, left, rank="full")
        assert torch.equal(one_sided(vectors, left, rank="auto"), full)  # too small for a sketch
        assert torch.equal(one_sided(vectors, left, rank=None), full)
    alone = one_sided([*vectors[:1], torch.zeros(60, 80)], True, rank="auto")
    assert torch.equal(alone, vectors[0])


# Whole merges.


@pytest.mark.parametrize("method", [Wudi(**FLOW), Wudi(**CLOSED), Bilateral()], ids=["flow", "closed form", "bilateral"])
def test_the_same_bits_from_any_workers_and_order(method: Any) -> None:
    shapes = {
        "encoder.layer.0.attention.self.query.weight": (256, 256),
        "encoder.layer.0.intermediate.dense.weight": (320, 256),
        "encoder.layer.0.output.dense.weight": (256, 320),
    }
    base, tuned = models(shapes, ["a", "b", "c"])
    want = merged_vector(base, tuned, method, engine=Engine(workers=1))
    turned = merged_vector(base, dict(reversed(tuned.items())), method, engine=Engine(workers=3))
    field = "rank" if isinstance(method, Bilateral) else "directions"
    full = merged_vector(base, tuned, replace(method, **{field: "full"}))
    for key in shapes:
        assert torch.equal(want[key], turned[key])
        assert relative(want[key], full[key]) > 1e-3  # it was a sketch


def test_a_number_goes_with_what_can_be_sketched() -> None:
    for fields, named in (
        ({"solver": "adam"}, "solver='adam'"),
        ({**FLOW, "filter": "cut"}, "filter='cut'"),
        ({**FLOW, "rows": 0.5}, "rows=0.5"),
    ):
        with pytest.raises(ValueError, match=f"leave it at 'auto'. Got directions=8 and {named}."):
            Wudi(**fields, directions=8)
    with pytest.raises(
        ValueError, match=r"`Wudi\(directions=...\)` must be an integer of at least 1, \"auto\" or \"full\". Got 'some'."
    ):
        Wudi(**FLOW, directions="some")


def test_the_plan_says_what_a_sketch_saves() -> None:
    auto, full = Interference(**FLOW, directions="auto"), Interference(**FLOW, directions="full")
    for shape in ((1024, 1024), (2816, 1024), (1024, 2816)):
        assert auto.cost(shape, 4).flops < full.cost(shape, 4).flops / 4
        assert auto.alternatives()["directions=full"].cost(shape, 4) == full.cost(shape, 4)
        few, many = (Interference(**FLOW, directions=count).cost(shape, 4) for count in (8, 64))
        assert few.flops < many.flops
        two = TwoSided(p=0.0, q=1.0, solver="flow", rank="auto")
        assert two.cost(shape, 4).flops == auto.cost(shape, 4).flops
