"""WUDI against independent references: a plain autograd loop, dense solves, explicit gradient descent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import PAPER_RMS, task_vectors
from matrices import interference as ours
from synthetic import merged_vector, relative, site
from thetau.methods import Wudi, quadratic
from thetau.methods.wudi_solvers import Interference

FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the engine's workers; the references, too, are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPES = [  # tasks, d_out, d_in; the last four keep A as a factor (2·K·d_out ≤ d_in)
    (8, 80, 80),
    (4, 160, 48),
    (4, 48, 160),
    (2, 64, 1),
    (1, 64, 64),
    (3, 16, 256),
    (2, 8, 32),
    (2, 1, 64),
    (1, 8, 64),
]


def rms_of(vectors: list[Tensor]) -> float:
    return float(torch.stack(vectors).double().square().mean().sqrt())


def autograd_loop(
    vectors: list[Tensor], lr: float, eps: float = 1e-8, steps: int = 300, *, balance: bool = True, double: bool = False
) -> Tensor:
    """Eq. 21 as the authors write it, differentiated by autograd and descended by `torch.optim.Adam`."""
    stack = torch.stack(vectors).double() if double else torch.stack(vectors)
    merged = stack.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=lr, eps=eps)
    weights = 1 / stack.square().sum((1, 2)) if balance else torch.ones(len(stack), dtype=stack.dtype)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = ((merged - stack) @ stack.transpose(1, 2)).square().sum((1, 2))
        (loss * weights).sum().backward()
        optimiser.step()
    return merged.detach()


def loss_of(merged: Tensor, vectors: list[Tensor]) -> float:
    """Eq. 21 in float64."""
    return sum(float(((merged.double() - v) @ v.T).square().sum() / v.square().sum()) for v in map(Tensor.double, vectors))


# Adam.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adam_at_the_papers_lr_is_the_autograd_loop(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    got = ours(vectors, lr_absolute=True)
    want = autograd_loop(vectors, 1e-5)
    assert relative(got, want) < 1e-5
    if shape[0] > 1:
        assert relative(got, sum(vectors)) > 1e-3  # it went somewhere
    else:
        assert torch.equal(got, vectors[0])


@pytest.mark.parametrize(("shape", "rms"), [(SHAPES[0], 1e-2), (SHAPES[2], 1e-6), (SHAPES[5], 1e-6), (SHAPES[6], 1e-2)], ids=str)
def test_adam_at_the_relative_lr_is_the_autograd_loop(shape: tuple[int, int, int], rms: float) -> None:
    vectors = task_vectors(*shape, rms=rms)
    unit = rms_of(vectors) / PAPER_RMS
    assert relative(ours(vectors), autograd_loop(vectors, 1e-5 * unit, 1e-8 * unit)) < 1e-5


def test_adam_stays_near_the_loop_in_float64() -> None:
    """So that two float32 errors of one kind cannot hide behind each other."""
    for shape in [(8, 96, 96), (3, 16, 256)]:
        vectors = task_vectors(*shape)
        assert relative(ours(vectors, lr_absolute=True), autograd_loop(vectors, 1e-5, double=True)) < 1e-5


@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-5), (1, 1e-5), (40, 1e-4)])
def test_adam_steps_and_lr(steps: int, lr: float) -> None:
    vectors = task_vectors(3, 40, 40)
    got = ours(vectors, lr_absolute=True, steps=steps, lr=lr)
    assert relative(got, autograd_loop(vectors, lr, steps=steps)) < 1e-5


def test_adam_without_balance() -> None:
    vectors = [(i + 1) * v for i, v in enumerate(task_vectors(3, 40, 40, rms=1e-2))]
    unit = rms_of(vectors) / PAPER_RMS
    got = ours(vectors, balance=False)
    assert relative(got, autograd_loop(vectors, 1e-5 * unit, 1e-8 * unit**3, balance=False)) < 1e-5
    assert relative(got, ours(vectors)) > 1e-3


def test_adam_leaves_the_sum_where_tasks_do_not_meet() -> None:
    """Inputs of two tasks that have nothing in common: Σ τ_i is the minimiser, and rounding must not drive Adam away from it."""
    vectors = task_vectors(2, 64, 64)
    vectors[0][:, :32] = 0
    vectors[1][:, 32:] = 0
    assert relative(ours(vectors), vectors[0] + vectors[1]) < 1e-6


def apart(d_out: int, d_in: int, seed: int = 0) -> list[Tensor]:
    """Two tasks whose inputs have nothing in common, no entry of which is zero: up to the rounding of the rotation, nothing is to be done."""
    vectors = task_vectors(2, d_out, d_in, seed=seed)
    vectors[0][:, : d_in // 2] = 0
    vectors[1][:, d_in // 2 :] = 0
    rotation = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(seed))).Q
    return [v @ rotation for v in vectors]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (8, 64), (200, 40), (32, 300)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"balance": False}, {"lr_absolute": True}, {"rows": 0.5}], ids=str)
def test_adam_does_not_step_on_rounding(shape: tuple[int, int], seed: int, fields: dict[str, Any]) -> None:
    """What the tasks have in common is the rounding of their entries, on both sides of the threshold for A's factor."""
    vectors = apart(*shape, seed=seed)
    assert torch.equal(ours(vectors, **fields), vectors[0] + vectors[1])


