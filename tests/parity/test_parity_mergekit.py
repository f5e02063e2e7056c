"""The methods that mergekit has besides the sparse ones, against plain references on whole tensors in float64, and their laws."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from synthetic import State, differences, merged, merged_vector, models
from thetau.errors import RecipeError
from thetau.methods import (
    ArceeFusion,
    InverseNorm,
    Karcher,
    Linear,
    ModelStock,
    Multislerp,
    Nearswap,
    Nuslerp,
    Passthrough,
    PerPattern,
    PerTask,
    Ram,
    RamPlus,
    Sce,
    Slerp,
)

SHAPES = {
    "layers.0.mlp.fc1.weight": (300, 260),  # two blocks of rows
    "layers.0.attn.q_proj.weight": (32, 32),
    "conv.weight": (5, 3, 4),
    "long": (70_000,),  # two blocks
    "norm.weight": (49,),
    "one": (1,),
    "scale": (),
}
TASKS = ("b", "a", "c")
W = {"a": 0.7, "b": -0.4, "c": 1.3}
WEIGHTS = PerTask(dict(W))
RMS = 0.7  # angles that float32 tells well


def close(got: State, want: State, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        torch.testing.assert_close(
            got[name].double(), want[name].double(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def weights() -> tuple[State, dict[str, State]]:
    return models(SHAPES, TASKS, rms=RMS)


pytestmark = pytest.mark.filterwarnings("ignore::thetau.ThetauWarning")  # the models are far apart on purpose


# Weighted means.


@pytest.mark.parametrize("normalise", [True, False])
def test_linear(weights: Any, normalise: bool) -> None:
    base, tuned = weights
    total = sum(W.values()) if normalise else 1.0
    want = {name: sum(W[task] * tuned[task][name].double() for task in TASKS) / total for name in SHAPES}
    close(merged(base, tuned, Linear(weights=WEIGHTS, normalise=normalise)), want)


def test_linear_refuses_weights_that_add_up_to_0(weights: Any) -> None:
    base, tuned = weights
    opposed = PerTask({"a": 0.5, "b": -0.75, "c": PerPattern({"norm*": 1.0, "*": 0.25})})
    with pytest.raises(
        RecipeError, match=r"the weights add up to 0 at 'layers\.0\.mlp.fc1\.weight', so they cannot be normalised"
    ):
        merged(base, tuned, Linear(weights=opposed))
    merged(base, tuned, Linear(weights=opposed, normalise=False))


def test_passthrough(weights: Any) -> None:
    base, tuned = weights
    got = merged(base, {"a": tuned["a"]}, Passthrough(scale=PerPattern({"norm*": 0.5, "*": 1.0})))
    for name in SHAPES:
        assert torch.equal(got[name], tuned["a"][name] * (0.5 if name.startswith("norm") else 1))


@pytest.mark.parametrize("method", [Passthrough(), Slerp(), Nearswap(), ArceeFusion(), Nuslerp()], ids=repr)
def test_how_many_a_method_takes(weights: Any, method: Any) -> None:
    base, tuned = weights
    with pytest.raises(RecipeError, match=r"takes (1|2) (models|task vectors).*\. Got 3\."):
        merged(base, tuned, method)


# Great circles.


def between(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point of two vectors' great circle: sines of shares of their angle, on the vectors as they are."""
    if not float(first.norm()) or not float(second.norm()):
        angle = math.pi / 2
    else:
        angle = math.acos(max(-1.0, min(1.0, float(first @ second / first.norm() / second.norm()))))
    if abs(math.sin(angle)) < 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -0.5, 1.7])
def test_slerp(weights: Any, t: float) -> None:
    base, tuned = weights
    got = merged(base, {"a": tuned["a"]}, Slerp(t=t))
    want = {}
    for name in SHAPES:
        first, second = base[name].double().flatten(), tuned["a"][name].double().flatten()
        cosine = float(first @ second / first.norm() / second.norm())
        line = (1 - t) * first + t * second
        want[name] = (line if abs(cosine) > 0.9995 else between(first, second, t)).reshape(SHAPES[name])
    close(got, want)


