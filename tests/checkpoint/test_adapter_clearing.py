"""The default merge of adapters against its formula in full matrices, and its laws; and why rows of adapters are no sample of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from thetau.adapters import Cut, Factors
from thetau.adapters.clearing import cleared
from thetau.adapters.spaces import CorePlace, KnotsPlace, Place
from thetau.checkpoint import Kind
from thetau.methods import TsvM
from thetau.methods.wudi_solvers import Interference
from thetau.parts import Site, StreamReduction

RELATIVE = 1e-8  # float64, some hundred sums, and Gram matrices whose condition ρ bounds


def drawn(seed: int, tasks: int, d_out: int = 14, d_in: int = 11, ranks: Sequence[int] = (2, 3)) -> list[Factors]:
    """Adapters of one layer, of ranks in turns and of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            a=torch.randn(1, rank, d_in, generator=generator, dtype=torch.float64),
            b=(1 + task) * torch.randn(1, d_out, rank, generator=generator, dtype=torch.float64),
        )
        for task, rank in zip(range(tasks), list(ranks) * tasks, strict=False)
    ]


def same(got: Factors, want: Tensor) -> None:
    """To rounding, relative to the matrix."""
    assert float((got.dense()[0] - want).norm()) <= RELATIVE * max(float(want.norm()), 1e-300)


def in_full(parts: Sequence[Factors], damping: float) -> Tensor:
    """The docstring's formula on whole matrices: inverses and square roots of matrices, and norms of products."""
    products = [part.dense()[0] for part in parts]
    found = [torch.linalg.svd(product, full_matrices=False) for product in products]
    ranks = [part.rank for part in parts]
    u = torch.cat([one[0][:, :r] for one, r in zip(found, ranks, strict=True)], 1)
    s = torch.cat([one[1][:r] for one, r in zip(found, ranks, strict=True)])
    v = torch.cat([one[2][:r].T for one, r in zip(found, ranks, strict=True)], 1)
    left = (1 + damping) * u @ torch.linalg.inv(u.T @ u + damping * torch.eye(len(s), dtype=u.dtype))
    values, vectors = torch.linalg.eigh(v.T @ v)
    merged = left @ torch.diag(s) @ (v @ vectors @ torch.diag(values.rsqrt()) @ vectors.T).T
    mean = math.sqrt(sum(float(product.square().sum()) for product in products) / len(products))
    cosine = sum(float((merged * product).sum()) for product in products) / len(products) / (float(merged.norm()) * mean)
    return merged * (mean / math.sqrt(max(cosine, 1 / len(products))) / float(merged.norm()))


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_the_formula(damping: float) -> None:
    parts = drawn(0, 4)
    same(cleared(parts, damping), in_full(parts, damping))


def test_without_damping_each_task_is_seen_in_its_own_outputs() -> None:
    """UᵀÛ = I: up to its length and its inputs' side, the merge is Δ_t in the outputs of task t."""
    rows = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).Q
    # Rows of different tasks are orthogonal, so that the inputs' side changes nothing.
    apart = [Factors(a=rows[None, 3 * task : 3 * task + part.rank], b=part.b) for task, part in enumerate(drawn(1, 3))]
    merged = cleared(apart, 0.0).dense()[0]
    scale = None
    for part in apart:
        basis = torch.linalg.qr(part.b[0]).Q
        seen, own = basis.T @ merged, basis.T @ part.dense()[0]
        scale = float((seen * own).sum() / own.square().sum()) if scale is None else scale
        torch.testing.assert_close(seen, scale * own, rtol=1e-8, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=some.integers(0, 10**6), tasks=some.integers(1, 5), factor=some.floats(0.01, 100.0))
def test_laws(seed: int, tasks: int, factor: float) -> None:
    """One adapter stays as it is; the order does not matter; a common factor, and a sign, come out; copies give the one."""
    parts = drawn(seed, tasks)
    merged = cleared(parts, 0.1).dense()[0]
    same(cleared(parts[:1], 0.1), parts[0].dense()[0])
    same(cleared(parts[::-1], 0.1), merged)
    same(cleared([Factors(a=part.a, b=-factor * part.b) for part in parts], 0.1), -factor * merged)
    same(cleared([parts[0]] * (tasks + 1), 0.1), parts[0].dense()[0])
    norms = [part.norm for part in parts]
    mean = math.sqrt(sum(norm**2 for norm in norms) / tasks)
    assert mean * (1 - 1e-9) <= float(merged.norm()) <= math.sqrt(tasks) * mean * (1 + 1e-9), (
        "between a task's vector and their sum"
    )