def test_adam_steps_where_there_is_more_than_rounding() -> None:
    """A part in common of 1e-4 is a hundred times what could be rounding."""
    for shape in [(64, 64), (8, 64)]:
        vectors = apart(*shape)
        common = 1e-4 * task_vectors(1, *shape, seed=9)[0]
        assert relative(ours([v + common for v in vectors], steps=20), vectors[0] + vectors[1] + 2 * common) > 1e-3


@pytest.fixture(params=[1e-7, -1e-7], ids=["above", "below"])
def perturbed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products as another processor might round them: every entry is off by up to 1e-7 of itself."""
    generator = torch.Generator().manual_seed(3)

    def gram_of(rows: Tensor) -> Tensor:
        product = rows.T @ rows
        if product.dtype == torch.float64:
            return product
        return product * (1 + request.param * torch.rand(product.shape, generator=generator))

    monkeypatch.setattr(quadratic, "gram_of", gram_of)


@pytest.mark.usefixtures("perturbed")
@pytest.mark.parametrize("shape", [(64, 64), (24, 90)], ids=str)
def test_another_processor_leaves_the_sum_too(shape: tuple[int, int]) -> None:
    vectors = apart(*shape)
    for solver in ("adam", "gradient_flow"):
        assert relative(ours(vectors, solver=solver), vectors[0] + vectors[1]) < 1e-6


@pytest.mark.usefixtures("perturbed")
@pytest.mark.parametrize("shape", [(8, 80, 80), (4, 160, 48), (4, 48, 160)], ids=str)
def test_another_processor_ends_where_the_loop_does(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    assert relative(ours(vectors, lr_absolute=True), autograd_loop(vectors, 1e-5)) < 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d_out", [64, 6], ids=["gram", "factor"])
def test_inputs_that_do_not_meet_stay_where_they_are_beside_some_that_do(d_out: int, seed: int) -> None:
    """Every row has something to minimise, in the last columns; in the others the tasks cancel exactly, up to float64."""
    vectors = task_vectors(4, d_out, 64, seed=seed)
    for vector, own in zip(vectors, (slice(0, 16), slice(16, 32), slice(32, 64), slice(32, 64)), strict=True):
        keep = torch.zeros(64, dtype=torch.bool)
        keep[own] = True
        vector[:, ~keep] = 0
    got = ours(vectors)
    assert torch.equal(got[:, :32], sum(vectors)[:, :32])
    assert relative(got[:, 32:], sum(vectors)[:, 32:]) > 1e-3


# Closed form and gradient flow.


def dense(vectors: list[Tensor], ridge: float) -> np.ndarray:
    """Eq. 20 in float64 numpy, with the numerator of Eq. 19; ω Σ 1/‖τ_i‖² is `ridge` mean eigenvalues."""
    tau = [v.double().numpy() for v in vectors]
    w = [1 / (t**2).sum() for t in tau]
    a = sum(x * t.T @ t for x, t in zip(w, tau, strict=True))
    omega = ridge * np.trace(a) / len(a) / sum(w)
    top = sum(x * (t @ t.T @ t + omega * t) for x, t in zip(w, tau, strict=True))
    return np.linalg.solve((a + sum(w) * omega * np.eye(len(a))).T, top.T).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_closed_form_is_the_dense_solve(shape: tuple[int, int, int], ridge: float) -> None:
    vectors = task_vectors(*shape)
    assert relative(ours(vectors, solver="closed_form", ridge=ridge), torch.from_numpy(dense(vectors, ridge))) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("omega", [1e-7, 1e-5, 1e-2])
def test_omega_is_that_of_the_paper(shape: tuple[int, int, int], omega: float) -> None:
    """Eq. 20 with the numerator of Eq. 19, ω as it is."""
    vectors = task_vectors(*shape)
    tau = [v.double().numpy() for v in vectors]
    w = [1 / (t**2).sum() for t in tau]
    top = sum(x * (t @ t.T @ t + omega * t) for x, t in zip(w, tau, strict=True))
    below = sum(x * (t.T @ t + omega * np.eye(t.shape[1])) for x, t in zip(w, tau, strict=True))
    want = torch.from_numpy(np.linalg.solve(below.T, top.T).T)
    assert relative(ours(vectors, solver="closed_form", omega=omega), want) < 1e-5


@pytest.mark.parametrize("omega", [1e-30, 1e-300])
def test_an_omega_below_rounding_leaves_the_mean_where_no_task_has_inputs(omega: float) -> None:
    """A has no inverse, and neither has A + ω to rounding; ω → 0 of Eq. 20 is the mean there, and the minimiser elsewhere."""
    for shape in [(3, 32, 48), (2, 8, 64)]:
        vectors = task_vectors(*shape)
        for v in vectors:
            v[:, ::4] = 0
        tau = torch.stack(vectors).double()
        w = 1 / tau.square().sum((1, 2), keepdim=True)
        a, b, mean = (w * tau.mT @ tau).sum(0), (w * tau @ tau.mT @ tau).sum(0), (w * tau).sum(0) / w.sum()
        want = mean + (b - mean @ a) @ torch.linalg.pinv(a, hermitian=True, rtol=1e-12)
        assert relative(ours(vectors, solver="closed_form", omega=omega), want) < 1e-5


def ill_conditioned(tasks: int, d_out: int, d_in: int, low: float, *, common: bool, seed: int = 0) -> list[Tensor]:
    """Vectors whose squared singular values fall to `low` of the largest, on `common` right singular vectors or each on its own."""
    generator = torch.Generator().manual_seed(seed)
    side = min(d_out, d_in)
    values = torch.logspace(0, np.log10(low) / 2, side, dtype=torch.float64)

    def orthonormal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64)).Q

    shared = orthonormal(d_in)
    found = [(orthonormal(d_out) * values) @ (shared if common else orthonormal(d_in)).T for _ in range(tasks)]
    return [(PAPER_RMS * m / m.square().mean().sqrt()).float() for m in found]


def least_squares(vectors: list[Tensor]) -> Tensor:
    """Eq. 21 as the least-squares problem that it is: all tasks' rows on top of each other, float64, without any Gram matrix.

    Singular values below 1e-7 of the largest are the rounding of the rows' float32 entries.
    """
    tau = [v.double().numpy() for v in vectors]
    w = [1 / np.sqrt((t**2).sum()) for t in tau]
    rows = np.concatenate([x * t for x, t in zip(w, tau, strict=True)])
    wanted = np.concatenate([x * t @ t.T for x, t in zip(w, tau, strict=True)], 1)
    total = sum(tau)
    change = np.linalg.lstsq(rows, (wanted - total @ rows.T).T, rcond=1e-7)[0]
    return torch.from_numpy(total + change.T)


@pytest.mark.parametrize("low", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("common", [True, False], ids=["common", "apart"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 48), (6, 64, 64), (2, 64, 128), (4, 128, 128)], ids=str)
def test_closed_form_without_ridge_is_the_minimiser(shape: tuple[int, int, int], common: bool, low: float) -> None:
    """Eq. 21 at the solution is what least squares on all rows reach, however flat the loss is along some directions."""
    vectors = ill_conditioned(*shape, low, common=common)
    best = loss_of(least_squares(vectors), vectors)
    start = loss_of(ours(vectors, steps=0), vectors)
    got = loss_of(ours(vectors, solver="closed_form", ridge=0.0), vectors)
    if best > 1e-12 * start:
        assert got <= best * (1 + 1e-6)
    else:  # fewer rows than inputs: the loss can be brought to 0, and what is left is rounding to float32
        assert got <= 1e-12 * start


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(3, 64, 64), (6, 48, 96), (2, 12, 64), (4, 128, 128)], ids=str)
@pytest.mark.parametrize("rank", [2, 12])
def test_the_rounding_of_low_rank_is_no_direction(shape: tuple[int, int, int], rank: int, seed: int) -> None:
    """Entries are float32, so that a product of low rank has full rank by its rounding; following that makes the result far too long."""
    tasks, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, d_in, generator=generator)
    vectors = [PAPER_RMS * torch.randn(d_out, rank, generator=generator) @ right for _ in range(tasks)]
    got = ours(vectors, solver="closed_form", ridge=0.0)
    assert float(got.norm()) < 3 * float(sum(vectors).norm())
    outside = torch.eye(d_in) - torch.linalg.pinv(right) @ right
    assert relative(got @ outside + got, got) < 1e-4


@pytest.mark.parametrize("shape", [(8, 96, 96), (4, 160, 48), (2, 64, 1)], ids=str)
def test_closed_form_without_ridge_on_full_rank(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    got = ours(vectors, solver="closed_form", ridge=0.0)
    assert relative(got, torch.from_numpy(dense(vectors, 0.0))) < 1e-4
    # Around the minimum the loss is flat: rounding the solution to float32 lifts it by ε² of what it was before the rows were taken off.
    rounding = FLOAT32**2 * sum(float((got.double() @ v.double().T).square().sum() / v.double().square().sum()) for v in vectors)
    assert loss_of(got, vectors) <= loss_of(autograd_loop(vectors, 1e-5), vectors) + rounding


@pytest.mark.parametrize("shape", [(3, 16, 256), (2, 24, 64), (3, 64, 64)], ids=str)
def test_closed_form_without_ridge_on_low_rank_is_the_minimiser_nearest_to_the_sum(shape: tuple[int, int, int]) -> None:
    _, d_out, d_in = shape
    basis = torch.randn(12, d_in, generator=torch.Generator().manual_seed(1))
    vectors = [v @ torch.eye(d_in)[:, :12] @ basis if d_out == d_in else v for v in task_vectors(*shape)]
    got = ours(vectors, solver="closed_form", ridge=0.0)
    tau = [v.double().numpy() for v in vectors]
    a = sum(t.T @ t / (t**2).sum() for t in tau)
    b = sum(t @ t.T @ t / (t**2).sum() for t in tau)
    total = sum(tau)
    nearest = total + (b - total @ a) @ np.linalg.pinv(a, rcond=1e-7, hermitian=True)
    assert np.linalg.matrix_rank(a, hermitian=True, tol=1e-7 * np.trace(a)) < d_in
    assert relative(got, torch.from_numpy(nearest)) < 1e-3
    # The rows of the tasks span the range, so it is the minimiser of least norm too.
    assert relative(got, torch.from_numpy(b @ np.linalg.pinv(a, rcond=1e-7, hermitian=True))) < 1e-3


def explicit_descent(vectors: list[Tensor], time: float, steps: int) -> Tensor:
    """Gradient descent on Eq. 21 in float64 from Σ τ_i with a tiny step, for `time` / mean eigenvalue of A."""
    tau = torch.stack(vectors).double()
    weight = 1 / tau.square().sum((1, 2), keepdim=True)
    mean_eigenvalue = float((weight * tau.square()).sum() / tau.shape[2])
    rate = time / mean_eigenvalue / steps
    current = tau.sum(0)
    for _ in range(steps):
        current = current - rate * (2 * weight * ((current - tau) @ tau.transpose(1, 2)) @ tau).sum(0)
    return current


@pytest.mark.parametrize("shape", [(2, 24, 20), (2, 4, 24)], ids=str)
@pytest.mark.parametrize("time", [0.3, 1.0])
def test_gradient_flow_is_gradient_descent_with_a_tiny_step(shape: tuple[int, int, int], time: float) -> None:
    """Its error is of first order in the step: it halves when the step does, and Richardson's extrapolation removes it."""
    vectors = task_vectors(*shape)
    got = ours(vectors, solver="gradient_flow", time=time)
    coarse, fine = explicit_descent(vectors, time, 1000), explicit_descent(vectors, time, 2000)
    assert relative(got, 2 * fine - coarse) < 1e-5
    assert relative(got, fine) < relative(got, coarse) < 1e-2