def test_slerp_keeps_the_length_of_models_of_one_length() -> None:
    base = {"w": torch.tensor([[3.0, 0.0]])}
    tuned = {"a": {"w": torch.tensor([[0.0, 3.0]])}}
    got = merged(base, tuned, Slerp(t=1 / 3))["w"]
    torch.testing.assert_close(got, 3 * torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))


@pytest.mark.parametrize("of", ["models", "vectors"])
@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
def test_nuslerp(weights: Any, along: Any, of: Any) -> None:
    base, tuned = weights
    two = {task: tuned[task] for task in ("b", "a")}
    share = {"a": 0.5, "b": 1.0}
    got = merged(base, two, Nuslerp(weights=PerTask(dict(share)), along=along, of=of))
    want = {}
    for name, shape in SHAPES.items():
        start = base[name].double() if of == "vectors" else torch.zeros(shape).double()
        first, second = (two[task][name].double() - start for task in ("a", "b"))
        if along == "tensor" or len(shape) < 2:
            turned = between(first.flatten(), second.flatten(), 2 / 3).reshape(shape)
        else:
            axis = -1 if along == "rows" else 0
            rows = [x.movedim(axis, -1) for x in (first, second)]
            fibres = [between(x, y, 2 / 3) for x, y in zip(*(x.reshape(-1, x.shape[-1]) for x in rows), strict=True)]
            turned = torch.stack(fibres).reshape(rows[0].shape).movedim(-1, axis)
        want[name] = start + turned
    close(got, want, rtol=1e-4, atol=1e-5)


def test_opposed_vectors_do_not_blow_up() -> None:
    """Antiparallel and of other lengths: on the straight line, whatever rounding made of the angle."""
    base = {"w": torch.zeros(16, 300)}
    one = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    for factor in (-1.0, -3.0, -0.1, 2.0):
        tuned = {"a": {"w": one}, "b": {"w": factor * one}}
        for along in ("tensor", "rows", "columns"):
            got = merged(base, tuned, Nuslerp(of="vectors", along=along))["w"]
            torch.testing.assert_close(got, (one + factor * one) / 2, rtol=1e-4, atol=1e-5)


def test_weights_that_add_up_to_0_stand_for_one_half_each(weights: Any) -> None:
    base, tuned = weights
    two = {task: tuned[task] for task in ("a", "b")}
    opposed = merged(base, two, Nuslerp(weights=PerTask({"a": 1.0, "b": -1.0})))
    close(opposed, merged(base, two, Nuslerp()))


# Means on the sphere.


@pytest.mark.parametrize("of", ["models", "vectors"])
@pytest.mark.parametrize("normalise", [True, False])
def test_multislerp(weights: Any, normalise: bool, of: Any) -> None:
    """With the step in the tangent space, which is none."""
    base, tuned = weights
    got = merged(base, tuned, Multislerp(weights=WEIGHTS, normalise=normalise, of=of))
    want = {}
    for name, shape in SHAPES.items():
        start = base[name].double() if of == "vectors" else torch.zeros(shape).double()
        given = [(tuned[task][name].double() - start).flatten() for task in TASKS]
        share = [W[task] / (sum(W.values()) if normalise else 1) for task in TASKS]
        units = [x / x.norm() for x in given]
        mean = sum(w * u for w, u in zip(share, units, strict=True))
        mean = mean / mean.norm()
        step = sum(w * (u - (u @ mean) * mean) for w, u in zip(share, units, strict=True))
        assert float(step.norm()) < 1e-12
        length = sum(w * x.norm() for w, x in zip(share, given, strict=True))
        want[name] = start + (length * mean).reshape(shape)
    close(got, want, atol=5e-6)


