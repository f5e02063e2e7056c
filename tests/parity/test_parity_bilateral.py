"""Bilateral merging against dense Kronecker solves, against WUDI, and its laws."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matrices import interference as wudi
from matrices import task_vectors
from synthetic import merged_vector, relative, site
from thetau.linalg.descent import chebyshev, descend, flow
from thetau.linalg.kronecker import Kronecker, Term
from thetau.linalg.svd import sketched, svd, truncated_svd
from thetau.methods import Bilateral
from thetau.methods.bilateral_solvers import TwoSided, with_factors
from thetau.random import stream
from tiny import one_thread as one_thread

POWERS = [(0.5, 1.0), (0.5, 0.5), (0.25, 0.75), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
TO_THE_END: dict[str, Any] = {"tolerance": 1e-10, "iterations": 3000}


def ours(vectors: list[Tensor], **fields: Any) -> Tensor:
    part = TwoSided(**fields)
    total = part.init(*vectors[0].shape, len(vectors))
    for index, vector in enumerate(vectors):
        total = part.add(total, vector.clone(), site([f"t{index}"]))
    return part.result(total, site([f"t{index}" for index in range(len(vectors))]))


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A fractional power of a positive semidefinite matrix of unit trace, by its eigenvalues; M⁰ is the identity."""
    if exponent == 0:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    values, vectors = torch.linalg.eigh(matrix)
    seen = values > 1e-12 * values[-1]  # a small power would enlarge the rounding of a zero
    return (vectors * torch.where(seen, values, 0) ** exponent) @ vectors.T


def factors(vector: Tensor, p: float, q: float, rank: int | None = None, tail: str = "drop") -> tuple[Tensor, Tensor]:
    """H and G, dense, in float64; from the rank-`rank` approximation where it is given, at the whole vector's norm."""
    given = vector.double() / vector.double().norm()
    if rank is not None and rank < min(vector.shape) and tail == "flat":
        u, s, vt = torch.linalg.svd(given, full_matrices=False)
        even = (s[rank:].square().sum() / (len(s) - rank)).sqrt()
        made = []
        for basis, d, e in ((u[:, :rank], vector.shape[0], p), (vt[:rank].T, vector.shape[1], q)):
            outside = torch.eye(d, dtype=torch.float64) - basis @ basis.T
            made.append(
                basis @ torch.diag(s[:rank] ** (2 * e)) @ basis.T + (len(s) - rank) / (d - rank) * even ** (2 * e) * outside
            )
            if e == 0:
                made[-1] = torch.eye(d, dtype=torch.float64)
        return made[0], made[1]
    if rank is not None:
        u, s, vt = torch.linalg.svd(given, full_matrices=False)
        given = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return power(given @ given.T, p), power(given.T @ given, q)


def dense(
    vectors: list[Tensor], sides: list[tuple[Tensor, Tensor]], weights: list[float] | None = None, start: Tensor | None = None
) -> Tensor:
    """The minimiser nearest to the start, by the normal equations in full dimension (row-major vec: vec(HXG) = (H ⊗ G) vec X)."""
    begin = (sum(vectors) if start is None else start).double()
    weights = weights or [1.0] * len(vectors)
    matrix, right = (
        torch.zeros(begin.numel(), begin.numel(), dtype=torch.float64),
        torch.zeros(begin.numel(), dtype=torch.float64),
    )
    for vector, (h, g), w in zip(vectors, sides, weights, strict=True):
        kron = w * torch.kron(h, g)
        matrix += kron
        right += kron @ (vector.double() - begin).reshape(-1)
    change = torch.linalg.pinv(matrix, rtol=1e-9, hermitian=True) @ right
    return begin + change.reshape(begin.shape)


def operator(vectors: list[Tensor], p: float, q: float, **fields: Any) -> Kronecker:
    part = TwoSided(p=p, q=q, tolerance=1e-10, **fields)
    total = part.init(*vectors[0].shape, len(vectors))
    for index, vector in enumerate(vectors):
        total = part.add(total, vector, site([f"t{index}"]))
    return Kronecker(terms=total.terms, shape=(vectors[0].shape[0], vectors[0].shape[1]), pull=total.pull)


