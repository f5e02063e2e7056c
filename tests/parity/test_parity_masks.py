"""MagMax, consensus, TALL masks, EMR, PCB and Twin: against the public codes' numbers (made by make_masks.py), and dense references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import thetau
from synthetic import merged_vector, models, vectors_of
from thetau.methods import ConsensusTa, ConsensusTies, Emr, MagMax, Pcb, TallMasks, TaskArithmetic, Twin
from tiny import one_thread as one_thread

DATA = Path(__file__).parent / "data" / "masks.safetensors"
SHAPES = {"layer.weight": (30, 20), "other.weight": (12, 12), "layer.bias": (20,), "scale": ()}
TASKS = ("a", "b", "c")
SIZES = [torch.Size(shape).numel() for shape in SHAPES.values()]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    with safe_open(DATA, "pt") as file:
        assert json.loads(file.metadata()["versions"])["fusion-bench"] == "0.2.33"
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping


def split(flat: Tensor) -> dict[str, Tensor]:
    """A whole vector by tensor."""
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, flat.split(SIZES), strict=True)}


def joined(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in SHAPES])


def zero() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def ours(stack: Tensor, method: Any) -> Tensor:
    """The merged vector of exact task vectors."""
    return joined(merged_vector(zero(), dict(zip(TASKS, map(split, stack), strict=True)), method))


def each(stack: Tensor, method: Any) -> Tensor:
    """Each task's output, in the order of the tasks."""
    _, vectors = vectors_of(zero(), dict(zip(TASKS, map(split, stack), strict=True)))
    out = thetau.outputs(vectors, method)
    return torch.stack([joined(out[task].state_dict()) for task in TASKS])


# The public codes' numbers.


def test_magmax_of_fusion_bench(theirs: dict[str, Tensor]) -> None:
    want = torch.cat([theirs[f"magmax/{name}"].reshape(-1) for name in SHAPES])
    assert torch.equal(ours(theirs["vectors"], MagMax(scale=1.0)), want)


def margin(stack: Tensor, merged: Tensor) -> Tensor:
    """How far each entry is from the edge of its TALL mask."""
    return (stack.abs() - 0.4 * (merged - stack).abs()).abs()


@pytest.mark.parametrize("kind", ["task_arithmetic", "ties"])
def test_tall_masks_and_consensus_of_the_authors(kind: Any, theirs: dict[str, Tensor]) -> None:
    """Their difference of models is rounded once more than ours, at the size of the base: within that an entry may lie on either side.

    Their trim keeps one entry more than 20 %.
    """
    ties: Any = {"density": 0.2012, "cancelled": "majority"}
    stack, merged, masks = theirs["vectors"], theirs[f"tall/{kind}/merged"], theirs[f"tall/{kind}/masks"]
    method = TallMasks(vector=kind, **ties)
    torch.testing.assert_close(ours(stack, method), merged, rtol=1e-6, atol=1e-9)
    clear = margin(stack, merged) > 4 * torch.finfo(torch.float32).eps * float(theirs["base"].abs().max())
    clear |= merged == 0  # whatever the mask
    assert clear.float().mean() > 0.98
    got, want = each(stack, method), masks * merged
    torch.testing.assert_close(got[clear], want[clear], rtol=1e-6, atol=1e-9)
    consensus = ConsensusTa(scale=1.0) if kind == "task_arithmetic" else ConsensusTies(scale=1.0, **ties)
    sure = clear.all(0)
    torch.testing.assert_close(ours(stack, consensus)[sure], theirs[f"consensus/{kind}"][sure], rtol=1e-6, atol=1e-9)


def test_emr_of_fusion_bench(theirs: dict[str, Tensor]) -> None:
    stack, unified = theirs["vectors"], theirs["emr/unified"]
    assert torch.equal(ours(stack, Emr()), unified)
    want = theirs["emr/rescalers"][:, None] * theirs["emr/masks"] * unified
    torch.testing.assert_close(each(stack, Emr()), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["products", "raw"])
def test_pcb_of_the_authors(variant: Any, theirs: dict[str, Tensor]) -> None:
    """An entry whose score is the quantile to rounding may be in or out, and its whole value with it."""
    got, want = ours(theirs["vectors"], Pcb(variant=variant, scale=1.0)), theirs[f"pcb/{variant}"]
    apart = (got - want).abs() > 1e-4 * want.abs().max()
    assert int(apart.sum()) <= len(TASKS)
    assert int((want != 0).sum()) > 50


@pytest.mark.parametrize("keep", ["svd", "magnitude"])
def test_twin_of_the_authors(keep: Any, theirs: dict[str, Tensor]) -> None:
    got = each(theirs["vectors"], Twin(keep=keep, density=0.25, part="exclusive"))
    want = torch.stack([theirs[f"twin/{keep}/{task}"] for task in TASKS])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# Dense references, from the formulas.


