"""Breadcrumbs, DELLA and Model Stock against direct implementations on whole tensors, and the compiled loop against torch."""

from __future__ import annotations

from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import write_model
from synthetic import State, differences, merged_vector, models
from thetau.checkpoint import Kind
from thetau.methods import Breadcrumbs, BreadcrumbsTies, Della, DellaLinear, ModelStock
from thetau.parts import Site
from thetau.statistics.quantile import kept_ranks
from thetau.transforms import RankDrop
from thetau.transforms.stock import stock_ratio

SHAPES = {
    "layers.0.mlp.fc1.weight": (37, 19),
    "layers.0.attn.q_proj.weight": (12, 12),
    "conv.weight": (5, 3, 3),
    "one.weight": (9, 1),
    "norm.weight": (19,),
    "scale": (),
}
TASKS = ("a", "b", "c")


def vectors(shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[State, dict[str, State], dict[str, State]]:
    base, tuned = models(shapes, TASKS)
    return base, tuned, differences(base, tuned)


# Breadcrumbs.


def band(tau: Tensor, density: float, gamma: float) -> Tensor:
    """By sorting: the ⌊γn⌋ largest go, the ⌈density · n⌉ next ones stay."""
    n = tau.numel()
    kept = ceil(density * n - 1e-9)
    outliers = min(floor(gamma * n + 1e-9), n - kept)
    order = tau.abs().flatten().argsort(descending=True)
    out = torch.zeros(n)
    stay = order[outliers : outliers + kept]
    out[stay] = tau.flatten()[stay]
    return out.reshape(tau.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.2), (0.3, 0.0), (0.95, 0.2), (0.01, 0.5)])
def test_breadcrumbs_is_a_band_by_magnitude(density: float, gamma: float) -> None:
    base, tuned, tau = vectors()
    got = merged_vector(base, tuned, Breadcrumbs(density=density, gamma=gamma, scale=1.0))
    for name in SHAPES:
        want = sum((band(tau[task][name], density, gamma) for task in TASKS), torch.zeros(SHAPES[name]))
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-7)


def test_the_mask_of_a_small_tensor_is_not_empty() -> None:
    """γ · n < 1: nothing is an outlier, and the smallest entries still go."""
    assert kept_ranks(0.5, 0.01, 20) == (10, 1)
    assert kept_ranks(0.9, 0.01, 1) == (1, 1)
    assert kept_ranks(0.9, 0.2, 100) == (100, 11)  # 10 outliers go, not 20: the density is kept
    base, tuned, tau = vectors()
    got = merged_vector(base, tuned, Breadcrumbs(density=0.5, scale=1.0))
    assert int((got["norm.weight"] != 0).sum()) >= 10
    torch.testing.assert_close(got["scale"], sum(tau[task]["scale"] for task in TASKS))


def test_breadcrumbs_over_the_whole_vector() -> None:
    base, tuned, tau = vectors()
    got = merged_vector(base, tuned, Breadcrumbs(density=0.4, gamma=0.1, trim="vector", scale=1.0))
    flat = {task: torch.cat([tau[task][name].flatten() for name in SHAPES]) for task in TASKS}
    want = sum(band(flat[task], 0.4, 0.1) for task in TASKS)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(torch.cat([got[name].flatten() for name in SHAPES]), want, rtol=0, atol=1e-7)


def test_breadcrumbs_ties_elects_and_averages() -> None:
    base, tuned, tau = vectors()
    got = merged_vector(base, tuned, BreadcrumbsTies(density=0.6, gamma=0.05))
    for name in SHAPES:
        stack = torch.stack([band(tau[task][name], 0.6, 0.05) for task in TASKS])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        torch.testing.assert_close(got[name], (stack * agree).sum(0) / agree.sum(0).clamp(min=1), rtol=1e-6, atol=1e-8)


# DELLA.


