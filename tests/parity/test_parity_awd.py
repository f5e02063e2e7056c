"""AWD against an independent optimisation of the same objective in full dimension, and its laws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import thetau
from synthetic import differences, merged, merged_vector, models, site, vectors_of
from thetau.methods import Awd, DareLinear, TaskArithmetic, Ties, Wudi
from thetau.transforms import Disentangle
from thetau.transforms.awd_adam import full_dimension
from thetau.transforms.awd_gram import objective, solve, solve_batch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the engine's workers; the references, too, are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [(2, 40, 0.5), (3, 40, 0.5), (5, 30, 0.3), (8, 60, 0.4)]  # tasks, dimensions, weight of what the vectors share


def task_vectors(tasks: int, size: int, shared: float, seed: int = 0) -> Tensor:
    """Vectors of different lengths with a part in common, in float64."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=g, dtype=torch.float64)
    found = torch.randn(tasks, size, generator=g, dtype=torch.float64) + shared * common
    return 0.01 * found * torch.exp(0.3 * torch.randn(tasks, 1, generator=g, dtype=torch.float64))


def loss_in_full(tau: Tensor, delta: Tensor, alpha: float, smooth: float = 0.0, *, reverse: bool = False) -> Tensor:
    """Eqs. 11 to 13 as they stand: mean over ordered pairs of |cos(τ_i − δ, τ_j − δ)|, plus α‖δ‖."""
    left = tau - delta
    unit = left / left.norm(dim=1, keepdim=True)
    cos = unit @ unit.T
    size = (cos**2 + smooth**2).sqrt() if smooth else cos.abs()
    mean = (size.sum() - size.diagonal().sum()) / (len(tau) * (len(tau) - 1))
    return (-mean if reverse else mean) + alpha * (delta.square().sum() + 1e-60).sqrt()


def descend_in_full(tau: Tensor, alpha: float, *, reverse: bool = False) -> tuple[float, Tensor]:
    """The best point of L-BFGS from δ = 0 under a falling smoothing of |cos|, by autograd in all coordinates."""
    scale = float(tau.norm(dim=1).mean())
    unit, weight = tau / scale, alpha * scale

    def value_and_slope(x: np.ndarray, smooth: float) -> tuple[float, np.ndarray]:
        delta = torch.from_numpy(x).requires_grad_()
        loss = loss_in_full(unit, delta, weight, smooth, reverse=reverse)
        (slope,) = torch.autograd.grad(loss, [delta])
        return float(loss.detach()), slope.numpy()

    best, where = float(loss_in_full(unit, torch.zeros_like(tau[0]), weight, reverse=reverse)), torch.zeros_like(tau[0])
    x = np.zeros(tau.shape[1])
    for smooth in (0.1, 0.01, 1e-3, 1e-4, 1e-6, 0.0):
        x = minimize(value_and_slope, x, args=(smooth,), jac=True, method="L-BFGS-B", options={"maxiter": 60}).x
        now = float(loss_in_full(unit, torch.from_numpy(x), weight, reverse=reverse))
        if now < best:
            best, where = now, torch.from_numpy(x.copy())
    return best, scale * where