# The operator and the minimum.


@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 5, 9), (4, 1, 7), (2, 6, 1)], ids=str)
@pytest.mark.parametrize(("p", "q"), [pair for pair in POWERS if 0 not in pair], ids=str)
def test_the_operator_is_the_dense_sum_of_kronecker_products(shape: tuple[int, int, int], p: float, q: float) -> None:
    vectors = task_vectors(*shape)
    for rank, tail in ((None, "flat"), (2, "drop"), (2, "flat")):
        made = operator(vectors, p, q, rank=rank, tail=tail)
        x = torch.randn(shape[1:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        sides = [factors(vector, p, q, rank, tail) for vector in vectors]
        assert relative(made.apply(x), sum((h @ x @ g for h, g in sides), start=torch.zeros_like(x))) < 1e-6
        want = sum((h @ (v.double() - x) @ g for v, (h, g) in zip(vectors, sides, strict=True)), start=torch.zeros_like(x))
        assert relative(made.residual(x), want) < 1e-6
        whole = sum(torch.kron(h, g) for h, g in sides)
        assert isinstance(whole, Tensor)
        assert made.bound() >= float(torch.linalg.eigvalsh(whole)[-1]) * (1 - 1e-9)


@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 5, 9), (5, 7, 7)], ids=str)
@pytest.mark.parametrize(("p", "q"), POWERS, ids=str)
@pytest.mark.parametrize("precondition", [False, True])
def test_run_to_the_end_it_is_the_dense_solve(shape: tuple[int, int, int], p: float, q: float, precondition: bool) -> None:
    vectors = task_vectors(*shape)
    want = dense(vectors, [factors(vector, p, q) for vector in vectors])
    assert relative(ours(vectors, p=p, q=q, precondition=precondition, **TO_THE_END), want) < 1e-5


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_truncation_drops_directions_of_the_loss_and_nothing_of_the_vectors(p: float, q: float) -> None:
    vectors = task_vectors(3, 8, 6)
    want = dense(vectors, [factors(vector, p, q, 2) for vector in vectors])
    got = ours(vectors, p=p, q=q, rank=2, tail="drop", **TO_THE_END)
    assert relative(got, want) < 1e-5
    flat = dense(vectors, [factors(vector, p, q, 2, "flat") for vector in vectors])
    assert relative(ours(vectors, p=p, q=q, rank=2, **TO_THE_END), flat) < 1e-5
    assert relative(got, ours(vectors, p=p, q=q, **TO_THE_END)) > 1e-2
    # What no task's kept direction sees is still the sum of the whole vectors.
    seen = torch.cat([torch.linalg.svd(v.double())[2][:2] for v in vectors]).T
    left = torch.cat([torch.linalg.svd(v.double())[0][:, :2] for v in vectors], 1)
    p_left, p_right = left @ torch.linalg.pinv(left), seen @ torch.linalg.pinv(seen)
    unseen = (got - sum(vectors)).double()
    if p > 0:
        unseen = unseen - p_left @ unseen
    if q > 0:
        unseen = unseen - unseen @ p_right
    assert float(unseen.norm()) < 1e-6 * float(got.norm()) or (p > 0 and q > 0)


@pytest.mark.parametrize("balance", ["norm", "loss", "trace", "none"])
def test_balance(balance: Any) -> None:
    vectors = [(i + 1) * v for i, v in enumerate(task_vectors(3, 8, 6))]
    p, q = 0.5, 1.0
    sides = [factors(v, p, q) for v in vectors]
    weights = {
        "norm": [1.0] * 3,
        "loss": [
            float(v.double().square().sum() / (v * (h @ v.double() @ g)).sum()) for v, (h, g) in zip(vectors, sides, strict=True)
        ],
        "trace": [float(1 / (h.trace() * g.trace())) for h, g in sides],
        "none": [float(v.double().norm() ** (2 * (p + q))) for v in vectors],
    }[balance]
    assert relative(ours(vectors, balance=balance, **TO_THE_END), dense(vectors, sides, weights)) < 1e-5