def magprune(tau: Tensor, name: str, task: str, drop: float, epsilon: float, seed: int) -> Tensor:
    """Entry by entry, from the definition."""
    flat = (1, tau.numel()) if tau.ndim < 2 else (tau.shape[0], tau[0].numel())
    site = Site(name=name, shape=tuple(tau.shape), kind=Kind.OTHER, layer=None, tasks=(task,), seed=seed)
    bits = site.bits(0, tau.numel(), "drop").reshape(flat).double() / 2**31
    rows, out = tau.reshape(flat), torch.zeros(flat)
    for row in range(flat[0]):
        by_size = sorted(range(flat[1]), key=lambda i: (float(rows[row, i].abs()), i))
        for rank, place in enumerate(by_size):
            p = drop + epsilon * (0.5 - (rank / (flat[1] - 1) if flat[1] > 1 else 0.5))
            if bits[row, place] >= round(p * 2**31) / 2**31:
                out[row, place] = rows[row, place] / (1 - p)
    return out.reshape(tau.shape)


@pytest.mark.parametrize(("drop", "epsilon"), [(0.7, 0.2), (0.5, 0.9), (0.3, 0.0)])
def test_della_is_its_definition(drop: float, epsilon: float) -> None:
    base, tuned, tau = vectors()
    got = merged_vector(base, tuned, DellaLinear(drop=drop, epsilon=epsilon, scale=1.0), seed=3)
    full = merged_vector(base, tuned, Della(drop=drop, epsilon=epsilon), seed=3)
    for name in SHAPES:
        stack = torch.stack([magprune(tau[task][name], name, task, drop, epsilon, 3) for task in TASKS])
        torch.testing.assert_close(got[name], stack.sum(0), rtol=1e-5, atol=1e-7)
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        torch.testing.assert_close(full[name], (stack * agree).sum(0) / agree.sum(0).clamp(min=1), rtol=1e-5, atol=1e-7)


def test_della_keeps_the_expectation_and_the_large() -> None:
    size = 20_000
    row = torch.linspace(0.001, 1, size)[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    stack = row.expand(1, 1, size)
    part = RankDrop(rate=0.6, epsilon=0.6)
    site = Site(name="w", shape=(1, size), kind=Kind.OTHER, layer=None, tasks=("a",), row_elements=size)
    out = part.apply(stack.clone(), None, site)[0, 0]
    assert float(out.sum() / row.sum()) == pytest.approx(1, abs=0.03)
    large, small = row > 0.9, row < 0.1
    assert float((out[large] != 0).float().mean()) == pytest.approx(1 - 0.33, abs=0.03)
    assert float((out[small] != 0).float().mean()) == pytest.approx(1 - 0.87, abs=0.03)


@pytest.mark.parametrize(("drop", "epsilon"), [(0.9, 0.3), (0.1, 0.3), (0.5, 1.0), (0.5, -0.1), (1.0, 0.0)])
def test_probabilities_outside_0_and_1_are_refused(drop: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"`Della(Linear)?\((drop|epsilon)=\.\.\.\)` must"):
        Della(drop=drop, epsilon=epsilon)


# Model Stock.


def test_model_stock_is_its_formula() -> None:
    base, tuned, tau = vectors()
    common = {name: 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(9)) for name, shape in SHAPES.items()}
    tuned = {task: {name: value + common[name] for name, value in state.items()} for task, state in tuned.items()}
    tau = differences(base, tuned)
    got = merged_vector(base, tuned, ModelStock())
    for name in SHAPES:
        flat = [tau[task][name].flatten().double() for task in TASKS]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cos = sum(float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm())) for i, j in pairs) / 3
        ratio = min(1.0, max(0.0, 3 * cos / (1 + 2 * cos)))
        torch.testing.assert_close(got[name].flatten().double(), ratio * sum(flat) / 3, rtol=1e-5, atol=1e-8)


