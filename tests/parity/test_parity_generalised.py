"""The sparse methods as mergekit computes them, from its documented rules on whole tensors: weights, counts, rescaling, normalising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from synthetic import State, differences, merged_vector, models
from thetau.errors import ThetauError
from thetau.methods import (
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    PerPattern,
    PerTask,
    TaskArithmetic,
    Ties,
)
from thetau.methods.della import pairs

SHAPES = {
    "layers.0.mlp.fc1.weight": (67, 49),
    "layers.0.attn.q_proj.weight": (32, 32),
    "conv.weight": (5, 3, 3),
    "norm.weight": (49,),
    "one": (1,),
    "scale": (),
}
TASKS = ("a", "b", "c")
Shares = Mapping[str, float]
W: Shares = {"a": 0.7, "b": -0.4, "c": 1.3}
D: Shares = {"a": 0.3, "b": 0.65, "c": 1.0}
G: Shares = {"a": 0.0, "b": 0.3, "c": 0.1}


def by_task(values: Shares) -> PerTask:
    return PerTask(dict(values))


def largest(tau: Tensor, density: float, gamma: float | None) -> Tensor:
    """A mask by sorting. Without γ the ⌊density · n⌋ largest, at least one; with it a band, below as many outliers as leave its size."""
    n = tau.numel()
    mask = torch.zeros(n)
    order = tau.abs().flatten().argsort()
    if density >= 1:
        mask += 1
    elif gamma is None:
        mask[order[n - max(1, int(density * n)) :]] = 1
    else:
        kept = int(density * n)
        below = max(0, n - kept - int(gamma * n))
        mask[order[below : below + kept]] = 1
    return mask.reshape(tau.shape)


def rescaled(tau: Tensor, mask: Tensor, rescale: str) -> Tensor:
    """What the mask leaves, and its magnitudes brought to their old sum."""
    masked = tau * mask
    before, after = float(tau.double().abs().sum()), float(masked.double().abs().sum())
    return masked * (before / after) if rescale == "l1" and before >= 1e-7 and after >= 1e-7 else masked


def combined(deltas: list[Tensor], weights: list[float], *, elect: bool, normalise: bool) -> Tensor:
    """Weighted deltas, added up where they agree with the sign of their sum (0 counts as +), over the weights of those that do."""
    stack = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    given = torch.tensor(weights).reshape(-1, *[1] * deltas[0].ndim)
    if not elect:
        total = float(sum(weights))
        return stack.sum(0) / (total if normalise and abs(total) >= 1e-8 else 1.0)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    mask = stack.sign() == sign
    divisor = (given * mask).sum(0)
    return (stack * mask).sum(0) / (torch.where(divisor == 0, 1.0, divisor) if normalise else 1.0)


def compare(got: State, want: State) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lam", [1.0, 0.6])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize(("gamma", "elect"), [(None, True), (0.01, True), (0.01, False), (G, True), (G, False)])
def test_masks_by_magnitude(
    gamma: float | Shares | None, elect: bool, rescale: Literal["none", "l1"], normalise: bool, lam: float
) -> None:
    """`ties`, `breadcrumbs`, `breadcrumbs_ties`."""
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    want = {}
    for name in SHAPES:
        outliers = [gamma[task] if isinstance(gamma, Mapping) else gamma for task in TASKS]
        masks = [largest(tau[task][name], D[task], g) for task, g in zip(TASKS, outliers, strict=True)]
        deltas = [rescaled(tau[task][name], mask, rescale) for task, mask in zip(TASKS, masks, strict=True)]
        want[name] = lam * combined(deltas, [W[task] for task in TASKS], elect=elect, normalise=normalise)
    shared: dict[str, Any] = {"density": by_task(D), "trim": "tensor", "count": "floor", "rescale": rescale}
    ties: dict[str, Any] = {"weights": by_task(W), "normalise": normalise, "cancelled": "positive", "scale": lam}
    outer = by_task(gamma) if isinstance(gamma, Mapping) else gamma
    method: Any
    if outer is None:
        method = Ties(**shared, **ties)
    elif elect:
        method = BreadcrumbsTies(gamma=outer, **shared, **ties)
    else:
        scale = W if normalise else {task: lam * weight for task, weight in W.items()}
        method = Breadcrumbs(gamma=outer, **shared, scale=by_task(scale), total=lam if normalise else None)
    compare(merged_vector(base, tuned, method), want)


@pytest.mark.parametrize("weights", [W, {"a": 0.5, "b": 0.25, "c": -0.75}], ids=repr)
def test_task_arithmetic_divided_by_its_weights(weights: Shares) -> None:
    """Weights that add up to 0 are not divided by."""
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    want = {
        name: 0.8 * combined([tau[t][name] for t in TASKS], [weights[t] for t in TASKS], elect=False, normalise=True)
        for name in SHAPES
    }
    compare(merged_vector(base, tuned, TaskArithmetic(scale=by_task(weights), total=0.8)), want)


RANDOM = {
    "dare_linear": (DareLinear, {"drop": by_task({"a": 0.7, "b": 0.5, "c": 0.1})}),
    "dare_ties": (DareTies, {"drop": by_task({"a": 0.7, "b": 0.5, "c": 0.1}), "density": 1.0}),
    "della_linear": (DellaLinear, {"drop": by_task({"a": 0.7, "b": 0.5, "c": 0.0}), "epsilon": 0.4}),
    "della": (Della, {"drop": by_task({"a": 0.7, "b": 0.5, "c": 0.0}), "epsilon": 0.4}),
}


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_masks_are_followed_by_the_same_steps(name: str, rescale: Literal["none", "l1"]) -> None:
    """Which entries stay is told by each task alone; everything after the masks is compared entry by entry."""
    base, tuned = models(SHAPES, TASKS)
    tau = differences(base, tuned)
    cls, fields = RANDOM[name]
    linear = DareLinear if name.startswith("dare") else DellaLinear
    only = {key: value for key, value in fields.items() if key != "density"}
    masks = {}
    for task in TASKS:
        alone = {one: float(one == task) for one in TASKS}
        masks[task] = merged_vector(base, tuned, linear(**only, rescale="none", scale=by_task(alone)), seed=4)
    elect = "linear" not in name
    want = {}
    for tensor in SHAPES:
        deltas = [rescaled(tau[t][tensor], (masks[t][tensor] != 0).float(), rescale) for t in TASKS]
        want[tensor] = combined(deltas, [W[t] for t in TASKS], elect=elect, normalise=elect)
    given: dict[str, Any] = {"weights": by_task(W), "cancelled": "positive"} if elect else {"scale": by_task(W)}
    compare(merged_vector(base, tuned, cls(**fields, rescale=rescale, **given), seed=4), want)


def test_the_random_masks_have_their_densities() -> None:
    """By task, and for DELLA by rank in the row: the smallest of a row stay with density − ε, the largest with density + ε."""
    shape, tasks = (400, 300), ("a", "b")
    base, tuned = models({"w": shape}, tasks)
    tau = differences(base, tuned)
    drop = PerTask({"a": 0.7, "b": 0.4})
    for task, density in (("a", 0.3), ("b", 0.6)):
        alone = PerTask({one: float(one == task) for one in tasks})
        spread = (density * (1 - density) / (shape[0] * shape[1])) ** 0.5
        dare = merged_vector(base, tuned, DareLinear(drop=drop, rescale="none", scale=alone))["w"]
        assert float((dare != 0).double().mean()) == pytest.approx(density, abs=5 * spread)
        della = merged_vector(base, tuned, DellaLinear(drop=drop, epsilon=0.4, rescale="none", scale=alone))["w"]
        assert float((della != 0).double().mean()) == pytest.approx(density, abs=5 * spread)
        order = tau[task]["w"].abs().argsort(1)
        kept = (della != 0).gather(1, order).double().mean(0)  # by rank
        assert float(kept[:10].mean()) == pytest.approx(density - 0.2 + 0.4 * 4.5 / 299, abs=5 * (0.25 / 4000) ** 0.5)
        assert float(kept[-10:].mean()) == pytest.approx(density + 0.2 - 0.4 * 4.5 / 299, abs=5 * (0.25 / 4000) ** 0.5)


def test_rescaling_keeps_the_sum_of_magnitudes() -> None:
    """Of a tensor, or of the vector where whole vectors are ranked; a tensor of zeros stays one."""
    base, tuned = models(SHAPES, ("a",))
    tuned["a"]["norm.weight"] = base["norm.weight"].clone()
    tau = differences(base, tuned)["a"]
    by_tensor = merged_vector(base, tuned, Ties(density=0.2, trim="tensor", rescale="l1"))
    for name in SHAPES:
        torch.testing.assert_close(by_tensor[name].double().abs().sum(), tau[name].double().abs().sum(), rtol=1e-6, atol=0)
    whole = merged_vector(base, tuned, Ties(density=0.2, rescale="l1"))
    sums = [sum(float(state[name].double().abs().sum()) for name in SHAPES) for state in (whole, tau)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    bare = merged_vector(base, tuned, Ties(density=0.2))
    nonzero = bare["layers.0.mlp.fc1.weight"] != 0
    factors = (whole["layers.0.mlp.fc1.weight"] / bare["layers.0.mlp.fc1.weight"])[nonzero]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))


def test_shares_by_pattern_are_those_of_each_tensor() -> None:
    base, tuned = models(SHAPES, TASKS)
    density = PerTask({"a": PerPattern({"layers.0.*": 0.2, "*": 1.0}), "b": 0.5, "c": PerPattern({"*": 0.7})})
    got = merged_vector(base, tuned, Ties(density=density, trim="tensor"))
    for pattern, value in (("layers", 0.2), ("conv", 1.0)):
        want = merged_vector(base, tuned, Ties(density=PerTask({"a": value, "b": 0.5, "c": 0.7}), trim="tensor"))
        for name in (name for name in SHAPES if name.startswith(pattern)):
            assert torch.equal(got[name], want[name])


def test_one_share_for_all_is_the_share_by_task() -> None:
    base, tuned = models(SHAPES, TASKS)
    for trim in ("vector", "tensor"):
        one = merged_vector(base, tuned, Ties(density=0.3, trim=trim))
        same = merged_vector(base, tuned, Ties(density=by_task(dict.fromkeys(TASKS, 0.3)), trim=trim))
        assert all(torch.equal(one[name], same[name]) for name in SHAPES)


def test_weights_all_the_same_change_nothing_but_their_size() -> None:
    base, tuned = models(SHAPES, TASKS)
    compare(merged_vector(base, tuned, Ties(density=0.5, weights=0.25)), merged_vector(base, tuned, Ties(density=0.5)))
    total = merged_vector(base, tuned, Ties(density=0.5, weights=0.25, normalise=False))
    compare(total, {name: 0.25 * v for name, v in merged_vector(base, tuned, Ties(density=0.5, normalise=False)).items()})


def test_entries_that_cancel_go_with_the_positive_ones() -> None:
    base = {"w": torch.zeros(1, 3)}
    tuned = {"a": {"w": torch.tensor([[1.0, -1.0, 2.0]])}, "b": {"w": torch.tensor([[-1.0, 1.0, 4.0]])}}
    assert merged_vector(base, tuned, Ties(density=1.0, cancelled="positive"))["w"].tolist() == [[1, 1, 3]]
    assert merged_vector(base, tuned, Ties(density=1.0))["w"].tolist() == [[0, 0, 3]]


def test_a_weight_of_0_takes_a_task_out() -> None:
    """As mergekit's density of 0 does, which is refused here."""
    base, tuned = models(SHAPES, TASKS)
    two = {task: tuned[task] for task in ("a", "c")}
    got = merged_vector(base, tuned, Ties(density=0.5, weights=PerTask({"a": 1.0, "b": 0.0, "c": 2.0})))
    compare(got, merged_vector(base, two, Ties(density=0.5, weights=PerTask({"a": 1.0, "c": 2.0}))))