def test_the_start_is_kept_where_nothing_is_known() -> None:
    vectors = task_vectors(3, 16, 48)  # together of rank at most 48 on both sides, but H ⊗ G is singular
    mean = sum(vectors) / 3
    sides = [factors(v, 0.5, 1.0, 2) for v in vectors]
    assert relative(ours(vectors, rank=2, tail="drop", start="mean", **TO_THE_END), dense(vectors, sides, start=mean)) < 1e-5
    assert torch.equal(ours(vectors, iterations=0, start="mean"), ours(vectors, iterations=0) / 3)
    assert relative(ours(vectors, iterations=0), sum(vectors)) < 1e-6


# Against WUDI.


@pytest.mark.parametrize("shape", [(8, 96, 96), (4, 160, 48), (4, 48, 160)], ids=str)
@pytest.mark.parametrize("precondition", [False, True])
def test_to_the_right_only_it_is_wudis_closed_form(shape: tuple[int, int, int], precondition: bool) -> None:
    vectors = task_vectors(*shape)
    end = wudi(vectors, solver="closed_form", ridge=0.0)
    assert relative(ours(vectors, p=0.0, q=1.0, precondition=precondition, **TO_THE_END), end) < 1e-5
    uneven = [(i + 1) * v for i, v in enumerate(vectors)]  # the balance is WUDI's, on and off
    for mine, theirs in (("norm", True), ("none", False)):
        got = ours(uneven, p=0.0, q=1.0, balance=mine, precondition=precondition, **TO_THE_END)
        assert relative(got, wudi(uneven, solver="closed_form", ridge=0.0, balance=theirs)) < 1e-5


@pytest.mark.parametrize(
    ("shape", "time"),
    [((8, 96, 96), 0.3), ((8, 96, 96), 30.0), ((4, 160, 48), 1.0), ((3, 16, 256), 0.3), ((3, 16, 256), 1.0)],
    ids=str,
)
def test_to_the_right_only_the_flow_is_wudis(shape: tuple[int, int, int], time: float) -> None:
    vectors = task_vectors(*shape)
    tasks, d_out, d_in = shape
    unseen = d_in / min(d_in, tasks * d_out)  # WUDI's mean eigenvalue counts the zeros
    got = ours(vectors, p=0.0, q=1.0, solver="flow", time=time * unseen)
    assert relative(got, wudi(vectors, solver="gradient_flow", time=time)) < 1e-4