def test_the_ratio_at_its_ends() -> None:
    assert stock_ratio(torch.ones(3, 3).double()) == 1
    assert stock_ratio(torch.eye(3).double()) == 0
    assert stock_ratio(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()) == 0  # the formula has a pole there
    assert stock_ratio(torch.zeros(3, 3).double()) == 0
    assert stock_ratio(torch.ones(1, 1).double()) == 1
    assert stock_ratio(torch.tensor([[4.0, 1.0], [1.0, 1.0]]).double()) == pytest.approx(2 * 0.5 / 1.5)


# The compiled loop.

ROWS = {
    "wide.weight": (3, 70_001),
    "layers.0.mlp.weight": (130, 1000),
    "conv.weight": (7, 3, 11),
    "long": (70_000,),
    "short": (333,),
    "one": (1,),
    "narrow": (50, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "method",
    [Della(), DellaLinear(epsilon=0.0), Breadcrumbs(gamma=0.1, density=0.5), BreadcrumbsTies(trim="vector"), ModelStock()],
    ids=lambda method: type(method).__name__,
)
def test_the_compiled_loop_has_the_bits_of_torch(tmp_path: Path, method: Any, dtype: torch.dtype) -> None:
    base, tuned = models(ROWS, TASKS, dtype=dtype)
    tuned["b"]["short"] = base["short"].clone()
    for name, state in {"base": base, **tuned}.items():
        write_model(tmp_path / name, state)
    start = thetau.open(tmp_path / "base")
    expression = start + thetau.merge([thetau.open(tmp_path / task) - start for task in TASKS], method, seed=5)
    expression.save(tmp_path / "out")  # through the compiled loop
    want = expression.state_dict()  # through torch
    written = thetau.open(tmp_path / "out").terms[0][1]
    for name in ROWS:
        assert torch.equal(written.read(name), want[name]), name
        assert name in ("one", "narrow") or not torch.equal(want[name], base[name])


def _rows_that_are_hard_to_sort(width: int) -> Tensor:
    """By row: ties alone, zeros and tiny ones, one entry far beyond the others, falling and rising magnitudes, ends of the range, all the same."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(width, generator=generator)
    ramp = torch.arange(1, width + 1).float()
    few = torch.randint(0, 5, (width,), generator=generator).float() - 2
    sparse = noise.where(torch.rand(width, generator=generator) < 0.02, 0)
    outlier = noise * 1e-6
    outlier[width // 2] = 1e6
    ends = noise.clone()
    ends[0], ends[-1], ends[width // 3] = 3e38, -1e-45, 1e-38
    return torch.stack(
        [
            noise,
            few,
            sparse,
            outlier,
            ramp,
            -ramp.flip(0),
            1.5 ** (ramp % 120 - 60),
            ends,
            torch.full((width,), -2.0),
            noise.bfloat16().float(),
        ]
    )


@pytest.mark.parametrize("width", [2, 65, 1000, 5000, 16384, 16385])
def test_rows_of_every_kind_are_ranked_as_torch_ranks_them(tmp_path: Path, width: int) -> None:
    """Buckets, insertion and the way back to bytes are chosen by what a row holds; ranks are not."""
    rows = _rows_that_are_hard_to_sort(width)
    base = {"layers.0.mlp.weight": torch.zeros_like(rows)}
    for name, state in {"base": base, "a": {"layers.0.mlp.weight": rows}, "b": {"layers.0.mlp.weight": rows.flip(1)}}.items():
        write_model(tmp_path / name, state)
    start = thetau.open(tmp_path / "base")
    method = DellaLinear(drop=0.5, epsilon=0.8, rescale="none")
    expression = start + thetau.merge([thetau.open(tmp_path / task) - start for task in "ab"], method, seed=7)
    expression.save(tmp_path / "out")
    want = expression.state_dict()["layers.0.mlp.weight"]
    assert torch.equal(thetau.open(tmp_path / "out").terms[0][1].read("layers.0.mlp.weight"), want)