def test_other_factors_of_the_same_products_change_nothing() -> None:
    parts = drawn(2, 3)
    mixing = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 3 * torch.eye(
        3, dtype=torch.float64
    )
    mixed = [
        Factors(a=torch.linalg.inv(mixing[: p.rank, : p.rank]) @ p.a, b=p.b @ mixing[: p.rank, : p.rank]).padded(5) for p in parts
    ]
    same(cleared(mixed, 0.1), cleared(parts, 0.1).dense()[0])


def test_zeros_opposites_and_more_ranks_than_dimensions() -> None:
    parts = drawn(3, 2)
    zero = Factors(a=parts[0].a, b=0 * parts[0].b)
    assert not cleared([zero, zero], 0.1).dense().any()
    same(cleared([parts[0], zero], 0.1), parts[0].dense()[0])
    opposite = Factors(a=parts[0].a, b=-parts[0].b)
    assert float(cleared([parts[0], opposite], 0.1).norm) <= 1e-9 * parts[0].norm
    for damping in (0.0, 0.1):
        many = cleared(drawn(4, 9, d_out=5, d_in=6), damping)
        assert bool(many.dense().isfinite().all())
        assert float(many.norm) > 0


def test_copies_of_a_layer_are_merged_one_by_one() -> None:
    layers = [drawn(5, 2, ranks=(2,)), drawn(6, 2, ranks=(2,))]
    both = [Factors(a=torch.cat([x.a, y.a]), b=torch.cat([x.b, y.b])) for x, y in zip(*layers, strict=True)]
    merged = cleared(both, 0.1)
    for number, layer in enumerate(layers):
        torch.testing.assert_close(merged.dense()[number], cleared(layer, 0.1).dense()[0], rtol=1e-10, atol=1e-12)


# What the page says of the others.


def reduced(part: StreamReduction, matrices: Sequence[Tensor]) -> Tensor:
    """A reduction over whole matrices."""
    names = tuple(f"t{number}" for number in range(len(matrices)))
    rows, columns = matrices[0].shape

    def site(tasks: tuple[str, ...]) -> Site:
        return Site(name="w", shape=(rows, columns), kind=Kind.MLP, layer=0, tasks=tasks, row_elements=columns)

    total = part.init(rows, columns, len(matrices))
    for name, matrix in zip(names, matrices, strict=True):
        total = part.add(total, matrix.float(), site((name,)))
    merged: Tensor = part.result(total, site(names)).double()
    return merged


@pytest.mark.parametrize("place", [CorePlace, KnotsPlace])
def test_tsv_m_is_the_same_in_every_space(place: type[CorePlace | KnotsPlace]) -> None:
    """Where each task keeps all its directions: orthonormal changes of bases go through singular vectors and Procrustes alike."""
    parts = drawn(7, 3, d_out=40, d_in=36, ranks=(3,))
    there: Place = place.of(parts)
    dense = reduced(TsvM(rank=3), [part.dense()[0] for part in parts])
    inside = reduced(TsvM(rank=3), [there.project(part)[0] for part in parts])
    lifted, _, _ = there.lift(inside[None], Cut())
    assert float((lifted.dense()[0] - dense).norm()) <= 1e-5 * float(dense.norm())  # float32 sums of 40 terms


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_with_rows_of_a_random_start_wudi_sums_or_averages(overlap: float) -> None:
    """Other A's for every task, orthogonal: nothing interferes, and the minimum is the sum. One A for all: the mean, if weights agree."""
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    matrices = []
    for task in range(4):
        rows = basis[:3] if overlap else basis[3 * task : 3 * task + 3]
        columns = torch.linalg.qr(torch.randn(20, 3, generator=generator, dtype=torch.float64)).Q
        matrices.append(columns @ rows)
    merged = reduced(Interference(solver="closed_form", ridge=0.0), matrices)
    want = torch.stack(matrices).mean(0) if overlap else torch.stack(matrices).sum(0)
    assert float((merged - want).norm()) <= 1e-5 * float(want.norm())