# What is refused.


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (Ties, {"density": PerPattern({"*": 0.5})}, r'`Ties\(density=\.\.\.\)` may vary by pattern only with `trim="tensor"`'),
        (Ties, {"density": PerTask({"a": PerPattern({"*": 0.5})})}, r"`Ties\(density=\.\.\.\)` may vary by pattern only"),
        (Breadcrumbs, {"trim": "vector", "gamma": PerPattern({"*": 0.5})}, r"`Breadcrumbs\(gamma=\.\.\.\)` may vary by pattern"),
        (DareTies, {"density": PerPattern({"*": 0.5})}, r"`DareTies\(density=\.\.\.\)` may vary by pattern only"),
        (Ties, {"density": PerTask({"a": 0.5, "b": 1.5})}, r"`Ties\(density=\.\.\.\)` must be in \(0, 1\]\. Got 1\.5\."),
        (Ties, {"density": (0.5, 0.0)}, r"`Ties\(density=\.\.\.\)` must be in \(0, 1\]\. Got 0\.0\."),
        (DareLinear, {"drop": PerPattern({"*": 1.0})}, r"`DareLinear\(drop=\.\.\.\)` must be in \[0, 1\)\. Got 1\.0\."),
        (Ties, {"weights": PerTask({"a": float("nan")})}, r"`Ties\(weights=\.\.\.\)` must be a finite number, .* Got nan\."),
        (
            Della,
            {"drop": PerTask({"a": 0.5, "b": 0.9}), "epsilon": 0.3},
            r"`Della\(epsilon=\.\.\.\)` must leave drop ± epsilon/2",
        ),
        (Della, {"drop": 0.9, "epsilon": PerPattern({"x": 0.1, "*": 0.3})}, r"at most 0\.2 with drop = 0\.9\. Got 0\.3\."),
        (DareLinear, {"total": PerTask({"a": 1.0})}, r"`DareLinear\(total=\.\.\.\)` must be"),
    ],
)
def test_wrong_values_by_task_and_by_pattern(cls: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**values)