@pytest.mark.parametrize("alpha", [1e-2, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_is_as_low_as_in_full_dimension(case: tuple[int, int, float], alpha: float) -> None:
    tau = task_vectors(*case)
    found = solve(tau @ tau.T, alpha)
    delta = torch.tensor(found.coefficients, dtype=torch.float64) @ tau
    ours = float(loss_in_full(tau, delta, alpha))
    assert ours == pytest.approx(found.loss, rel=1e-9)  # the function of K numbers is the function of all coordinates
    theirs, _ = descend_in_full(tau, alpha)
    start = float(loss_in_full(tau, torch.zeros_like(delta), alpha))
    assert ours <= theirs + 1e-9
    assert theirs < start or ours == start
    assert theirs - ours < 0.2 * (start - ours) + 1e-9  # the reference is not a straw man: it made most of the way
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_reverse_is_as_low_as_in_full_dimension(case: tuple[int, int, float]) -> None:
    tau = task_vectors(*case)
    found = solve(tau @ tau.T, 1.0, reverse=True)
    theirs, _ = descend_in_full(tau, 1.0, reverse=True)
    assert found.loss <= theirs + 1e-9
    assert found.mean_after > found.mean_before


def test_descent_in_full_dimension_stays_in_the_span() -> None:
    """What the Gram solver stands on."""
    tau = task_vectors(4, 30, 0.4)
    _, delta = descend_in_full(tau, 1e-2)
    assert float(delta.norm()) > 0
    projection = torch.linalg.lstsq(tau.T, delta[:, None]).solution
    assert float((tau.T @ projection)[:, 0].sub(delta).norm() / delta.norm()) < 1e-7


def grams(count: int, tasks: int, size: int, shared: float) -> Tensor:
    found = torch.stack([task_vectors(tasks, size, shared, seed) for seed in range(count)])
    return found @ found.transpose(1, 2)


@pytest.mark.parametrize("case", [(2, 64, 0.5), (4, 64, 0.3), (8, 768, 0.3), (8, 64, 0.0)], ids=str)
def test_many_at_once_are_as_good_as_one_by_one(case: tuple[int, int, float]) -> None:
    gram = grams(10, *case)
    c = solve_batch(gram, 1e-2)
    batch = objective(gram, c, 1e-2)
    single = torch.tensor([solve(one, 1e-2).loss for one in gram], dtype=torch.float64)
    worse = (batch - single) / single
    assert float(worse.median()) < 1e-4
    assert float(worse.max()) < 1e-2  # another local minimum now and then
    assert float((worse < 1e-3).double().mean()) > 0.9
    assert bool((batch <= objective(gram, torch.zeros_like(c), 1e-2)).all())


def test_a_batch_solves_each_problem_alone() -> None:
    gram = grams(6, 4, 32, 0.4)
    together = solve_batch(gram, 1e-2)
    for one, c in zip(gram, together, strict=True):
        torch.testing.assert_close(solve_batch(one[None], 1e-2)[0], c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("many", [False, True])
def test_scale_of_the_vectors_and_alpha(many: bool) -> None:
    """δ scales with the vectors where α is scaled against them."""
    gram = grams(1, 4, 32, 0.4)

    def coefficients(gram: Tensor, alpha: float) -> Tensor:
        return solve_batch(gram, alpha)[0] if many else torch.tensor(solve(gram[0], alpha).coefficients, dtype=torch.float64)

    want = coefficients(gram, 1e-2)
    assert float(want.abs().max()) > 0
    for factor in (1e-12, 1e-3, 1e6):
        torch.testing.assert_close(coefficients(gram * factor**2, 1e-2 / factor), want, rtol=1e-4, atol=1e-7)


# Corner cases.


def test_two_vectors_become_orthogonal() -> None:
    tau = task_vectors(2, 30, 0.7)
    found = solve(tau @ tau.T, 1e-6)
    assert found.mean_before > 0.1
    assert found.mean_after < 1e-6
    assert found.loss == pytest.approx(1e-6 * found.norm, rel=1e-2)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (1, 1, 1), (1, -1), (1, 2), (1, -0.5, 3)], ids=str)
def test_vectors_on_one_line_are_left_alone(many: bool, signs: tuple[float, ...]) -> None:
    """Every cosine is ±1 whatever δ in their span; to take one of them away whole must not count as a gain."""
    vector = task_vectors(1, 30, 0.0)
    tau = torch.tensor(signs, dtype=torch.float64)[:, None] * vector
    c = solve_batch((tau @ tau.T)[None], 1e-3)[0].tolist() if many else solve(tau @ tau.T, 1e-3).coefficients
    assert np.abs(np.array(c) @ tau.numpy()).max() < 1e-9


def both_solvers(gram: Tensor, alpha: float, *, reverse: bool = False) -> list[Tensor]:
    """The coefficients that one problem alone and many at once get."""
    alone = torch.tensor(solve(gram, alpha, reverse=reverse).coefficients, dtype=torch.float64)
    return [alone, solve_batch(gram[None], alpha, reverse=reverse)[0]]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("alpha", "reverse"), [(0.0, False), (1e-6, False), (1e-3, True)], ids=str)
