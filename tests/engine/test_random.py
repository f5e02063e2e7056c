"""Counter-based randomness: its quality, and that nothing but the key and the element's index matters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from synthetic import site
from thetau.parts import Site
from thetau.random import element_bits

N = 1 << 17
KEYS = [(0, "drop", "a", "w"), (1, "drop", "a", "w"), (0, "drop", "b", "w"), (0, "drop", "a", "v"), (0, "u", "a", "w")]


def streams() -> list[torch.Tensor]:
    return [element_bits(key, 0, N) for key in KEYS]


def test_range_and_mean() -> None:
    for bits in streams():
        assert int(bits.min()) >= 0
        uniform = bits.double() / (1 << 31)
        assert abs(float(uniform.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / N)
        assert abs(float(uniform.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / N)


def test_every_bit_is_fair_and_pairs_of_bits_are_independent() -> None:
    """Each of the 31 bits is set half the time, and any two agree half the time: within 5 standard deviations."""
    for stream in streams():
        bits = ((stream[:, None].long() >> torch.arange(31)) & 1).double() * 2 - 1
        assert float((bits.mean(0) * math.sqrt(N)).abs().max()) < 5
        correlation = bits.T @ bits / math.sqrt(N)
        assert float((correlation - torch.diag(correlation.diagonal())).abs().max()) < 5


@pytest.mark.parametrize("shift", [0, 8, 15, 23])
def test_chi_square_of_bytes(shift: int) -> None:
    for stream in streams():
        counts = torch.bincount((stream >> shift) & 0xFF, minlength=256).double()
        expected = N / 256
        chi = float(((counts - expected).square() / expected).sum())
        assert abs(chi - 255) < 6 * math.sqrt(2 * 255)


def test_streams_and_neighbours_are_uncorrelated() -> None:
    """Between tasks, tensors, seeds and salts, and at small and power-of-two distances within one stream."""
    found = [stream.double() / (1 << 31) - 0.5 for stream in streams()]

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).mean() * 12 * math.sqrt(len(a)))

    for a, b in itertools.combinations(found, 2):
        assert abs(correlation(a, b)) < 5
    for lag in (1, 2, 3, 64, 768, 4096, 65536):
        assert abs(correlation(found[0][:-lag], found[0][lag:])) < 5


def test_a_block_is_a_slice_of_the_whole() -> None:
    key = KEYS[0]
    whole = element_bits(key, 0, 1000)
    assert torch.equal(torch.cat([element_bits(key, start, 7) for start in range(0, 994, 7)]), whole[:994])
    far = (1 << 31) - 5  # the index's upper half changes inside the block
    assert torch.equal(torch.cat([element_bits(key, far, 5), element_bits(key, far + 5, 5)]), element_bits(key, far, 10))
    assert not torch.equal(element_bits(key, 1 << 31, 100), element_bits(key, 0, 100))


def test_the_generator_is_pinned() -> None:
    """Masks of published merges must stay what they are: these numbers may not change."""
    assert element_bits((0, "drop", "a", "w"), 0, 4).tolist() == PINNED


def test_a_site_names_the_stream() -> None:
    place = site(["a", "b"], shape=(10, 3))
    assert torch.equal(place.bits(0, 30, "s"), element_bits((0, "s", "a", "w"), 0, 30))
    assert torch.equal(place.bits(1, 30, "s"), element_bits((0, "s", "b", "w"), 0, 30))
    later = site(["b"], shape=(10, 3), start=4)
    assert torch.equal(later.bits(0, 18, "s"), place.bits(1, 30, "s")[12:])  # alone or in a stack, in a block or whole
    assert not torch.equal(place.bits(0, 30, "s"), Site(**{**vars(place), "seed": 1}).bits(0, 30, "s"))


PINNED = [955856993, 96614623, 1203723224, 570168004]
