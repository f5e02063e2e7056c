"""What the spectral methods share: decompositions by Gram matrices, polar factors, and factors of the tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from matrices import reduced, task_vectors
from synthetic import relative
from thetau.linalg import svd as decompositions
from thetau.linalg.leading import energy
from thetau.linalg.svd import LOST, decomposed, polar, polar_flops, spectrum, truncated_flops, truncated_svd
from thetau.methods import DcMerge, IsoC, Star, TsvM, spectra
from thetau.methods.spectra import DROPPED, PROBE, Factors
from thetau.methods.svc import calibrated
from thetau.random import stream
from tiny import one_thread as one_thread

SHAPES = [(50, 50), (90, 40), (40, 90), (1, 20), (20, 1)]
FLOAT32 = torch.finfo(torch.float32).eps


def low_rank(d_out: int, d_in: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)


def conditioned(d_out: int, d_in: int, least: float) -> Tensor:
    """Singular values from 1 down to `least`, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(1)
    small = min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(d, small, generator=generator, dtype=torch.float64)).Q for d in (d_out, d_in))
    return ((left * torch.logspace(0, torch.tensor(least).log10().item(), small, dtype=torch.float64)) @ right.T).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gram_matrix_in_float64_decomposes_a_float32_matrix(shape: tuple[int, int]) -> None:
    (matrix,) = task_vectors(1, *shape)
    u, s, v = decomposed(matrix)
    assert s.dtype == torch.float64
    assert relative((u * s) @ v.T, matrix) < 1e-9  # (σ₁/σ_r)² ε₆₄ and less
    eye = torch.eye(len(s), dtype=torch.float64)
    assert float((u.T @ u - eye).abs().max()) < 1e-8
    assert float((v.T @ v - eye).abs().max()) < 1e-8
    assert relative(s, torch.linalg.svdvals(matrix.double())) < 1e-10


@pytest.mark.parametrize("least", [1e-1, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(50, 50), (90, 40), (40, 90)], ids=str)
def test_small_singular_values_stay_known(shape: tuple[int, int], least: float) -> None:
    """Where a Gram matrix in float32 would lose all of them."""
    matrix = conditioned(*shape, least)
    s, _ = spectrum(matrix)
    want = torch.linalg.svdvals(matrix.double())
    assert len(s) == min(shape)
    assert float(((s - want) / want).abs().max()) < 64 * torch.finfo(torch.float64).eps / least**2


@pytest.mark.parametrize("least", [1e-1, 1e-3, 2e-5])
@pytest.mark.parametrize("shape", [(50, 50), (90, 40), (40, 90)], ids=str)
def test_the_polar_factor_is_that_of_the_svd(shape: tuple[int, int], least: float) -> None:
    matrix = conditioned(*shape, least)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest, values = polar(matrix)
    turned = FLOAT32 / least if LOST * least >= FLOAT32 else 0
    assert relative(nearest, u @ vt) < 4 * FLOAT32 + turned + 64 * torch.finfo(torch.float64).eps / least**2
    assert relative(values, s) < 4 * FLOAT32


def test_directions_that_are_not_there_stay_away() -> None:
    for shape in ((50, 50), (90, 40), (40, 90)):
        nearest, values = polar(low_rank(*shape, 5))
        assert len(values) == 5
        found = torch.linalg.svdvals(nearest.double())
        assert float((found[:5] - 1).abs().max()) < 1e-6
        assert float(found[5:].max()) < 1e-6


def test_half_of_a_spectrum_is_truncated_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a whole decomposition was made")

    monkeypatch.setattr(decompositions, "svd", never)
    for shape in ((60, 60), (90, 40), (40, 90)):
        (matrix,) = task_vectors(1, *shape)
        u, s, v = truncated_svd(matrix, min(shape) // 2, stream("x"))
        want = torch.linalg.svdvals(matrix.double())[: min(shape) // 2]
        assert u.dtype == s.dtype == v.dtype == torch.float32
        assert relative(s, want) < 4 * FLOAT32
        assert relative(u.T @ matrix @ v, torch.diag(want)) < 64 * FLOAT32


def test_operations_of_half_a_spectrum_are_fewer() -> None:
    for shape in ((1024, 1024), (32000, 1024)):
        assert truncated_flops(*shape, 512) < truncated_flops(*shape, 1024)
        assert polar_flops(*shape) < 2 * truncated_flops(*shape, 1024)


# Factors of the tasks.


def test_auto_takes_the_fewest_that_hold_the_energy() -> None:
    (vector,) = task_vectors(1, 200, 160)
    factors = Factors(shape=(200, 160), rank=160, auto=True)
    factors.take(vector, stream("x"))
    (u,), (s,), (v,) = factors.left, factors.values, factors.right
    square = float(vector.double().square().sum())
    outside = square - float(s.double().square().sum())
    assert outside <= DROPPED * square * (1 + 1e-5)
    assert outside + float(s[-1]) ** 2 > DROPPED * square
    assert relative(u.T @ vector @ v, torch.diag(s)) < 1e-5
    assert float((u.T @ u - torch.eye(len(s))).abs().max()) < 1e-5
    best = int((torch.linalg.svdvals(vector.double()).square().cumsum(0) < (1 - DROPPED) * square).sum()) + 1
    assert best <= len(s) <= 1.25 * best


@pytest.mark.parametrize("method", [TsvM, DcMerge])
def test_auto_is_the_method_of_that_rank(method: Any) -> None:
    """What auto keeps of the vectors, merged with all its directions."""
    vectors, kept = task_vectors(3, 300, 260), []
    for index, vector in enumerate(vectors):
        factors = spectra.begun((300, 260), "auto", 3)
        factors.take(vector, stream("tsv" if method is TsvM else "dc", f"t{index}", "w"))
        kept.append((factors.left[0] * factors.values[0]) @ factors.right[0].T)
        assert len(factors.values[0]) < 86
    auto = reduced(method(rank="auto"), vectors)
    assert relative(auto, reduced(method(rank="full"), kept)) < 1e-3
    assert relative(auto, reduced(method(rank="full"), vectors)) > 1e-2
    cheap, dear = method(rank="auto").cost((1024, 1024), 4), method(rank="full").cost((1024, 1024), 4)
    assert cheap.flops < dear.flops / 4


@pytest.mark.parametrize("method", [TsvM, DcMerge])
def test_small_matrices_are_never_sketched(method: Any) -> None:
    """Below that a decomposition costs less: `auto` is the whole K-th part, as `full` and None are."""
    vectors = task_vectors(3, 200, 160)
    whole = [reduced(method(rank=rank), vectors) for rank in ("auto", "full", None)]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])