def test_a_line_is_told_by_its_spectrum(alpha: float, reverse: bool, seed: int) -> None:
    """Multiples of one vector, rounded to float32, and a Gram matrix whose sums another processor rounds otherwise."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(5, generator=generator, dtype=torch.float64) * 10.0 ** torch.tensor([0, -3, 2, 0, 1])
    tau = (factors[:, None] * torch.randn(200, generator=generator, dtype=torch.float64)).float().double()
    noise = 1 + 1e-15 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    for gram in (tau @ tau.T, tau @ tau.T * (noise + noise.T) / 2):
        for c in both_solvers(gram, alpha, reverse=reverse):
            assert c.tolist() == [0.0] * 5


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_vectors_that_depend_on_each_other_get_the_shortest_coefficients(reverse: bool, seed: int) -> None:
    """Five vectors in three dimensions: what has no effect on δ is not in its coefficients."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    tau = (mix @ torch.randn(3, 200, generator=generator, dtype=torch.float64)).float().double()
    gram = tau @ tau.T
    null = torch.linalg.svd(mix / tau.norm(dim=1, keepdim=True), full_matrices=True).U[:, 3:].T / tau.norm(dim=1)
    for c in both_solvers(gram, 1e-3, reverse=reverse):
        weighted = c * tau.norm(dim=1)
        assert float((null * tau.norm(dim=1) @ weighted).norm()) < 1e-6 * float(weighted.norm())
        start = torch.zeros(5, dtype=torch.float64)
        assert objective(gram, c, 1e-3, reverse=reverse) < objective(gram, start, 1e-3, reverse=reverse) - 1e-3


def test_adam_leaves_what_is_orthogonal_up_to_rounding() -> None:
    """Its first steps are as long whether a cosine is 0.5 or 1e-9."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.block_diag(*torch.randn(3, 1, 60, generator=generator))
    rotation = torch.linalg.qr(torch.randn(180, 180, generator=generator)).Q
    for stack in (apart, apart @ rotation):
        found = full_dimension({"w": stack.reshape(3, 9, 20)}, alpha=1e-3, scope="vector", reverse=False, steps=10, lr=0.01)
        assert not found.entries["w"].any()


@pytest.mark.parametrize("many", [False, True])
def test_two_alike_among_others(many: bool) -> None:
    tau = task_vectors(4, 30, 0.4)
    tau[1] = tau[0]
    gram = tau @ tau.T
    c = solve_batch(gram[None], 1e-3)[0] if many else torch.tensor(solve(gram, 1e-3).coefficients, dtype=torch.float64)
    left = tau - c @ tau
    assert float(left.norm(dim=1).min()) > 1e-3 * float(tau.norm(dim=1).min())
    assert float(objective(gram, c, 1e-3)) <= float(objective(gram, torch.zeros(4, dtype=torch.float64), 1e-3))


@pytest.mark.parametrize("many", [False, True])
def test_zero_vectors_take_no_part(many: bool) -> None:
    tau = task_vectors(3, 30, 0.5)
    padded = torch.cat([tau[:1], torch.zeros(2, 30).double(), tau[1:]])

    def coefficients(vectors: Tensor) -> Tensor:
        gram = vectors @ vectors.T
        return solve_batch(gram[None], 1e-2)[0] if many else torch.tensor(solve(gram, 1e-2).coefficients, dtype=torch.float64)

    got = coefficients(padded)
    assert got[1] == got[2] == 0
    torch.testing.assert_close(got[[0, 3, 4]], coefficients(tau), rtol=1e-3, atol=1e-6)
    for few in (torch.zeros(3, 30).double(), torch.cat([tau[:1], torch.zeros(2, 30).double()]), tau[:1]):
        assert coefficients(few).tolist() == [0.0] * len(few)


def test_solve_says_which_tasks_are_alive() -> None:
    found = solve(torch.zeros(3, 3, dtype=torch.float64), 1e-3)
    assert found.alive == [False] * 3
    assert (found.loss, found.norm, found.mean_before, found.mean_after) == (0, 0, 0, 0)


def test_large_alpha_forbids_any_change() -> None:
    gram = grams(3, 4, 30, 0.5)
    assert solve(gram[0], 1e6).norm == 0
    assert torch.equal(solve_batch(gram, 1e6), torch.zeros(3, 4, dtype=torch.float64))


# The transform and the method.

SHAPES = {
    "layers.0.attention.q_proj.weight": (24, 16),
    "layers.0.mlp.fc1.weight": (32, 24),
    "layers.0.mlp.fc1.bias": (32,),
    "embed.weight": (12, 16),
}
LINEAR = ["layers.0.attention.q_proj.weight", "layers.0.mlp.fc1.weight"]
TASKS = ("a", "b", "c")


def parts_of(method: Any, base: dict[str, Tensor], tuned: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Each task's vector after the transforms."""
    _, vectors = vectors_of(base, tuned)
    return {
        task: part.state_dict() for task, part in zip(tuned, thetau.transform(vectors, method, names=list(tuned)), strict=True)
    }