def stacked(seed: int, tasks: int = 3) -> Tensor:
    base, tuned = models(SHAPES, TASKS[:tasks], seed=seed)
    return torch.stack([joined({name: state[name] - base[name] for name in SHAPES}) for state in tuned.values()])


def clipped(stack: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """τ̂ and n, in float64."""
    ranked = stack.double().abs().sort(1).values
    count = stack.shape[1]
    low, high = ranked[:, int(count * share), None], ranked[:, int(count * (1 - share) - 1), None]
    size = stack.double().abs().clamp(low, high)
    return stack.sign() * size, (size - low) / (high - low)


def pcb(stack: Tensor, variant: str, share: float = 0.05) -> tuple[Tensor, Tensor]:
    """The merged vector with λ = 1, and how far the nearest score is from its task's quantile, as a share of their spread."""
    count = len(stack)
    value, size = clipped(stack, 1e-4 if variant == "raw" else 1e-2)
    signed = stack.sign() * size
    among: dict[str, Callable[[int], Tensor]] = {
        "products": lambda i: sum((signed[i] * signed[j]).tanh() for j in range(count)),  # type: ignore[return-value]
        "sum": lambda i: (stack[i].double() * signed.sum(0)).tanh(),
        "raw": lambda i: (stack[i].double() * stack.double().sum(0)).tanh(),
    }
    score = (count * size.square()).exp() * torch.stack([among[variant](i) for i in range(count)])
    cut = score.sort(1).values[:, int(stack.shape[1] * (1 - share)), None]
    weight = (score.clamp(min=cut) - cut) / (score.max(1, keepdim=True).values - cut)
    near = ((score - cut).abs() / (score.max(1, keepdim=True).values - cut)).masked_fill(score == cut, 1).amin(0)
    return (value * weight).sum(0) / weight.sum(0).clamp(min=1e-12), near


@pytest.mark.parametrize("variant", ["products", "sum", "raw"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pcb_is_the_dense_formula(variant: Any, seed: int) -> None:
    stack = stacked(seed)
    want, near = pcb(stack, variant)
    sure = near > 1e-5  # nearer than that, float32 may put an entry on the other side
    assert sure.float().mean() > 0.99
    torch.testing.assert_close(
        ours(stack, Pcb(variant=variant, scale=1.0))[sure].double(), want[sure], rtol=1e-3, atol=1e-4 * float(want.abs().max())
    )


def test_pcb_by_tensor_is_pcb_of_each_tensor() -> None:
    stack = stacked(2)
    got = split(ours(stack, Pcb(scope="tensor", scale=1.0)))
    for name in ("layer.weight", "other.weight"):
        want, near = pcb(torch.stack([split(row)[name].reshape(-1) for row in stack]), "products")
        sure = near > 1e-5
        torch.testing.assert_close(
            got[name].reshape(-1)[sure].double(), want[sure], rtol=1e-3, atol=1e-4 * float(want.abs().max())
        )


@pytest.mark.parametrize("rule", ["means", "sums", "none"])
def test_emr_is_the_formula(rule: Any) -> None:
    stack = stacked(3).double()
    flag = torch.where(stack.sum(0) > 0, 1.0, -1.0)
    agree = stack * flag > 0
    unified = flag * (stack.abs() * agree).amax(0)
    got = each(stack.float(), Emr(rescale=rule)).double()
    for task in range(3):
        own, masked = split(stack[task].abs()), split((unified * agree[task]).abs())
        if rule == "means":
            ratio = sum(float(x.mean()) for x in own.values()) / sum(float(x.mean()) for x in masked.values())
        else:
            ratio = 1.0 if rule == "none" else float(stack[task].abs().sum() / (unified * agree[task]).abs().sum())
        torch.testing.assert_close(got[task], ratio * agree[task] * unified, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("selectivity", [0.2, 0.6])
def test_consensus_is_the_formula(selectivity: float) -> None:
    stack = stacked(4).double()
    total = stack.sum(0)
    edge = (stack.abs() - selectivity * (total - stack).abs()).abs()
    sure = (edge > 1e-8).all(0)
    masks = stack.abs() > selectivity * (total - stack).abs()
    for least in (0, 1, 2, 3):
        want = 0.3 * total * (masks.sum(0) >= least)
        got = ours(stack.float(), ConsensusTa(selectivity=selectivity, least=least)).double()
        torch.testing.assert_close(got[sure], want[sure], rtol=1e-5, atol=1e-9)


def test_twin_with_every_singular_value_is_the_task_itself() -> None:
    stack = stacked(5)
    for keep in ("svd", "magnitude", "bernoulli"):
        got = each(stack, Twin(then=TaskArithmetic(scale=0.3), keep=keep, density=1.0))
        torch.testing.assert_close(got, stack, rtol=1e-4, atol=1e-7)
