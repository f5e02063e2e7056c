"""A look at a share of the entries saves a pass where it points to the right bins, and changes no bit, wherever it points."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import assert_same, write_model
from synthetic import site
from thetau import methods
from thetau.engine import compiled, kernels, passes
from thetau.engine.merge import Merge
from thetau.engine.planning import plan
from thetau.statistics.quantile import BINS, NEAR, Counts, Guess, Hits, MagnitudeQuantile

State = dict[str, Tensor]
SHAPES = {"a.weight": (300, 200), "b.weight": (128, 512), "c.weight": (1000, 60), "norm.weight": (200,), "scale": ()}
METHODS: dict[str, Callable[[], Any]] = {
    "ties": lambda: methods.Ties(density=0.2),
    "ties by tensor": lambda: methods.Ties(density=0.2, trim="tensor"),
    "breadcrumbs": lambda: methods.Breadcrumbs(density=0.8, gamma=0.05),
    "breadcrumbs of the vector": lambda: methods.Breadcrumbs(density=0.5, gamma=0.02, trim="vector"),
    "topk": lambda: methods.TopK(density=0.01),
    "dropped, then trimmed": lambda: methods.DareTies(drop=0.3, density=0.4),
}


def state(seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("look")
    base = state(0, request.param)
    tuned = [{name: (value + 0.1 * state(seed, request.param)[name]) for name, value in base.items()} for seed in (1, 2)]
    return [write_model(root / name, one) for name, one in zip(("base", "t0", "t1"), [base, *tuned], strict=True)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at models of this size too."""
    monkeypatch.setattr(passes, "LOOK", 10_000)
    monkeypatch.setattr(passes, "TENSOR_LOOK", 10_000)
    monkeypatch.setattr(compiled, "PIECE", 64)