def flat(state: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in names]).double()


def test_one_delta_for_the_whole_vector_from_the_linear_weights_alone() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    whole = torch.stack([flat(tau[task], LINEAR) for task in TASKS])
    found = solve(whole @ whole.T, 1e-3)
    delta = torch.tensor(found.coefficients, dtype=torch.float64) @ whole
    got = parts_of(Awd(), base, tuned)
    for task, row in zip(TASKS, whole, strict=True):
        assert sorted(got[task]) == sorted(LINEAR)  # others get no task vector
        torch.testing.assert_close(flat(got[task], LINEAR), row - delta, rtol=0, atol=1e-7)
    out = merged(base, tuned, Awd(then=TaskArithmetic(scale=0.5)))
    assert torch.equal(out["embed.weight"], base["embed.weight"])
    want = flat(base, LINEAR) + 0.5 * (whole.sum(0) - 3 * delta)
    torch.testing.assert_close(flat(out, LINEAR), want, rtol=0, atol=1e-6)


def test_one_objective_for_each_tensor() -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    got = parts_of(Awd(scope="tensor"), base, tuned)
    for name in LINEAR:
        rows = torch.stack([flat(tau[task], [name]) for task in TASKS])
        delta = torch.tensor(solve(rows @ rows.T, 1e-3).coefficients, dtype=torch.float64) @ rows
        for task, row in zip(TASKS, rows, strict=True):
            torch.testing.assert_close(flat(got[task], [name]), row - delta, rtol=0, atol=1e-7)


def test_one_objective_for_each_row() -> None:
    base, tuned = models(SHAPES, TASKS)
    tuned["b"][LINEAR[0]][3] = base[LINEAR[0]][3]  # a row in which one task is zero
    tau = differences(base, tuned)
    got = parts_of(Awd(scope="row", alpha=1e-2), base, tuned)
    for name in LINEAR:
        for row in range(0, SHAPES[name][0], 6):
            rows = torch.stack([tau[task][name][row] for task in TASKS]).double()
            after = torch.stack([got[task][name][row] for task in TASKS]).double()
            alive = rows.any(1)
            assert torch.equal(after[~alive], rows[~alive])
            delta = (rows - after)[alive][0]
            assert float(loss_in_full(rows[alive], delta, 1e-2)) <= solve(rows @ rows.T, 1e-2).loss * 1.02 + 1e-6