def test_multislerp_is_karcher_before_its_first_step(weights: Any) -> None:
    base, tuned = weights
    close(merged(base, tuned, Multislerp()), merged(base, tuned, Karcher(max_iter=0)))
    even = merged(base, tuned, Karcher())
    assert not torch.allclose(
        even["layers.0.attn.q_proj.weight"], merged(base, tuned, Multislerp())["layers.0.attn.q_proj.weight"]
    )


@pytest.mark.parametrize("share", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.2, "b": 0.5, "c": 1.3}], ids=repr)
def test_the_karcher_mean_is_where_the_logarithms_add_up_to_0(weights: Any, share: dict[str, float]) -> None:
    base, tuned = weights
    got = merged(base, tuned, Karcher(weights=PerTask(dict(share)), max_iter=200, tol=1e-12))
    total = sum(share.values())
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            continue
        mean = got[name].double().flatten()
        given = {task: tuned[task][name].double().flatten() for task in TASKS}
        length = sum(share[task] / total * given[task].norm() for task in TASKS)
        assert float(mean.norm()) == pytest.approx(float(length), rel=1e-6)
        mean = mean / mean.norm()
        pull = torch.zeros_like(mean)
        for task in TASKS:
            unit = given[task] / given[task].norm()
            angle = torch.acos(unit @ mean)
            pull += share[task] * angle / torch.sin(angle) * (unit - (unit @ mean) * mean)
        assert float(pull.norm()) < 1e-5


def test_the_mean_of_two_is_half_the_way(weights: Any) -> None:
    base, tuned = weights
    one, two = tuned["a"], {name: tensor.roll(1, -1) if tensor.ndim else tensor for name, tensor in tuned["a"].items()}
    got = merged(base, {"a": one, "b": two}, Karcher())  # of one length, so that both are the same point
    close(got, merged(base, {"a": one, "b": two}, Nuslerp()))


@pytest.mark.parametrize("method", [Karcher(), Multislerp(), Karcher(of="vectors"), Multislerp(of="vectors")], ids=repr)
def test_what_cancels_is_finite(method: Any) -> None:
    one = {"w": torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), "z": torch.zeros(4)}
    base = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    for factors in ((1.0, -1.0), (1.0, -1.0, 0.0), (1.0, 1.0, -2.0), (0.0, 0.0)):
        tuned = {f"m{i}": {name: factor * tensor for name, tensor in one.items()} for i, factor in enumerate(factors)}
        got = merged(base, tuned, method)
        assert all(bool(tensor.isfinite().all()) and float(tensor.abs().max()) < 10 for tensor in got.values())
        assert not bool(got["z"].any())


def test_a_model_of_no_length_counts_in_the_length_alone() -> None:
    base = {"w": torch.zeros(1, 2)}
    tuned = {"a": {"w": torch.tensor([[3.0, 4.0]])}, "b": {"w": torch.zeros(1, 2)}}
    torch.testing.assert_close(merged(base, tuned, Karcher())["w"], torch.tensor([[1.5, 2.0]]))


# Model Stock.


@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize("clamp", [True, False])
def test_model_stock(weights: Any, clamp: bool, filter_wise: bool) -> None:
    base, tuned = weights
    got = merged(base, tuned, ModelStock(clamp=clamp, filter_wise=filter_wise))
    want = {}
    for name, shape in SHAPES.items():
        by_row = filter_wise and len(shape) >= 2
        rows = {
            task: (tuned[task][name].double() - base[name].double()).reshape(-1, shape[-1] if by_row else math.prod(shape))
            for task in TASKS
        }
        cosine = torch.stack(
            [
                (rows[i] * rows[j]).sum(1) / (rows[i].norm(dim=1) * rows[j].norm(dim=1)).clamp(min=1e-6)
                for i, j in combinations(TASKS, 2)
            ]
        ).mean(0)
        ratio = 3 * cosine / (1 + 2 * cosine)
        ratio = torch.where(cosine > 0, ratio, 0.0).clamp(0, 1) if clamp else ratio
        want[name] = base[name].double() + (ratio[:, None] * sum(rows.values()) / 3).reshape(shape)
    close(got, want, rtol=1e-4, atol=1e-4)  # near the formula's pole rounding is enlarged


