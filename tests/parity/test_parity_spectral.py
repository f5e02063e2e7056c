"""TSV-M, Iso-C and Iso-CTS against dense references in float64 numpy, written from the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import task_vectors
from synthetic import merged_vector, relative, site
from thetau.methods import IsoC, IsoCts, TsvM
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tsv_m_is_the_dense_construction(shape: tuple[int, int, int]) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    assert relative(ours(TsvM(), vectors), torch.from_numpy(tsv(vectors))) < 1e-4
    if shape[0] == 1:
        assert relative(ours(TsvM(), vectors), vectors[0]) < 1e-5


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
    for method in (TsvM(), IsoC(), IsoCts()):
        got = merged_vector(base, stored, method)
        assert torch.equal(got["embeddings.weight"], ours(method, list(vectors.values())))
        torch.testing.assert_close(got["layers.0.mlp.fc.weight"], 2 * got["embeddings.weight"])
        torch.testing.assert_close(got["layers.0.mlp.fc.bias"], sum(v[0] for v in vectors.values()) / 3)
        torch.testing.assert_close(got["conv.weight"].reshape(12, 12), sum(vectors.values()) / 3)


@pytest.mark.parametrize("part", [TsvM(), IsoC(), IsoCts(common=0.8)], ids=repr)
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
        (lambda: TsvM(rank=0), r"`TsvM\(rank=\.\.\.\)` must be an integer of at least 1, a share in \(0, 1\], or None\. Got 0\."),
        (lambda: IsoCts(common=0.0), r"`IsoCts\(common=\.\.\.\)` must be in \(0, 1\]\. Got 0\.0\."),
    ],
)
def test_fields_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