@pytest.mark.parametrize("scope", ["vector", "tensor", "row"])
def test_a_zero_task_stays_zero(scope: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    tuned["b"] = {name: tensor.clone() for name, tensor in base.items()}
    got = parts_of(Awd(scope=scope), base, tuned)
    assert all(not got["b"][name].any() for name in LINEAR)
    alone = parts_of(Awd(scope=scope), base, {task: tuned[task] for task in ("a", "c")})
    for task in ("a", "c"):
        torch.testing.assert_close(flat(got[task], LINEAR), flat(alone[task], LINEAR), rtol=0, atol=1e-5)


def test_the_summary_says_what_it_brought() -> None:
    tau = task_vectors(3, 30, 0.5)
    state = Disentangle().prepare(tau @ tau.T, TASKS)
    (line,) = Disentangle().notes(state)
    assert "mean |cos|" in line
    assert "→" in line


# Adam in full dimension, for comparison.


@pytest.mark.parametrize("scope", ["vector", "tensor", "row"])
@pytest.mark.parametrize("reverse", [False, True])
def test_adam_lowers_the_objective(scope: str, reverse: bool) -> None:
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    stacks = {name: torch.stack([tau[task][name] for task in TASKS]) for name in LINEAR}
    alpha = 1e-3
    found = full_dimension(stacks, alpha=alpha, scope=scope, reverse=reverse, steps=60, lr=0.01)
    groups = {
        "vector": [
            (torch.cat([stacks[n].reshape(3, -1) for n in LINEAR], 1), torch.cat([found.entries[n].reshape(-1) for n in LINEAR]))
        ],
        "tensor": [(stacks[n].reshape(3, -1), found.entries[n].reshape(-1)) for n in LINEAR],
        "row": [(stacks[n][:, r], found.entries[n][r]) for n in LINEAR for r in range(SHAPES[n][0])],
    }[scope]
    before = sum(float(loss_in_full(t.double(), torch.zeros_like(d).double(), alpha, reverse=reverse)) for t, d in groups)
    after = sum(float(loss_in_full(t.double(), d.double(), alpha, reverse=reverse)) for t, d in groups)
    assert after < before - 0.02 * abs(before)


@pytest.mark.parametrize("scope", ["vector", "tensor", "row"])
def test_adam_leaves_what_is_zero(scope: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    tuned["b"][LINEAR[0]] = base[LINEAR[0]].clone()
    tuned["c"][LINEAR[1]][2] = base[LINEAR[1]][2]
    got = parts_of(Awd(scope=scope, solver="adam", steps=5), base, tuned)
    assert all(bool(got[task][name].isfinite().all()) for task in TASKS for name in LINEAR)
    if scope != "vector":
        assert not got["b"][LINEAR[0]].any()
    if scope == "row":
        assert not got["c"][LINEAR[1]][2].any()
    assert not torch.equal(got["a"][LINEAR[1]], differences(base, tuned)["a"][LINEAR[1]])


@pytest.mark.parametrize("then", [Ties(), DareLinear(), Wudi(steps=5), Awd(alpha=1e-2)], ids=lambda m: type(m).__name__)
def test_any_method_may_follow(then: Any) -> None:
    """The other method sees the disentangled vectors of the linear weights, and nothing else."""
    base, tuned = models(SHAPES, TASKS)
    got = merged_vector(base, tuned, Awd(then=then))
    assert sorted(got) == sorted(LINEAR)
    _, vectors = vectors_of(base, tuned)
    cleaned = thetau.transform(vectors, Awd(), names=TASKS)
    want = thetau.merge(cleaned, then, names=TASKS, exclude=["*bias", "embed*"]).state_dict()
    for name in LINEAR:
        assert torch.equal(got[name], want[name]), name


def test_scale_of_the_method_that_follows_may_be_a_tuple() -> None:
    base, tuned = models(SHAPES, TASKS)
    got = merged_vector(base, tuned, Awd(then=TaskArithmetic(scale=(0.0, 1.0, 0.0))))
    want = parts_of(Awd(), base, tuned)["b"]
    assert all(torch.equal(got[name], want[name]) for name in LINEAR)


def test_site_has_a_place_for_parts_without_the_engine() -> None:
    """By row no statistic is asked for: a block holds all that counts."""
    assert Disentangle(scope="row").requires() is None
    tau = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    out = Disentangle(scope="row").apply(tau, None, site(TASKS, shape=(5, 8)))
    assert out.shape == tau.shape
    assert not torch.equal(out, tau)