def test_the_pole_of_model_stock_gives_the_base() -> None:
    base = {"w": torch.zeros(1, 2)}
    tuned = {"a": {"w": torch.tensor([[1.0, 0.0]])}, "b": {"w": torch.tensor([[-1.0, 0.0]])}}
    for filter_wise in (True, False):
        assert not merged(base, tuned, ModelStock(clamp=False, filter_wise=filter_wise))["w"].any()


# One model besides the base.


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5])
def test_nearswap(weights: Any, t: float) -> None:
    base, tuned = weights
    got = merged_vector(base, {"a": tuned["a"]}, Nearswap(t=t))
    for name in SHAPES:
        tau = tuned["a"][name] - base[name]
        torch.testing.assert_close(got[name], torch.minimum(torch.maximum(tau, tau.new_tensor(-t)), tau.new_tensor(t)))
        if t > 1e-6:  # as mergekit writes it
            share = (t / tau.abs().clamp(min=1e-6)).clamp(0, 1)
            want = share * tuned["a"][name] + (1 - share) * base[name]
            torch.testing.assert_close(base[name] + got[name], want, rtol=0, atol=2e-6)


def test_arcee_fusion() -> None:
    """By a sort. The importances are made as there, in float32: beside a cut one rounding decides."""
    base, tuned = models(SHAPES, ("a",), rms=0.05)
    got = merged(base, tuned, ArceeFusion())
    for name, shape in SHAPES.items():
        old, new = base[name], tuned["a"][name]
        p, q = torch.softmax(new, -1) + 1e-8, torch.softmax(old, -1) + 1e-8
        divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
        importance = (new - old).abs() * (divergence if len(shape) >= 2 else 1.0)
        ranked = importance.flatten().sort().values
        first, median, third = (ranked[int(share * (len(ranked) - 1))] for share in (0.25, 0.5, 0.75))
        taken = importance >= median + 1.5 * (third - first)
        assert len(shape) < 2 or 0 < int(taken.sum()) < taken.numel() / 5
        torch.testing.assert_close(got[name], torch.where(taken, new, old), rtol=0, atol=1e-6)


# RAM.


def ram(tau: list[Tensor], epsilon: float, factors: list[float]) -> Tensor:
    out = torch.zeros_like(tau[0]).double().flatten()
    flat = [t.flatten() for t in tau]
    for place in range(len(out)):
        found = [(float(t[place]), f) for t, f in zip(flat, factors, strict=True) if float(t[place].abs()) > epsilon]
        if len(found) == 1:
            out[place] = found[0][0] * found[0][1]
        elif found:
            out[place] = sum(value for value, _ in found) / len(found)
    return out.reshape(tau[0].shape)


SMALL = {name: shape for name, shape in SHAPES.items() if math.prod(shape) < 2000}


def counts(tau: list[Tensor], epsilon: float) -> list[tuple[int, int]]:
    changed = torch.stack([t.abs() > epsilon for t in tau])
    many = changed.sum(0)
    return [(int((one & (many > 1)).sum()), int((one & (many == 1)).sum())) for one in changed]


def growth(shared: int, unique: int) -> float:
    return 1 + 0.4 * min(shared / max(unique, 1e-5), 0.9)


@pytest.mark.parametrize("scope", [None, "tensor", "vector"])
def test_ram(scope: Any) -> None:
    base, tuned = models(SMALL, TASKS, rms=0.01)
    tau = differences(base, tuned)
    epsilon = 0.012
    by_tensor = {name: counts([tau[task][name] for task in TASKS], epsilon) for name in SMALL}
    whole = [(sum(by_tensor[name][i][0] for name in SMALL), sum(by_tensor[name][i][1] for name in SMALL)) for i in range(3)]
    want = {}
    for name in SMALL:
        found = whole if scope == "vector" else by_tensor[name]
        factors = [growth(*pair) if scope else 1.0 for pair in found]
        want[name] = ram([tau[task][name] for task in TASKS], epsilon, factors)
    method: Any = RamPlus(r=0.4, alpha=0.9, epsilon=epsilon, scope=scope) if scope else Ram(epsilon=epsilon)
    close(merged_vector(base, tuned, method), want, atol=1e-7)