def merged(models: list[Path], method: Any) -> State:
    base, *tuned = map(thetau.open, models)
    return (base + thetau.merge([one - base for one in tuned], method)).state_dict()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The kinds of rounds that the loop made, and how many elements each saw."""
    kinds: list[tuple[str, int]] = []
    run = kernels.run

    def counted(found: Any, ops: Any, first: int, count: int, *, statistic: str = "none", **options: Any) -> None:
        kinds.append((statistic, count))
        run(found, ops, first, count, statistic=statistic, **options)

    monkeypatch.setattr(kernels, "run", counted)
    return kinds


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_are_those_of_two_passes(
    models: list[Path], method: str, small: None, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = merged(models, METHODS[method]())
    assert "inside" in {kind for kind, _ in made}
    made.clear()
    monkeypatch.setattr(passes, "LOOK", 1 << 40)
    monkeypatch.setattr(passes, "TENSOR_LOOK", 1 << 40)
    want = merged(models, METHODS[method]())
    assert {kind for kind, _ in made} <= {"upper", "lower", "none"}
    assert_same(got, want)


@pytest.mark.parametrize("wrong", [0, BINS - NEAR])
@pytest.mark.parametrize("scope", ["vector", "tensor"])
def test_a_wrong_guess_costs_a_pass_and_no_bit(
    models: list[Path], wrong: int, scope: Any, small: None, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = methods.Ties(density=0.2, trim=scope)
    want = merged(models, method)
    made.clear()
    monkeypatch.setattr(MagnitudeQuantile, "guess", lambda self, total: Guess(torch.full((2, 1), wrong)))
    assert_same(merged(models, method), want)
    assert {"inside", "upper", "lower"} <= {kind for kind, _ in made}


def test_a_right_guess_ends_after_one_pass(
    models: list[Path], small: None, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = (thetau.open(model).state_dict() for model in models)
    vectors = [torch.cat([(one[name].float() - base[name].float()).flatten() for name in base]).abs() for one in tuned]
    entries = len(vectors[0])
    cuts = torch.stack([vector.kthvalue(entries - ceil(0.2 * entries) + 1).values for vector in vectors])
    exact = Guess((cuts.view(torch.int32).long() >> 16)[:, None])
    monkeypatch.setattr(MagnitudeQuantile, "guess", lambda self, total: exact)
    merged(models, methods.Ties(density=0.2))
    seen = {kind: sum(count for one, count in made if one == kind) for kind in ("upper", "inside", "lower")}
    assert seen["inside"] == entries and seen["lower"] == 0
    share = entries // 10_000
    assert 0.7 * entries / share < seen["upper"] <= entries / share + len(SHAPES)


def test_a_guess_of_an_even_share_is_right() -> None:
    """Every fifth of the entries in order: ranks are off by less than five entries, where half a bin beside the cut holds hundreds."""
    vector = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).abs().sort().values
    for density in (0.01, 0.1, 0.2, 0.5, 0.9):
        quantile = MagnitudeQuantile(density=density)
        look = Counts(
            quantile.add(None, vector[None, ::5, None], site(("a",), "w", 0, (200_000, 1)), None).bins, ((density, 0.0),)
        )
        cut = vector[1_000_000 - int(density * 1_000_000)]
        at = int(cut.view(torch.int32) >> 16) - int(quantile.guess(look).first)
        assert 0 <= at < NEAR, density


def test_pieces_are_spread_and_none_is_seen_twice(models: list[Path], small: None) -> None:
    base, *tuned = map(thetau.open, models)
    merge = thetau.merge([one - base for one in tuned], methods.Ties(density=0.2)).terms[0][1]
    assert isinstance(merge, Merge)
    for name, shape in SHAPES.items():
        found = kernels.inputs(merge.aligned.alignment, merge.aligned.vectors, name, None)
        assert found is not None
        pieces = list(compiled.Compiled(merge.aligned, [], found, 0).pieces(8))
        total = torch.Size(shape).numel()
        assert all(first >= 0 and count > 0 and first + count <= total for first, count in pieces)
        assert all(one + count <= other for (one, count), (other, _) in itertools.pairwise(pieces))
        assert sum(count for _, count in pieces) <= max(1, total // 8)


def test_the_plan_counts_one_pass_and_a_look(models: list[Path], small: None) -> None:
    base, *tuned = map(thetau.open, models)
    merge = thetau.merge([one - base for one in tuned], methods.Ties(density=0.2))
    source = merge.terms[0][1]
    assert isinstance(source, Merge)
    look, first, last = plan(merge, engine=source.engine).passes
    assert look.what == first.what == "MagnitudeQuantile for trim"
    assert 0 < look.read < first.read / 8 and first.read == last.read


def test_the_bins_of_a_guess() -> None:
    """The bin of the wanted entry, and the neighbour on whose side of it the entry lies."""
    bins = torch.zeros(2, 1, BINS, dtype=torch.int64)
    bins[:, 0, 100], bins[:, 0, 200] = 70, 30
    quantile = MagnitudeQuantile(density={"a": 0.35, "b": 0.95})
    guess = quantile.guess(Counts(bins, ((0.35, 0.0), (0.95, 0.0))))
    assert guess.first.tolist() == [[100], [99]]  # the 5th from the top of 70, and the 65th
    none = quantile.guess(Counts(bins, ((0.0, 0.0), (1.0, 0.0))))
    assert bool(((none.first >= 0) & (none.first <= BINS - NEAR)).all())


def test_nothing_wanted_is_no_miss() -> None:
    bins = torch.zeros(1, 1, BINS, dtype=torch.int64)
    bins[0, 0, 100] = 10
    quantile = MagnitudeQuantile(density=0.01, count="floor")
    assert quantile.finish(Counts(bins, ((0.01, 0.0),)), None).rank.tolist() == [[0]]
    guess = Guess(torch.zeros(1, 1, dtype=torch.int64))
    hits = Hits(torch.zeros(1, 1, NEAR << 16, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), 10, guess, ((0.01, 0.0),))
    found = quantile.finish(hits, guess)
    assert quantile.done(found) and found.tolist() == [[float("inf"), float("inf")]]