def test_a_pattern_that_fits_nothing_is_told_inside_a_mask_too() -> None:
    base, tuned = models(SHAPES, TASKS)
    with pytest.raises(ThetauError, match=r"layers\.9"):
        merged_vector(base, tuned, DareLinear(drop=PerPattern({"layers.9.*": 0.5, "*": 0.1}), rescale="l1"))


def test_which_numbers_of_two_fields_meet() -> None:
    layers = PerPattern({"x": 0.1, "*": 0.2})
    assert list(pairs(0.5, 0.1)) == [(0.5, 0.1)]
    assert list(pairs(layers, PerPattern({"x": 1.0, "*": 2.0}))) == [(0.1, 1.0), (0.2, 2.0)]
    assert set(pairs(layers, PerPattern({"y": 1.0, "*": 2.0}))) == {(0.1, 1.0), (0.1, 2.0), (0.2, 1.0), (0.2, 2.0)}
    assert set(pairs(PerTask({"a": layers, "b": 0.3}), 1.0)) == {(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)}
    assert set(pairs(PerTask({"a": 0.1, "b": 0.3}), PerTask({"a": 1.0, "b": 2.0}))) == {(0.1, 1.0), (0.3, 2.0)}
    assert list(pairs((0.1, 0.2), (1.0, 2.0))) == [(0.1, 1.0), (0.2, 2.0)]
    assert set(pairs(0.5, (1.0, 2.0))) == {(0.5, 1.0), (0.5, 2.0)}
    assert list(pairs((0.1, 0.2), PerTask({"a": 1.0, "b": 2.0}))) == []