@pytest.mark.parametrize("method", [Ram(), RamPlus(), RamPlus(scope="vector")], ids=repr)
def test_ram_of_equal_and_of_disjoint_vectors(method: Any) -> None:
    """Equal ones come back; disjoint ones are added up, for nothing is shared."""
    base, tuned = models(SMALL, ("a",))
    tau = differences(base, tuned)["a"]
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    equal = merged_vector(zero, {"x": tau, "y": tau}, method)
    close(equal, tau, atol=1.1e-5)  # ε itself is lost
    left = {name: tensor * (torch.arange(tensor.numel()) % 2 == 0).reshape(tensor.shape) for name, tensor in tau.items()}
    right = {name: tensor - left[name] for name, tensor in tau.items()}
    close(merged_vector(zero, {"x": left, "y": right}, method), tau, atol=1.1e-5)


# Coefficients by inverse norm.


@pytest.mark.parametrize("lengths", ["vector", "tensor"])
def test_inverse_norm(lengths: Any) -> None:
    """All parts of the sum are of one length; a vector of zeros takes no part."""
    base, tuned = models(SMALL, TASKS)
    tuned["c"] = {name: base[name] + 7 * (tensor - base[name]) for name, tensor in tuned["c"].items()}
    tau = differences(base, tuned)
    want = {}
    for name in SMALL:
        names = [name] if lengths == "tensor" else list(SMALL)
        inverse = {task: 1 / math.sqrt(sum(float(tau[task][n].double().square().sum()) for n in names)) for task in TASKS}
        want[name] = 0.6 * sum(inverse[task] * tau[task][name].double() for task in TASKS) / sum(inverse.values())
    method = InverseNorm(lengths=lengths, scale=0.6)
    close(merged_vector(base, tuned, method), want, atol=1e-7)
    close(merged_vector(base, {**tuned, "none": base}, method), want, atol=1e-7)


# SCE.


@pytest.mark.parametrize("select", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("even_below", [0.0, 1e-2])
def test_sce(select: float, even_below: float) -> None:
    base, tuned = models(SHAPES, TASKS, rms=0.02)
    tuned["c"] = {name: base[name] + 5 * (tensor - base[name]) for name, tensor in tuned["c"].items()}
    tau = differences(base, tuned)
    got = merged_vector(base, tuned, Sce(select_topk=select, even_below=even_below))
    want = {}
    for name, shape in SHAPES.items():
        stack = torch.stack([tau[task][name].flatten() for task in TASKS])
        if select < 1:
            variance = stack.double().var(0, unbiased=False)
            keep = int(select * int((variance != 0).sum()))
            mask = torch.zeros(stack.shape[1])
            mask[variance.argsort(descending=True)[:keep]] = 1
            stack = stack * mask
        squares = stack.double().square().mean(1)
        total = float(squares.sum())
        share = torch.full((3,), 1 / 3).double() if total == 0 or total < even_below else squares / total
        agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        weight = share[:, None] * agree
        want[name] = ((weight * stack).sum(0) / weight.sum(0).clamp(min=1e-6)).reshape(shape)
    close(got, want, atol=1e-7)


def test_sce_of_one_task_and_of_equal_tasks() -> None:
    """Where nothing differs there is nothing to select from; without a selection all comes back."""
    base, tuned = models(SMALL, ("a",))
    tau = differences(base, tuned)["a"]
    close(merged_vector(base, tuned, Sce()), tau, atol=1e-7)
    twice = {"a": tuned["a"], "b": tuned["a"]}
    close(merged_vector(base, twice, Sce()), tau, atol=1e-7)
    assert not any(bool(tensor.any()) for tensor in merged_vector(base, twice, Sce(select_topk=0.5)).values())
