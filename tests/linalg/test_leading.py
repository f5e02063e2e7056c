"""The range finder against whole decompositions in float64: what it leaves out is what it says, and is near the least possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matrices import task_vectors
from synthetic import relative
from thetau.linalg.leading import BESIDE, FIRST, followed, leading, leading_flops
from thetau.random import stream
from tiny import one_thread as one_thread

SHAPES = [(60, 60), (200, 40), (40, 200), (1, 30), (30, 1)]
BITS = stream("test")
FLOAT32 = torch.finfo(torch.float32).eps


def low_rank(d_out: int, d_in: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)


def outside(matrix: Tensor, vectors: Tensor) -> float:
    """‖M − MVVᵀ‖² in float64."""
    exact, v = matrix.double(), vectors.double()
    return float((exact - exact @ v @ v.T).square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 500])
def test_what_it_leaves_out_is_what_it_says(shape: tuple[int, int], rank: int) -> None:
    (matrix,) = task_vectors(1, *shape)
    found = leading(matrix, rank, BITS)
    square = float(matrix.double().square().sum())
    room = 16 * FLOAT32 * max(shape) ** 0.5 * square
    assert len(found.values) == min(rank, *shape)
    assert abs(found.rest - outside(matrix, found.vectors)) <= room
    assert abs(found.square - square) <= FLOAT32 * square
    r = len(found.values)
    assert float((found.vectors.T @ found.vectors - torch.eye(r)).abs().max()) <= 16 * FLOAT32 * max(shape) ** 0.5
    assert relative(found.images, matrix.double() @ found.vectors.double()) <= 16 * FLOAT32 * max(shape) ** 0.5
    gram = found.images.double().T @ found.images.double()
    assert float((gram - torch.diag(found.values**2)).abs().max()) <= 16 * FLOAT32 * max(shape) ** 0.5 * square


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(60, 60), (200, 40), (40, 200)], ids=str)
def test_it_leaves_out_little_more_than_the_best(shape: tuple[int, int], seed: int) -> None:
    """Theorem 10.5 of Halko et al. has 1 + r / (p − 1) in the mean, without powers; one power makes it less."""
    (matrix,) = task_vectors(1, *shape, seed=seed)
    rank = 8
    best = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())
    assert best <= leading(matrix, rank, stream("seed", seed)).rest * (1 + 1e-6) <= best * (1 + rank / (BESIDE - 1))


@pytest.mark.parametrize("shape", [(60, 60), (200, 40), (40, 200)], ids=str)
def test_low_rank_is_found_whole_and_nothing_is_left(shape: tuple[int, int]) -> None:
    matrix = low_rank(*shape, 5)
    for found in (leading(matrix, 5, BITS), leading(matrix, 30, BITS), followed(matrix, 20, BITS, tolerance=1e-9)):
        assert found.rest == 0
        assert len(found.values) == 5
        want = torch.linalg.svdvals(matrix.double())[:5]
        assert float((found.values - want).abs().max()) <= 16 * FLOAT32 * max(shape) ** 0.5 * float(want[0])


def test_as_many_as_the_spectrum_asks_for() -> None:
    generator = torch.Generator().manual_seed(0)
    for half in (10, 20, 30):
        decay = 0.5 ** (torch.arange(300) / (2 * half))  # half of the energy is in the first `half` directions
        left, right = (torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q for _ in range(2))
        matrix = (left * decay) @ right
        found = followed(matrix, 300, BITS, tolerance=0.5)
        assert found.enough
        assert found.rest <= 0.5 * found.square
        assert half <= len(found.values) <= max(FIRST, 4 * half)
        assert outside(matrix, found.vectors) <= 0.5 * (1 + 1e-4) * found.square


def test_noise_is_no_reason_to_go_on() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((400, 400), (800, 300), (300, 800)):
        noise = torch.randn(shape, generator=generator)
        found = followed(noise, 150, BITS, tolerance=0.1)
        assert found.enough
        assert len(found.values) == FIRST
        assert found.rest > 0.5 * found.square
        planted = noise + 100 * low_rank(*shape, 20) / 20  # more than the first block can hold
        found = followed(planted, 150, BITS, tolerance=1e-6)
        assert found.enough
        assert len(found.values) == 2 * FIRST


def test_a_limit_is_said() -> None:
    decay = (-torch.arange(300) / 100).exp()  # a share of 0.45 is left after 40, and the 40th is 5 times the mean of that
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q for _ in range(2))
    found = followed((left * decay) @ right, 40, BITS, tolerance=0.01)
    assert not found.enough
    assert len(found.values) == 40


def test_the_bits_are_the_keys() -> None:
    (matrix,) = task_vectors(1, 80, 60)
    assert torch.equal(leading(matrix, 5, stream("a")).vectors, leading(matrix.clone(), 5, stream("a")).vectors)
    assert not torch.equal(leading(matrix, 5, stream("a")).vectors, leading(matrix, 5, stream("b")).vectors)


def test_zeros_and_tiny_numbers() -> None:
    assert leading(torch.zeros(20, 30), 4, BITS).rest == 0
    (matrix,) = task_vectors(1, 40, 30)
    tiny, plain = leading(matrix * 2.0**-60, 6, BITS), leading(matrix, 6, BITS)
    assert relative(tiny.values * 2.0**60, plain.values) <= 1e-4
    assert abs(tiny.rest * 2.0**120 - plain.rest) <= 1e-4 * plain.rest


def test_operations_grow_with_the_rank_and_the_entries() -> None:
    assert leading_flops(1000, 1000, 10) < leading_flops(1000, 1000, 20) < leading_flops(1000, 2000, 20)