@pytest.mark.parametrize("shape", [(4, 160, 48), (8, 96, 96), (3, 16, 256), (2, 24, 64)], ids=str)
def test_limits_of_the_gradient_flow(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    assert torch.equal(ours(vectors, solver="gradient_flow", time=0.0), ours(vectors, steps=0))
    assert relative(ours(vectors, solver="gradient_flow", time=0.0), sum(vectors)) < 1e-6
    assert relative(ours(vectors, solver="gradient_flow", time=1e-6), sum(vectors)) < 1e-4
    end = ours(vectors, solver="closed_form", ridge=0.0)
    # The flow's A is of float32 products: known to ε of its largest eigenvalue, and its inverse to ε of its condition.
    values = torch.linalg.eigvalsh(sum(v.double().T @ v.double() / v.double().square().sum() for v in vectors))
    condition = float(values[-1] / values[values > 1e-10 * values[-1]][0])
    assert condition < 1e4
    for time in (1e4, 1e9):
        assert relative(ours(vectors, solver="gradient_flow", time=time), end) < 4 * FLOAT32 * condition


@pytest.mark.parametrize("shape", [(4, 24, 40), (3, 8, 64)], ids=str)
def test_gradient_flow_and_closed_form_lower_the_loss(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    losses = [loss_of(ours(vectors, solver="gradient_flow", time=t), vectors) for t in (0.0, 0.1, 1.0, 10.0, 1e6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


# Both sides, scale, zeros.


@pytest.mark.parametrize("solver", ["adam", "closed_form", "gradient_flow"])
def test_the_factored_side_is_the_other_one(solver: str) -> None:
    """The same tasks with one more that is zero lie on the other side of the threshold.

    Adam enlarges what the two sides round differently by a few per cent a step, so it goes a third of the way.
    """
    vectors = task_vectors(2, 16, 64)
    part = Interference(solver=solver, steps=100)  # type: ignore[arg-type]
    assert part.init(16, 64, 2).gram is None
    assert part.init(16, 64, 3).gram is not None
    assert (
        relative(ours([*vectors, torch.zeros(16, 64)], solver=solver, steps=100), ours(vectors, solver=solver, steps=100)) < 1e-5
    )


@pytest.mark.parametrize("factor", [2.0**-27, 2.0**-10, 8.0, 2.0**20])
@pytest.mark.parametrize("shape", [(4, 40, 24), (2, 8, 40)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"balance": False},
        {"reference": "random"},
        {"solver": "closed_form"},
        {"solver": "closed_form", "ridge": 0.0},
        {"solver": "gradient_flow"},
    ],
    ids=str,
)
def test_scaling_the_vectors_scales_the_result(factor: float, shape: tuple[int, int, int], fields: dict[str, Any]) -> None:
    """To the last bit where the factor itself rounds nothing."""
    vectors = task_vectors(*shape)
    assert torch.equal(ours([factor * v for v in vectors], **fields), factor * ours(vectors, **fields))


@pytest.mark.parametrize("solver", ["closed_form", "gradient_flow"])
@pytest.mark.parametrize("factor", [1e-8, 7.0, 1e6])
def test_scaling_by_what_rounds(factor: float, solver: str) -> None:
    for shape in [(4, 40, 24), (2, 8, 40)]:
        vectors = task_vectors(*shape)
        want = factor * ours(vectors, solver=solver)
        assert relative(ours([factor * v for v in vectors], solver=solver), want) < 1e-5


@pytest.mark.parametrize("solver", ["adam", "closed_form", "gradient_flow"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 4, 64)], ids=str)
def test_zero_task_vectors_drop_out(solver: str, shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape)
    part = Interference(solver=solver)  # type: ignore[arg-type]

    def run(given: list[Tensor]) -> Tensor:
        total = part.init(*given[0].shape, 5)  # the same side for both
        for index, vector in enumerate(given):
            total = part.add(total, vector, site([f"t{index}"]))
        return part.result(total, site())

    zero = torch.zeros_like(vectors[0])
    assert torch.equal(run([vectors[0], zero, vectors[1], zero, vectors[2]]), run(vectors))
    assert torch.equal(run([zero] * 5), zero)


@pytest.mark.parametrize("solver", ["adam", "closed_form", "gradient_flow"])
def test_one_task_comes_back_as_it_is(solver: str) -> None:
    for shape in [(1, 24, 16), (1, 8, 64)]:
        (vector,) = task_vectors(*shape)
        assert torch.equal(ours([vector], solver=solver), vector)


@pytest.mark.parametrize("fields", [{"reference": "random"}, {"rows": 0.3}, {"rows": 0.3, "reference": "random"}], ids=str)
def test_reference_rows(fields: dict[str, Any]) -> None:
    """Other rows stand in for the inputs: Σ w_i ‖(τ − τ_i) R_iᵀ‖² is what is minimised. The rows come from the parts' own choice."""
    for shape in [(3, 20, 24), (2, 4, 64)]:
        vectors = task_vectors(*shape)
        part = Interference(solver="closed_form", ridge=0.1, **fields)
        rows = [part._reference(v, site([f"t{i}"])).double() for i, v in enumerate(vectors)]
        w = [float(1 / v.double().square().sum()) for v in vectors]
        if fields.get("rows"):
            assert all(len(r) == -(-shape[1] * 3 // 10) for r in rows)
        if fields.get("reference") == "random":
            assert abs(float(rows[0].std() / vectors[0].double().std()) - 1) < 0.2
        else:
            assert all((row == vectors[0].double()).all(1).any() for row in rows[0])
        a = sum(x * r.T @ r for x, r in zip(w, rows, strict=True))
        b = sum(x * v.double() @ r.T @ r for x, v, r in zip(w, vectors, rows, strict=True))
        shift = 0.1 * a.trace() / len(a)
        mean = sum(x * v.double() for x, v in zip(w, vectors, strict=True)) / sum(w)
        want = torch.linalg.solve(a + shift * torch.eye(len(a)).double(), b + shift * mean, left=False)
        assert relative(ours(vectors, solver="closed_form", ridge=0.1, **fields), want) < 1e-5


def test_nothing_to_learn_from_leaves_the_sum() -> None:
    """Reference rows that are all zero though the vectors are not."""
    vectors = [torch.zeros(10, 10), torch.zeros(10, 10)]
    chosen = Interference(rows=0.1)._reference(torch.arange(10.0)[:, None].expand(10, 10).contiguous(), site(["t0"]))
    for vector in vectors:
        vector[(int(chosen[0, 0]) + 1) % 10] = 1.0
    part_of = [site([f"t{i}"]) for i in range(2)]
    for solver in ("adam", "closed_form", "gradient_flow"):
        part = Interference(rows=0.1, solver=solver)  # type: ignore[arg-type]
        total = part.init(10, 10, 2)
        for vector in vectors:
            total = part.add(total, vector, part_of[0])
        assert torch.equal(part.result(total, site()), vectors[0] + vectors[1])


def test_cost_grows_with_the_work() -> None:
    part = Interference()
    assert part.cost((768, 768), 8).flops == pytest.approx(300 * 2 * 768**3, rel=0.2)
    assert part.cost((3072, 768), 4).memory == part.cost((3072, 768), 16).memory
    assert Interference(solver="closed_form").cost((768, 768), 8).flops < part.cost((768, 768), 8).flops / 5


# Through the engine: fused and transposed tensors.


def wudi(name: str, stored: dict[str, Tensor], **fields: Any) -> Tensor:
    base = {name: torch.zeros(next(iter(stored.values())).shape)}
    return merged_vector(base, {task: {name: vector} for task, vector in stored.items()}, Wudi(steps=50, **fields))[name]


def test_split_fused_merges_three_matrices() -> None:
    tasks = {f"t{i}": torch.cat(task_vectors(3, 16, 16, seed=i)) for i in range(4)}
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    parts = [ours([v[16 * p : 16 * (p + 1)] for v in tasks.values()], steps=50) for p in range(3)]
    assert torch.equal(wudi(name, tasks, split_fused=True), torch.cat(parts))
    assert torch.equal(wudi(name, tasks), ours(list(tasks.values()), steps=50))
    assert not torch.equal(wudi(name, tasks), torch.cat(parts))


def test_conv1d_is_merged_as_the_linear_layer_that_it_is() -> None:
    fused = {f"t{i}": torch.cat(task_vectors(3, 16, 16, seed=i)) for i in range(4)}
    name = "transformer.h.0.attn.c_attn.weight"
    stored = {task: v.T.contiguous() for task, v in fused.items()}
    parts = [ours([v[16 * p : 16 * (p + 1)] for v in fused.values()], steps=50) for p in range(3)]
    assert torch.equal(wudi(name, stored, split_fused=True), torch.cat(parts).T)
    plain = {f"t{i}": v for i, v in enumerate(task_vectors(4, 16, 64))}  # d_out × d_in of the layer
    got = wudi("transformer.h.0.mlp.c_proj.weight", {task: v.T.contiguous() for task, v in plain.items()})
    assert torch.equal(got, ours(list(plain.values()), steps=50).T)


def test_a_convolution_is_merged_as_a_matrix_where_it_is_asked_for() -> None:
    vectors = {f"t{i}": v.reshape(8, 3, 2, 2) for i, v in enumerate(task_vectors(3, 8, 12))}
    got = wudi("conv1.weight", vectors, tensors="all")
    assert torch.equal(got.reshape(8, 12), ours([v.reshape(8, 12) for v in vectors.values()], steps=50))


@pytest.mark.parametrize("solver", ["adam", "closed_form", "gradient_flow"])
@pytest.mark.parametrize("fields", [{}, {"reference": "random"}, {"rows": 0.5}], ids=str)
def test_order_of_tasks_changes_no_bit(solver: str, fields: dict[str, Any]) -> None:
    name = "layers.0.mlp.fc1.weight"
    tasks = {f"t{i}": v for i, v in enumerate(task_vectors(4, 24, 32))}
    other = {task: tasks[task] for task in ("t2", "t0", "t3", "t1")}
    assert torch.equal(wudi(name, tasks, solver=solver, **fields), wudi(name, other, solver=solver, **fields))