def test_by_role_each_matrix_has_one_side() -> None:
    """The right one is WUDI's gradient flow; the left one is that of the transposed vectors."""
    vectors = task_vectors(4, 24, 24)
    right = wudi(vectors, solver="gradient_flow")
    left = wudi([v.T.contiguous() for v in vectors], solver="gradient_flow").T
    for name, want in (
        ("encoder.layer.0.attention.self.query.weight", right),
        ("encoder.layer.0.attention.output.dense.weight", left),
        ("encoder.layer.0.intermediate.dense.weight", right),  # no larger side
    ):
        got = bilateral(name, {f"t{i}": v for i, v in enumerate(vectors)})
        assert relative(got, want) < 1e-5
    for shape, name in (
        ((40, 16), "encoder.layer.0.intermediate.dense.weight"),
        ((16, 40), "encoder.layer.0.output.dense.weight"),
    ):
        vectors = task_vectors(4, *shape)
        turned = [v.T.contiguous() if shape[0] > shape[1] else v for v in vectors]
        want = wudi(turned, solver="gradient_flow")
        got = bilateral(name, {f"t{i}": v for i, v in enumerate(vectors)})
        assert relative(got, want.T if shape[0] > shape[1] else want) < 1e-5


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("left", [False, True])
def test_whole_powers_of_one_side_are_products(power: float, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [(i + 1) * v for i, v in enumerate(task_vectors(3, 8, 6))]
    p, q = (power, 0.0) if left else (0.0, power)
    sides = [factors(v, p, q) for v in vectors]
    weights = {"norm": [1.0] * 3, "none": [float(v.double().norm() ** (2 * power)) for v in vectors]}
    from thetau.methods import bilateral_solvers

    def fail(*_: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(bilateral_solvers, "truncated_svd", fail)
    for balance, w in weights.items():
        got = ours(vectors, p=p, q=q, balance=balance, **TO_THE_END)
        assert relative(got, dense(vectors, sides, w)) < 1e-5


# The solvers.


def test_flow_is_gradient_descent_with_a_tiny_step() -> None:
    """Richardson's extrapolation of explicit Euler in float64."""
    vectors = task_vectors(3, 12, 10)
    made = operator(vectors, 0.5, 1.0)
    residual = made.residual(sum(vectors).double())
    unit = float((residual * made.apply(residual)).sum() / residual.square().sum())

    def euler(steps: int) -> Tensor:
        x = torch.zeros_like(residual)
        for _ in range(steps):
            x = x + 2 * 3.0 / unit / steps * (residual - made.apply(x))
        return x

    coarse, fine = euler(2000), euler(4000)
    got = flow(made.apply, residual, time=3.0, bound=made.bound())
    assert relative(got, 2 * fine - coarse) < 1e-5
    assert relative(got, fine) < relative(got, coarse) < 1e-2


@pytest.mark.parametrize(("s", "bound"), [(0.01, 1.0), (3.0, 8.0), (400.0, 2.0)])
def test_chebyshev_is_as_accurate_as_it_says(s: float, bound: float) -> None:
    c = torch.tensor(chebyshev(s, bound, 1e-6), dtype=torch.float64)
    x = torch.linspace(1e-9, bound, 500, dtype=torch.float64)
    told = (c[:, None] * (torch.arange(len(c))[:, None] * (2 * x / bound - 1).clamp(-1, 1).acos()).cos()).sum(0)
    assert float((told + torch.expm1(-2 * s * x) / x).abs().max()) < 2e-6 * 2 * s


def test_the_residual_is_where_it_was_asked_to_be() -> None:
    vectors = task_vectors(4, 40, 30)
    made = operator(vectors, 0.5, 1.0)
    residual = made.residual(sum(vectors).double())
    steps: list[int] = []

    def counted(x: Tensor) -> Tensor:
        steps.append(1)
        return made.apply(x)

    for tolerance in (0.3, 0.03):
        steps.clear()
        change = descend(counted, residual, iterations=500, tolerance=tolerance)
        assert float((residual - made.apply(change)).norm()) <= tolerance * float(residual.norm()) * (1 + 1e-6)
        less = descend(made.apply, residual, iterations=len(steps) - 1, tolerance=0.0)
        assert float((residual - made.apply(less)).norm()) > tolerance * float(residual.norm())


def test_the_loss_falls_with_every_iteration() -> None:
    vectors = task_vectors(4, 24, 40)
    sides = [factors(v, 0.5, 1.0) for v in vectors]

    def loss(x: Tensor) -> float:
        return sum(float(((x.double() - v) * (h @ (x.double() - v) @ g)).sum()) for v, (h, g) in zip(vectors, sides, strict=True))

    for runs in (
        [{"tolerance": 0.0, "iterations": n} for n in (0, 2, 8, 40)],
        [{"solver": "flow", "time": t} for t in (0.0, 1.0, 10.0, 1e3)],
    ):
        losses = [loss(ours(vectors, **fields)) for fields in runs]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("solver", ["cg", "flow"])
def test_low_rank_vectors_are_solved_on_their_own_space(solver: Any) -> None:
    """LoRA's: both sides are compressed, and the way down is the same."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(40, 3, generator=generator) @ torch.randn(3, 50, generator=generator) for _ in range(4)]
    part = TwoSided(rank=3, tolerance=0.0, iterations=7, solver=solver)
    total = part.init(40, 50, 4)
    for index, vector in enumerate(vectors):
        total = part.add(total, vector, site([f"t{index}"]))
    made = Kronecker(terms=total.terms, shape=(40, 50))
    small, left, right = made.compressed()
    assert small.shape == (12, 12)
    assert left is not None
    assert right is not None
    whole = ours(
        [*vectors, torch.zeros(40, 50)], tolerance=0.0, iterations=7, solver=solver
    )  # all singular vectors: not compressed
    residual = made.residual(sum(vectors))
    if solver == "cg":
        assert (
            relative(part.result(total, site()), sum(vectors) + descend(made.apply, residual, iterations=7, tolerance=0.0)) < 1e-4
        )
    assert relative(part.result(total, site()), whole) < 1e-4


def test_zero_rows_and_columns_change_nothing() -> None:
    """The stopping rules do not look at dimensions that no task uses; rounding can cost or save `cg` an iteration, so its share is coarse."""
    coarse = {"tolerance": 0.1}
    vectors = task_vectors(3, 12, 10)
    for fields in (
        coarse,
        {"solver": "flow"},
        {"solver": "flow", "p": 0.0},
        {"solver": "flow", "q": 0.0, "p": 1.0},
        coarse | {"p": 0.0},
        coarse | {"balance": "trace"},
        coarse | {"rank": 4, "tail": "drop"},
    ):
        wide = ours([torch.nn.functional.pad(v, (0, 7, 0, 5)) for v in vectors], **fields)
        assert relative(wide[:12, :10], ours(vectors, **fields)) < 1e-4
        assert float(wide[12:].abs().max()) < 1e-6 * float(wide.abs().max())


# Singular vectors.


@pytest.mark.parametrize("shape", [(96, 200), (200, 96), (130, 130)], ids=str)
def test_a_sketch_finds_a_decaying_spectrum(shape: tuple[int, int]) -> None:
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = (u * 0.8 ** torch.arange(len(s))) @ vt
    assert not sketched(*shape, 8)
    assert sketched(*shape, 0) or min(shape) < 96
    a, b, c = truncated_svd(matrix, 8, stream("x"))
    from thetau.linalg import svd as decompositions

    before = decompositions.OVERSAMPLE
    try:
        decompositions.OVERSAMPLE = 6
        assert sketched(*shape, 8)
        left, values, right = truncated_svd(matrix, 8, stream("x"))
        again = truncated_svd(matrix, 8, stream("x"))
    finally:
        decompositions.OVERSAMPLE = before
    assert all(torch.equal(x, y) for x, y in zip((left, values, right), again, strict=True))
    assert relative(values, b) < 1e-4
    assert relative((left * values) @ right.T, (a * b) @ c.T) < 1e-3
    for basis in (left, right):
        assert relative(basis.T @ basis, torch.eye(8)) < 1e-5
    assert relative(left.T @ matrix @ right, torch.diag(values)) < 1e-5


def test_a_decomposition_that_does_not_converge_is_made_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    want = torch.linalg.svd(matrix, full_matrices=False)

    def diverge(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    u, s, vt = svd(matrix)
    assert u.shape == (9, 5)
    assert relative(s, want.S) < 1e-5
    assert relative((u * s) @ vt, matrix) < 1e-5
    assert relative(u.T @ u, torch.eye(5)) < 1e-5
    with pytest.raises(torch.linalg.LinAlgError):
        svd(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("reference", ["random", "random_left", "random_right"])
@pytest.mark.parametrize("rank", [None, 3])
def test_random_factors(reference: Any, rank: int | None) -> None:
    """Orthonormal, of the task's own spectrum, and the loss is that of the random factors on the true vectors."""
    vectors = task_vectors(3, 8, 6)
    part = TwoSided(reference=reference, rank=rank, **TO_THE_END)
    total = part.init(8, 6, 3)
    for index, vector in enumerate(vectors):
        total = part.add(total, vector, site([f"t{index}"]))
    sides = []
    for term, vector in zip(total.terms, vectors, strict=True):
        assert term.left is not None
        assert term.right is not None
        own_h, own_g = factors(vector, 0.5, 1.0, rank, "flat")
        h = (term.left * term.h) @ term.left.T + term.h_rest * torch.eye(8)
        g = (term.right * term.g) @ term.right.T + term.g_rest * torch.eye(6)
        assert torch.allclose(torch.linalg.eigvalsh(h), torch.linalg.eigvalsh(own_h), atol=1e-6)
        assert torch.allclose(torch.linalg.eigvalsh(g), torch.linalg.eigvalsh(own_g), atol=1e-6)
        assert (relative(h, own_h) < 1e-6) == (reference == "random_right")
        assert (relative(g, own_g) < 1e-6) == (reference == "random_left")
        sides.append((h, g))
    assert relative(part.result(total, site()), dense(vectors, sides)) < 1e-5


def test_factors_that_are_given() -> None:
    """The oracle's entry: with a task's own factors it is the method; one side may be left out."""
    vectors = task_vectors(3, 8, 6)
    generator = torch.Generator().manual_seed(3)
    given = []
    for _ in vectors:
        a, b = torch.randn(8, 20, generator=generator), torch.randn(6, 20, generator=generator)
        given.append((a @ a.T, b @ b.T))
    part = TwoSided(**TO_THE_END)
    doubled = [v.double() for v in vectors]
    wide = [(h.double(), g.double()) for h, g in given]
    unit = [(h / h.trace(), g / g.trace()) for h, g in wide]
    assert relative(with_factors(doubled, wide, part), dense(vectors, unit)) < 1e-5
    right = [(torch.eye(8).double(), g) for _, g in unit]
    assert relative(with_factors(doubled, [(None, g) for _, g in wide], part), dense(vectors, right)) < 1e-5
    own = [factors(v, 0.5, 1.0) for v in vectors]
    early = TwoSided(balance="trace", tolerance=0.2)
    assert relative(with_factors(vectors, own, early), ours(vectors, balance="trace", tolerance=0.2)) < 1e-4
    with_zero = [*doubled, torch.zeros(8, 6).double()]
    assert relative(with_factors(with_zero, [*wide, wide[0]], part), dense(vectors, unit)) < 1e-5
    assert torch.equal(with_factors(doubled[:1], wide[:1], part), doubled[0])


# Scale, zeros, one task, order.

FIELDS: list[dict[str, Any]] = [
    {},
    {"solver": "flow"},
    {"sides": "by_role", "solver": "flow", "p": 1.0},
    {"sides": "by_role", "solver": "flow", "p": 2.0, "q": 2.0},
    {"p": 0.0},
    {"q": 0.0},
    {"balance": "none"},
    {"balance": "loss"},
    {"rank": 4},
    {"rank": 4, "tail": "drop", "precondition": True},
    {"rank": 4, "p": 0.0, "balance": "trace"},
    {"rank": 0.3, "start": "mean"},
    {"precondition": True},
    {"reference": "random"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("factor", [1e-8, 7.0, 1e6])
def test_scaling_the_vectors_scales_the_result(fields: dict[str, Any], factor: float) -> None:
    vectors = task_vectors(4, 24, 20)
    assert relative(ours([factor * v for v in vectors], **fields), factor * ours(vectors, **fields)) < 1e-4


@settings(max_examples=25)
@given(
    st.integers(2, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(POWERS),
    st.integers(0, 1000),
    st.sampled_from([2.0**-20, 8.0]),
)
def test_powers_of_two_scale_exactly(
    tasks: int, d_out: int, d_in: int, powers: tuple[float, float], seed: int, factor: float
) -> None:
    vectors = task_vectors(tasks, d_out, d_in, seed=seed)
    p, q = powers
    got = ours([factor * v for v in vectors], p=p, q=q, tolerance=1e-3)
    torch.testing.assert_close(
        got, factor * ours(vectors, p=p, q=q, tolerance=1e-3), rtol=1e-5, atol=1e-6 * factor * float(got.abs().max())
    )
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_zero_task_vectors_drop_out(fields: dict[str, Any]) -> None:
    vectors = task_vectors(3, 24, 20)
    zero = torch.zeros(24, 20)
    named = [(f"t{i}", v) for i, v in enumerate(vectors)]
    part = TwoSided(**fields)

    def run(given: list[tuple[str, Tensor]]) -> Tensor:
        total = part.init(24, 20, len(given))
        for name, vector in given:
            total = part.add(total, vector, site([name]))
        return part.result(total, site())

    assert torch.equal(run([named[0], ("z", zero), *named[1:]]), run(named))
    assert torch.equal(run([("z", zero)] * 3), zero)
    assert torch.equal(run([named[0], ("z", zero)]), vectors[0])


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_one_task_comes_back_as_it_is(fields: dict[str, Any]) -> None:
    (vector,) = task_vectors(1, 24, 16)
    assert torch.equal(ours([vector], **fields), vector)


def test_tasks_that_do_not_meet_stay_their_sum() -> None:
    vectors = task_vectors(2, 32, 32)
    vectors[0][:, :16] = 0
    vectors[1][:, 16:] = 0
    for fields in ({}, {"solver": "flow"}, {"p": 0.0}, TO_THE_END):
        assert relative(ours(vectors, **fields), sum(vectors)) < 1e-5


def test_identical_tasks_give_what_they_agree_on() -> None:
    vector = task_vectors(1, 20, 24)[0]
    assert relative(ours([vector] * 3, **TO_THE_END), vector) < 1e-4


# Cost.


def test_cost() -> None:
    part = TwoSided(rank=256, iterations=30)
    assert part.cost((4096, 4096), 2).memory < part.cost((4096, 4096), 4).memory < part.cost((4096, 4096), 16).memory
    by_role, right = TwoSided(sides="by_role", p=1.0), TwoSided(p=0.0)
    assert by_role.cost((512, 64), 4) == TwoSided(q=0.0, p=1.0).cost((512, 64), 4)
    assert by_role.cost((64, 512), 4) == right.cost((64, 512), 4)
    assert by_role.alternatives() == {}
    assert TwoSided(p=0.0).cost((512, 512), 4).memory == TwoSided(p=0.0).cost((512, 512), 16).memory
    for tail, matmuls in (
        ("drop", 30 * 8 * (4 * 256 * 2048**2 + 4 * 256**2 * 2048)),  # on the compressed space of 8 · 256 dimensions
        ("flat", 30 * 8 * (8 * 256 * 4096**2 + 4 * 256**2 * 4096)),
    ):
        many, none = (TwoSided(rank=256, iterations=n, tail=tail).cost((4096, 4096), 8).flops for n in (30, 0))  # type: ignore[arg-type]
        assert many - none == pytest.approx(matmuls)
    assert part.cost((4096, 4096), 8).memory > TwoSided(rank=128).cost((4096, 4096), 8).memory
    assert set(TwoSided().alternatives()) == {"rank=0.25", "rank=0.0625"}
    assert set(TwoSided(rank=0.25).alternatives()) == {"rank=0.0625"}
    assert all(
        other.cost((4096, 4096), 8).flops < TwoSided().cost((4096, 4096), 8).flops for other in TwoSided().alternatives().values()
    )


# Through the engine: fused and transposed tensors.


def bilateral(name: str, stored: dict[str, Tensor], **fields: Any) -> Tensor:
    base = {name: torch.zeros(next(iter(stored.values())).shape)}
    return merged_vector(base, {task: {name: vector} for task, vector in stored.items()}, Bilateral(**fields))[name]


def test_split_fused_merges_three_matrices() -> None:
    tasks = {f"t{i}": torch.cat(task_vectors(3, 16, 16, seed=i)) for i in range(4)}
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    both: dict[str, Any] = {"sides": "both", "solver": "cg", "rank": 0.25}
    for fields in (both, {"p": 0.0, "solver": "flow"}):  # q, k and v face their input: by role that is the right side alone
        parts = [ours([v[16 * k : 16 * (k + 1)] for v in tasks.values()], **{"p": 1.0, **fields}) for k in range(3)]
        mine = {} if fields is not both else both
        assert torch.equal(bilateral(name, tasks, split_fused=True, **mine), torch.cat(parts))
        assert torch.equal(bilateral(name, tasks, **mine), ours(list(tasks.values()), **{"p": 1.0, **fields}))
        assert not torch.equal(bilateral(name, tasks, **mine), torch.cat(parts))


def test_conv1d_is_merged_as_the_linear_layer_that_it_is() -> None:
    """Its larger side is the input's, the right one, however it is stored."""
    plain = {f"t{i}": v for i, v in enumerate(task_vectors(4, 16, 64))}
    got = bilateral("transformer.h.0.mlp.c_proj.weight", {task: v.T.contiguous() for task, v in plain.items()})
    assert torch.equal(got, ours(list(plain.values()), p=0.0, solver="flow").T)


def test_the_sides_belong_to_outputs_and_inputs() -> None:
    """Transposing the vectors and swapping the powers transposes the result."""
    vectors = task_vectors(3, 12, 20)
    turned = ours([v.T.contiguous() for v in vectors], p=1.0, q=0.5, tolerance=0.0, iterations=5)
    assert relative(turned.T, ours(vectors, p=0.5, q=1.0, tolerance=0.0, iterations=5)) < 1e-3
    assert (
        relative(
            ours(vectors, p=1.0, q=0.5, tolerance=0.0, iterations=5), ours(vectors, p=0.5, q=1.0, tolerance=0.0, iterations=5)
        )
        > 1e-2
    )


def test_term_sides_that_are_the_identity() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1)
    term = Term(left=None, h=one, right=None, g=one, target=2 * x, weight=3.0)
    torch.testing.assert_close(term.apply(x), 3 * x)
    torch.testing.assert_close(term.residual(x), 3 * x)


RANK = '`Bilateral(rank=...)` must be an integer of at least 1, a share in (0, 1], "auto", "full", or None.'
RULES = [
    ({"p": -1.0}, "`Bilateral(p=...)` must be a number of at least 0. Got -1.0."),
    ({"q": float("nan")}, "`Bilateral(q=...)` must be a number of at least 0. Got nan."),
    ({"sides": "left"}, "`Bilateral(sides=...)` must be one of by_role, both. Got 'left'."),
    ({"solver": "adam"}, "`Bilateral(solver=...)` must be one of cg, flow. Got 'adam'."),
    ({"tolerance": 2.0}, "`Bilateral(tolerance=...)` must be in [0, 1]. Got 2.0."),
    ({"iterations": -1}, "`Bilateral(iterations=...)` must be an integer of at least 0. Got -1."),
    ({"rank": 0}, f"{RANK} Got 0."),
    ({"rank": 1.5}, f"{RANK} Got 1.5."),
    ({"rank": True}, f"{RANK} Got True."),
    ({"balance": "on"}, "`Bilateral(balance=...)` must be one of norm, loss, trace, none. Got 'on'."),
    ({"start": "zero"}, "`Bilateral(start=...)` must be one of sum, mean. Got 'zero'."),
    ({"reference": "other"}, "`Bilateral(reference=...)` must be one of own, random, random_left, random_right. Got 'other'."),
    ({"split_fused": 1}, "`Bilateral(split_fused=...)` must be true or false. Got 1."),
]


@pytest.mark.parametrize(("fields", "message"), RULES, ids=str)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    from synthetic import checked

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checked(Bilateral, fields)
