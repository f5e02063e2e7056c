"""Streaming statistics against direct computations, over blocks and tensors in any number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthetic import site
from thetau.parts import Statistic
from thetau.statistics import (
    Collect,
    ColumnProducts,
    DerivedQuantile,
    Gram,
    MagnitudeQuantile,
    MaskedSums,
    OverlapCounts,
    SignTotals,
    SquaredNorms,
)
from thetau.statistics.gram import cosines, row_grams
from thetau.statistics.quantile import Derived, kept_count
from thetau.transforms import Drop, Trim

TASKS = ("a", "b", "c")


def run(statistic: Statistic, tensors: Iterable[Tensor], rows: int = 3) -> Any:
    """As the engine does: blocks of rows, then tensors, then the next round."""
    seen: Any = None
    tensors = list(tensors)
    for _ in range(statistic.rounds):
        folded: Any = None
        for number, stack in enumerate(tensors):
            total: Any = None
            for start in range(0, stack.shape[1], rows):
                place = site(TASKS[: len(stack)], f"t{number}", start, tuple(stack.shape[1:]))
                total = statistic.add(total, stack[:, start : start + rows], place, seen)
            folded = total if folded is None else statistic.fold(folded, total)
        seen = statistic.finish(folded, seen)
    return seen


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in [(10, 7), (5,), (1, 2, 3), (1,)]]


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


# The exact quantile.


def kth(row: Tensor, rank: int) -> float:
    """By a full sort."""
    return float(np.sort(np.abs(row.numpy()))[-rank])


SPECIAL = {
    "normal": lambda g: torch.randn(2, 1000, generator=g),
    "all equal": lambda g: torch.full((2, 1000), -0.25),
    "zeros": lambda g: torch.zeros(2, 1000),
    "signed zeros": lambda g: torch.where(torch.rand(2, 1000, generator=g) < 0.5, -0.0, 0.0),
    "half zeros": lambda g: torch.randn(2, 1000, generator=g) * (torch.rand(2, 1000, generator=g) < 0.5),
    "denormal": lambda g: torch.randint(-50, 50, (2, 1000), generator=g).float() * 2.0**-149,
    "around the smallest normal": lambda g: torch.randn(2, 1000, generator=g) * 2.0**-126,
    "huge": lambda g: torch.randn(2, 1000, generator=g).clamp(-3, 3) * 1e38,
    "all magnitudes": lambda g: (
        torch.randn(2, 1000, generator=g) * 10.0 ** torch.randint(-44, 38, (2, 1000), generator=g).double().float()
    ),
    "ties": lambda g: torch.randint(-3, 4, (2, 1000), generator=g).float(),
    "one bin, other low bits": lambda g: 1 + torch.randint(0, 60000, (2, 1000), generator=g).float() * 2.0**-23,
    "bfloat16 steps": lambda g: torch.randn(2, 1000, generator=g).bfloat16().float(),
}


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("kind", SPECIAL)
def test_quantile_is_the_one_of_a_sort(kind: str, density: float) -> None:
    data = SPECIAL[kind](torch.Generator().manual_seed(0))
    rank = max(1, ceil(Fraction(str(density)) * 1000))
    pieces = [data[:, :600].reshape(2, 100, 6), data[:, 600:601], data[:, 601:].reshape(2, 399)]
    cuts = run(MagnitudeQuantile(density=density), pieces, rows=150)
    assert cuts.dtype == torch.float32
    for task in range(2):
        assert float(cuts[task, 0]) == kth(data[task], rank)
        kept = int((data[task].abs() >= cuts[task, 0]).sum())
        assert kept >= rank
        assert int((data[task].abs() > cuts[task, 0]).sum()) < rank


def test_quantile_takes_two_rounds_and_any_blocking() -> None:
    parts = tensors()
    statistic = MagnitudeQuantile(density=0.2)
    assert statistic.rounds == 2
    assert torch.equal(run(statistic, parts, rows=1), run(statistic, parts, rows=100))
    assert torch.equal(run(statistic, parts), run(statistic, parts[::-1]))


def test_kept_count_is_that_of_the_decimal_number() -> None:
    """In binary 0.2 · 5 is above 1, and 0.07 · 100 above 7: the ceiling would be one more."""
    assert [kept_count(0.2, n) for n in (0, 1, 4, 5, 6, 10, 11)] == [0, 1, 1, 1, 2, 2, 3]
    assert kept_count(0.07, 100) == 7
    assert kept_count(0.29, 100) == 29
    assert kept_count(1e-9, 10) == 1
    assert kept_count(1.0, 10) == 10


# Gram matrices, norms, signs.


def test_gram_is_the_float64_one() -> None:
    parts = tensors()
    flat = joined(parts).double()
    want = flat @ flat.T
    got = run(Gram(), parts)
    assert got.dtype == torch.float64
    assert torch.equal(got, got.T)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_gram_keeps_small_terms_beside_large_ones() -> None:
    """Float32 would lose the small part: 1 + 1e-9 needs a longer sum."""
    big = torch.ones(2, 1)
    small = torch.full((2, 1), 2.0**-15)
    got = run(Gram(), [big, *[small] * 3])
    assert float(got[0, 1]) == 1 + 3 * 2.0**-30


def test_per_tensor_statistics_are_told_so() -> None:
    assert not Gram().per_tensor
    assert Gram(per_tensor=True).per_tensor
    assert MagnitudeQuantile(density=0.2, per_tensor=True).per_tensor


def test_row_grams() -> None:
    stack = tensors()[0]
    got = row_grams(stack)
    assert got.shape == (10, 3, 3)
    for row in range(10):
        rows = stack[:, row].double()
        torch.testing.assert_close(got[row], rows @ rows.T, rtol=1e-14, atol=0)


def test_cosines() -> None:
    a = torch.tensor([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0], [0.0, 0.0], [4.0, -3.0]]).double()
    got = cosines(a @ a.T)
    want = torch.tensor([[1, 1, -1, 0, 0], [1, 1, -1, 0, 0], [-1, -1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)
    tiny = 1e-150 * a
    torch.testing.assert_close(cosines(tiny @ tiny.T), want, rtol=0, atol=1e-15)


def test_squared_norms() -> None:
    parts = tensors()
    torch.testing.assert_close(run(SquaredNorms(), parts), joined(parts).double().square().sum(1), rtol=1e-14, atol=0)


@dataclass(frozen=True)
class Largest(Derived):
    """The largest magnitude over the tasks; its median and nothing else."""

    def values(self, stack: Tensor, site: Any) -> Tensor:
        return stack.abs().amax(0)

    def ranks(self, count: int, positive: int) -> tuple[int, ...]:
        return (1, count - count // 2, 0, positive)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_derived_quantile_is_the_one_of_a_sort(rows: int) -> None:
    stack = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))
    stack[:, 4] = 0
    got = run(DerivedQuantile(of=Largest()), [stack], rows=rows)
    ranked = stack.abs().amax(0).flatten().sort(descending=True).values
    positive = int((ranked > 0).sum())
    assert got.tolist() == [float(ranked[0]), float(ranked[34]), float("inf"), float(ranked[positive - 1])]
    assert DerivedQuantile(of=Largest()).per_tensor


def test_shared_and_unique_entries() -> None:
    stack = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[2.0, 0.0, 0.0, 3.0]], [[1.0, 0.0, 0.0, 0.0]]])
    assert run(OverlapCounts(), [stack, stack]).tolist() == [[2, 2], [2, 2], [2, 0]]


def test_products_of_columns() -> None:
    stack = tensors()[0][:2]
    first, second = stack.double()
    want = torch.stack([(first * first).sum(0), (first * second).sum(0), (second * second).sum(0)])
    torch.testing.assert_close(run(ColumnProducts(), [stack]), want, rtol=1e-14, atol=0)


def test_sums_of_magnitudes_before_and_after_a_mask() -> None:
    parts = tensors()
    flat = joined(parts)
    trim = Trim(density=0.3)
    got = run(MaskedSums(masking=trim, per_tensor=False), parts)
    cuts = run(MagnitudeQuantile(density=0.3), parts)
    kept = flat.abs() * (flat.abs() >= cuts[:, :1])
    want = torch.stack([flat.double().abs().sum(1), kept.double().sum(1)], 1)
    torch.testing.assert_close(got.sums, want, rtol=1e-14, atol=0)
    assert torch.equal(got.found, cuts)
    assert MaskedSums(masking=trim).rounds == 3
    assert MaskedSums(masking=Drop(rate=0.5)).rounds == 1


def test_counts_rounded_down() -> None:
    """As a product of floating-point numbers has them, at least as many as asked for; none has an infinite cut."""
    assert [kept_count(0.29, 100, "floor"), kept_count(0.3, 10, "floor"), kept_count(0.3, 3, "floor")] == [28, 3, 0]
    assert kept_count(0.3, 3, "floor", least=1) == 1
    cuts = run(MagnitudeQuantile(density=0.3, gamma=0.5, count="floor"), [torch.arange(1.0, 4.0).reshape(1, 1, 3)])
    assert cuts.tolist() == [[float("inf"), float("inf")]]


def test_sign_totals() -> None:
    parts = tensors()
    parts[0][:, 0] = 0  # cancelled entries count for nothing
    flat = joined(parts)
    total = flat[0] + flat[1] + flat[2]
    assert run(SignTotals(), parts) == int((total > 0).sum()) - int((total < 0).sum())
    assert run(SignTotals(), [torch.zeros(3, 4, 2)]) == 0


def test_collect_keeps_the_whole_stack() -> None:
    for stack in tensors():
        assert torch.equal(run(Collect(), [stack]), stack)


@pytest.mark.parametrize("statistic", [Gram(), SquaredNorms(), MagnitudeQuantile(density=0.2), SignTotals(), Collect()])
def test_memory_is_counted_and_inputs_stay(statistic: Statistic) -> None:
    parts = tensors()[:1]
    before = parts[0].clone()
    run(statistic, parts)
    assert torch.equal(parts[0], before)
    assert statistic.memory(3, 70) > 0