def test_tsv_m_follows_the_spectrum_by_default() -> None:
    vectors = task_vectors(3, 300, 260)
    assert torch.equal(reduced(TsvM(), vectors), reduced(TsvM(rank="auto"), vectors))
    assert torch.equal(reduced(DcMerge(), vectors), reduced(DcMerge(rank="full"), vectors))


@pytest.mark.parametrize("unit", [1e-30, 1e-18, 1.0, 1e24])
def test_a_vector_is_zero_only_where_it_is_zero(unit: float) -> None:
    """Squares of small entries leave the range of float32; of large ones too."""
    (vector,) = task_vectors(1, 30, 20)
    want = float((vector * unit).double().square().sum())
    assert abs(energy(vector * unit) - want) < 1e-6 * want
    assert energy(torch.zeros(30, 20)) == 0


def test_low_rank_is_told_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a whole decomposition was made")

    monkeypatch.setattr(spectra, "truncated_svd", never)
    vector = low_rank(300, 280, 16)
    follows = spectra.begun((300, 280), "auto", 2)
    follows.take(vector, stream("x"))
    assert relative((follows.left[0] * follows.values[0]) @ follows.right[0].T, vector) < 1e-5  # nothing of it is dropped
    plain = Factors(shape=(300, 280), rank=2 * PROBE)
    plain.take(vector, stream("x"))
    assert len(plain.values[0]) == 16
    u, s, v = plain.left[0], plain.values[0], plain.right[0]
    assert relative((u * s) @ v.T, vector) < 1e-5
    assert relative(s, torch.linalg.svdvals(vector.double())[:16]) < 1e-5


def test_tasks_that_are_the_same_are_one() -> None:
    """The covers of [U U] have no columns in directions that are not there: U Uᵀ, scaled so that the tasks together count once."""
    (vector,) = task_vectors(1, 40, 30)
    u, s, vt = torch.linalg.svd(vector.double(), full_matrices=False)
    want = (u[:, :15] * s[:15]) @ vt[:15]
    assert relative(reduced(TsvM(), [vector, vector]), want) < 1e-5


def test_the_null_space_of_a_flat_spectrum_stays_null() -> None:
    vectors = [low_rank(50, 40, 3, seed) for seed in range(4)]
    got = torch.linalg.svdvals(reduced(IsoC(), vectors).double())
    mean = float(torch.linalg.svdvals(sum(vectors).double()).mean())  # type: ignore[union-attr]
    assert float((got[:12] / mean - 1).abs().max()) < 1e-5
    assert float(got[12:].max()) < 1e-5 * mean


@pytest.mark.parametrize("shape", [(50, 50), (90, 40), (40, 90)], ids=str)
def test_star_needs_one_side_alone(shape: tuple[int, int]) -> None:
    (vector,) = task_vectors(1, *shape)
    u, s, vt = torch.linalg.svd(vector.double(), full_matrices=False)
    kept = int((s.cumsum(0) < 0.4 * s.sum()).sum()) + 1
    want = float(s.sum() / s[:kept].sum()) * (u[:, :kept] * s[:kept]) @ vt[:kept]
    assert relative(reduced(Star(eta=0.4), [vector]), want) < 1e-5


@pytest.mark.parametrize("shape", [(50, 50), (90, 40), (40, 90)], ids=str)
def test_calibration_is_that_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    vectors = torch.stack(task_vectors(3, *shape))
    merged = vectors.sum(0)
    u, s, vt = torch.linalg.svd(merged.double(), full_matrices=False)
    rows = u.T @ vectors.double()
    along = (s[:, None] * vt * rows).sum(2) / rows.square().sum(2)
    want = (u * (s * 3 / along.clamp(min=1 / 3).sum(0))) @ vt
    assert relative(calibrated(merged, vectors, 1 / 3), want) < 1e-5
