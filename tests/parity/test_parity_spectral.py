"""TSV-M, Iso-C, Iso-CTS, STAR, CART and DC-Merge against dense references in float64 numpy, written from the papers and method sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import task_vectors
from synthetic import merged_vector, relative, site
from thetau.methods import Cart, DcMerge, IsoC, IsoCts, Star, TsvM
from tiny import one_thread as one_thread

SHAPES = [(2, 24, 40), (4, 40, 24), (3, 30, 30), (8, 60, 50), (1, 9, 7)]


def ours(part: Any, vectors: list[Tensor]) -> Tensor:
    total = part.init(*vectors[0].shape, len(vectors))
    for index, vector in enumerate(vectors):
        total = part.add(total, vector.clone(), site([f"t{index}"]))
    result: Tensor = part.result(total, site([f"t{index}" for index in range(len(vectors))]))
    return result


def polar(matrix: np.ndarray) -> np.ndarray:
    """M (MᵀM)^(−1/2), or (MMᵀ)^(−1/2) M where M is wide: the nearest matrix with orthonormal columns or rows."""
    tall = matrix.shape[0] >= matrix.shape[1]
    values, vectors = np.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    root = (vectors / np.sqrt(values)) @ vectors.T
    return matrix @ root if tall else root @ matrix


def tsv(vectors: list[Tensor], rank: int | None = None) -> np.ndarray:
    k = rank or min(vectors[0].shape) // len(vectors)
    parts = [np.linalg.svd(v.double().numpy(), full_matrices=False) for v in vectors]
    left = np.concatenate([u[:, :k] for u, _, _ in parts], 1)
    right = np.concatenate([vt[:k].T for _, _, vt in parts], 1)
    return polar(left) @ np.diag(np.concatenate([s[:k] for _, s, _ in parts])) @ polar(right).T


def iso_cts(vectors: list[Tensor], share: float) -> np.ndarray:
    stack = [v.double().numpy() for v in vectors]
    u, s, vt = np.linalg.svd(sum(stack), full_matrices=False)
    n = len(s)
    each = round((n - int(share * n)) / len(stack))
    common = n - each * len(stack)
    lefts, values, rights = [u[:, :common]], [s[:common]], [vt[:common].T]
    for tau in stack:
        a, b, ct = np.linalg.svd(tau - u[:, :common] @ u[:, :common].T @ tau, full_matrices=False)
        lefts.append(a[:, :each])
        values.append(b[:each])
        rights.append(ct[:each].T)
    return np.concatenate(values).mean() * polar(np.concatenate(lefts, 1)) @ polar(np.concatenate(rights, 1)).T


def star(vectors: list[Tensor], eta: float) -> np.ndarray:
    total = np.zeros(vectors[0].shape)
    for vector in vectors:
        u, s, vt = np.linalg.svd(vector.double().numpy(), full_matrices=False)
        r = next(r for r in range(1, len(s) + 1) if s[:r].sum() >= eta * s.sum() * (1 - 1e-12))
        total += s.sum() / s[:r].sum() * u[:, :r] @ np.diag(s[:r]) @ vt[:r]
    return total / len(vectors)


def cart(vectors: list[Tensor], rank: int, factor: float) -> np.ndarray:
    stack = np.stack([v.double().numpy() for v in vectors])
    mean = stack.mean(0)
    for residual in stack - stack.mean(0):
        u, s, vt = np.linalg.svd(residual, full_matrices=False)
        mean = mean + factor * u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    return mean


def dc_merge(vectors: list[Tensor], rank: int, entries: int, smoothing: str, rho: float) -> np.ndarray:
    factors = [np.linalg.svd(v.double().numpy(), full_matrices=False) for v in vectors]
    p = polar(np.concatenate([u[:, :rank] for u, _, _ in factors], 1))
    q = polar(np.concatenate([vt[:rank].T for _, _, vt in factors], 1))
    cores = []
    for u, s, vt in factors:
        kept = s[:rank]
        falls = {
            "none": kept / kept.sum(),
            "average": np.full(rank, 1 / rank),
            "linear": np.linspace(min(rho, kept[0] / kept[-1]), 1, rank),
        }
        fall = falls[smoothing] / falls[smoothing].sum()
        core = p.T @ (u[:, :rank] @ np.diag(kept.sum() * fall) @ vt[:rank]) @ q
        cut = np.sort(np.abs(core).ravel())[-entries]
        cores.append(np.where(np.abs(core) >= cut, core, 0))
    sign = np.sign(sum(cores))
    width = rank * len(vectors)
    merged = np.zeros((width, width))
    for row in range(width):
        for column in range(width):
            agreeing = [c[row, column] for c in cores if np.sign(c[row, column]) == sign[row, column] != 0]
            if row // rank == column // rank and agreeing:
                merged[row, column] = np.mean(agreeing)
    return p @ merged @ q.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tsv_m_is_the_dense_construction(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    assert relative(ours(TsvM(rank="full"), vectors), torch.from_numpy(tsv(vectors))) < 1e-4
    if shape[0] == 1:
        assert relative(ours(TsvM(rank="full"), vectors), vectors[0]) < 1e-5


@pytest.mark.parametrize("rank", [2, 0.1])
def test_tsv_m_of_another_rank(rank: int | float) -> None:
    vectors = task_vectors(3, 30, 24, rms=1e-2)
    assert relative(ours(TsvM(rank=rank), vectors), torch.from_numpy(tsv(vectors, 2))) < 1e-4


def test_tsv_m_is_the_sum_of_truncated_vectors_where_tasks_do_not_meet() -> None:
    first, second = task_vectors(2, 24, 20)
    first[:12], second[12:], first[:, 10:], second[:, :10] = 0, 0, 0, 0
    want = sum((u[:, :10] * s[:10]) @ vt[:10] for u, s, vt in (torch.linalg.svd(v, full_matrices=False) for v in (first, second)))
    assert relative(ours(TsvM(), [first, second]), want) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c_flattens_the_spectrum_of_the_sum(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    total = sum(v.double().numpy() for v in vectors)
    s = np.linalg.svd(total, compute_uv=False)
    got = ours(IsoC(), vectors)
    assert relative(got, torch.from_numpy(s.mean() * polar(total))) < 1e-4
    assert relative(torch.linalg.svdvals(got), torch.full((len(s),), float(s.mean()))) < 1e-5


def test_iso_c_gives_no_task_less_directions_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(20, 2, generator=generator) @ torch.randn(2, 16, generator=generator) for _ in range(3)]
    total = sum(vectors)
    got = torch.linalg.svdvals(ours(IsoC(), vectors))
    mean = float(torch.linalg.svdvals(total).mean())  # type: ignore[arg-type]
    assert got[:6].tolist() == pytest.approx([mean] * 6, rel=1e-4)
    assert float(got[6:].max()) < 1e-5 * mean


@pytest.mark.parametrize("shape", [(2, 24, 40), (4, 40, 24), (3, 30, 30), (8, 60, 50)], ids=str)
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_iso_cts_is_the_dense_construction(shape: tuple[int, int, int], share: float) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    got = ours(IsoCts(common=share), vectors)
    assert relative(got, torch.from_numpy(iso_cts(vectors, share))) < 1e-3
    assert relative(got, ours(IsoC(), vectors)) > 1e-3
    assert relative(ours(IsoCts(common=1.0), vectors), ours(IsoC(), vectors)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eta", [0.4, 0.85, 1.0])
def test_star_is_the_dense_construction(shape: tuple[int, int, int], eta: float) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    assert relative(ours(Star(eta=eta), vectors), torch.from_numpy(star(vectors, eta))) < 1e-4
    if eta == 1:
        assert relative(ours(Star(eta=eta), vectors), torch.stack(vectors).mean(0)) < 1e-5


@pytest.mark.parametrize("rank", [None, 2])
def test_star_keeps_vectors_of_low_rank(rank: int | None) -> None:
    """Rank one is unchanged at any η; of a known rank a sketch finds the same as a whole decomposition."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 150, 2, generator=generator), torch.randn(2, 2, 140, generator=generator)
    ones = [a[:, :1] @ b[:1] for a, b in zip(left, right, strict=True)]
    assert relative(ours(Star(eta=0.01, rank=rank), ones), torch.stack(ones).mean(0)) < 1e-5
    twos = [a @ b for a, b in zip(left, right, strict=True)]
    assert relative(ours(Star(eta=0.9, rank=rank), twos), torch.stack(twos).mean(0)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rank", "factor"), [(0.08, 1.0), (0.5, 0.5), (3, -2.0)])
def test_cart_is_the_dense_construction(shape: tuple[int, int, int], rank: int | float, factor: float) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    k = rank if isinstance(rank, int) else int(np.ceil(rank * min(shape[1:])))
    assert relative(ours(Cart(rank=rank, residual=factor), vectors), torch.from_numpy(cart(vectors, k, factor))) < 1e-4


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
def test_cart_of_full_rank_is_the_average(factor: float) -> None:
    """Residuals from the mean cancel, whatever λ: up to the rounding of K of them, λ times as large."""
    vectors = [*task_vectors(4, 30, 24, rms=1e-2), torch.zeros(30, 24)]
    got = ours(Cart(rank=1.0, residual=factor), vectors)
    assert relative(got, torch.stack(vectors).mean(0)) < 1e-5 * max(1, factor)


@pytest.mark.parametrize("shape", [(2, 24, 40), (4, 40, 24), (3, 30, 30), (4, 64, 60)], ids=str)
@pytest.mark.parametrize(("smoothing", "rank", "keep"), [("none", None, 1.5), ("average", 5, 2.0), ("linear", 4, 1.0)])
def test_dc_merge_is_the_dense_construction(shape: tuple[int, int, int], smoothing: Any, rank: int | None, keep: float) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    r = rank or min(shape[1:]) // shape[0]
    got = ours(DcMerge(rank=rank, smoothing=smoothing, keep=keep, rho=3.0), vectors)
    assert relative(got, torch.from_numpy(dc_merge(vectors, r, int(keep * r), smoothing, 3.0))) < 1e-4


@pytest.mark.parametrize("keep", [None, 1.0])
def test_dc_merge_gives_one_task_back(keep: float | None) -> None:
    """0.1 % of the entries of such a matrix are none at all: r of them are kept, which is the whole of its core."""
    (vector,) = task_vectors(1, 30, 24, rms=1e-2)
    assert relative(ours(DcMerge(keep=keep), [vector]), vector) < 1e-5


def test_dc_merge_is_the_sum_where_tasks_do_not_meet() -> None:
    """Then P and Q are the singular vectors themselves, and nothing has to agree with anything."""
    first, second = task_vectors(2, 24, 20, rms=1e-2)
    first[:12], second[12:], first[:, 10:], second[:, :10] = 0, 0, 0, 0
    assert relative(ours(DcMerge(), [first, second]), first + second) < 1e-5


def test_what_is_no_matrix_is_averaged() -> None:
    vectors = {f"t{i}": v for i, v in enumerate(task_vectors(3, 12, 12, rms=1e-2))}
    stored = {
        task: {
            "embeddings.weight": v,
            "layers.0.mlp.fc.weight": 2 * v,
            "layers.0.mlp.fc.bias": v[0],
            "conv.weight": v.reshape(3, 4, 3, 4),
        }
        for task, v in vectors.items()
    }
    base = {name: torch.zeros_like(tensor) for name, tensor in stored["t0"].items()}
    for method in (TsvM(), IsoC(), IsoCts(), Star(), Cart(), DcMerge()):
        got = merged_vector(base, stored, method)
        assert torch.equal(got["embeddings.weight"], ours(method, list(vectors.values())))
        torch.testing.assert_close(got["layers.0.mlp.fc.weight"], 2 * got["embeddings.weight"])
        torch.testing.assert_close(got["layers.0.mlp.fc.bias"], sum(v[0] for v in vectors.values()) / 3)
        torch.testing.assert_close(got["conv.weight"].reshape(12, 12), sum(vectors.values()) / 3)


@pytest.mark.parametrize("part", [TsvM(), IsoC(), IsoCts(common=0.8), Star(), Cart(), DcMerge()], ids=repr)
def test_zeros_and_cost(part: Any) -> None:
    zero = torch.zeros(6, 8)
    assert torch.equal(ours(part, [zero, zero]), zero)
    vectors = task_vectors(3, 12, 10, rms=1e-2)
    assert bool(ours(part, [*vectors, torch.zeros(12, 10)]).isfinite().all())
    assert part.cost((768, 768), 8).flops > 768**3
    assert part.cost((768, 3072), 8).memory > 4 * 768 * 3072


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TsvM(rank=0),
            r"`TsvM\(rank=\.\.\.\)` must be an integer of at least 1, a share in \(0, 1\], \"auto\", \"full\", or None\. Got 0\.",
        ),
        (lambda: DcMerge(rho=0.5), r"`DcMerge\(rho=\.\.\.\)` must be a number of at least 1\. Got 0\.5\."),
        (lambda: Star(eta=0.0), r"`Star\(eta=\.\.\.\)` must be in \(0, 1\]\. Got 0\.0\."),
        (lambda: IsoCts(common=0.0), r"`IsoCts\(common=\.\.\.\)` must be in \(0, 1\]\. Got 0\.0\."),
    ],
)
def test_fields_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
