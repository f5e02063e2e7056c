"""RegMean and K-FAC against what they minimise, worked out in other ways: stacked least squares, and Kronecker products formed whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from synthetic import relative
from thetau.errors import AlignmentError
from thetau.methods import Esm, Kfac, PerTask, RegMean
from thetau.methods.regmean import solved
from tiny import one_thread as one_thread

TASKS = ("ape", "bee", "cat")
NAME = "layers.0.mlp.fc1.weight"
F32 = torch.finfo(torch.float32).eps


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(base: Tensor, tuned: Sequence[Tensor], method: Any, name: str = NAME, **evidence: Sequence[Tensor]) -> Tensor:
    """One tensor's merged vector."""
    opened = thetau.open({name: base})
    vectors = [thetau.open({name: one}) - opened for one in tuned]
    told = {kind: {task: {name: one} for task, one in zip(TASKS, given, strict=False)} for kind, given in evidence.items()}
    found: Mapping[str, Tensor] = thetau.merge(vectors, method, names=TASKS[: len(tuned)], evidence=told).state_dict()
    return found[name]


def grams(rows: Sequence[Tensor]) -> list[Tensor]:
    return [(one.double().T @ one.double() / len(one)).float() for one in rows]


def case(d_out: int = 5, d_in: int = 7, rows: int = 30, spread: float = 1.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, models, and the inputs of each; the inputs' features differ in size by `spread`."""
    sizes = torch.logspace(0, torch.log10(torch.tensor(spread)).item(), d_in)
    base = normal(0, d_out, d_in)
    tuned = [base + 0.1 * normal(10 + i, d_out, d_in) for i in range(3)]
    inputs = [normal(20 + i, rows, d_in) @ normal(30 + i, d_in, d_in) * sizes for i in range(3)]
    return base, tuned, inputs


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_regmean_at_factor_one_is_lstsq_on_the_stacked_inputs(spread: float) -> None:
    base, tuned, inputs = case(spread=spread)
    left = torch.cat([x.double() / len(x) ** 0.5 for x in inputs])
    right = torch.cat([x.double() @ (w - base).double().T / len(x) ** 0.5 for x, w in zip(inputs, tuned, strict=True)])
    want = torch.linalg.lstsq(left, right).solution.T
    got = merged(base, tuned, RegMean(off_diagonal=1.0), gram=grams(inputs))
    scaled = left / left.norm(dim=0)
    condition = float(torch.linalg.cond(scaled)) ** 2  # of the normal equations, whose Gram matrices are known to ε
    assert relative(got, want.float()) < 7 * F32 * condition


def test_regmean_weighs_tasks_and_scales_off_diagonals() -> None:
    base, tuned, inputs = case()
    c, a = (1.0, 0.5, 2.0), 0.3
    shrunk = [(a * g + (1 - a) * g.diagonal().diag()).double() * w for g, w in zip(grams(inputs), c, strict=True)]
    want = sum((w - base).double() @ g for w, g in zip(tuned, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))  # type: ignore[call-overload,operator,arg-type]
    method = RegMean(off_diagonal=a, coefficients=PerTask(dict(zip(TASKS, c, strict=True))))
    assert relative(merged(base, tuned, method, gram=grams(inputs)), want.float()) < 1e-5
    columns = RegMean(off_diagonal=0.0, scale=0.5)
    squares = torch.stack([g.diagonal() for g in grams(inputs)])
    mean = (torch.stack([w - base for w in tuned]) * squares[:, None]).sum(0) / squares.sum(0)
    assert relative(merged(base, tuned, columns, gram=grams(inputs)), 0.5 * mean) < 1e-5


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.0])
def test_one_task_comes_back_and_equal_grams_give_the_mean(factor: float) -> None:
    base, tuned, inputs = case()
    gram = grams(inputs)[0]
    alone = merged(base, tuned[:1], RegMean(off_diagonal=factor), gram=[gram])
    assert relative(alone, tuned[0] - base) < 1e-4
    mean = torch.stack([w - base for w in tuned]).mean(0)
    assert relative(merged(base, tuned, RegMean(off_diagonal=factor), gram=[gram] * 3), mean) < 1e-4


def test_unseen_directions_stay_the_bases_or_the_mean() -> None:
    """Four rows a task of seven inputs, of which one is never anything but zero."""
    base, tuned, _ = case()
    inputs = [normal(40 + i, 2, 7) * torch.tensor([1.0, 1e3, 1.0, 1e-3, 1.0, 1.0, 0.0]) for i in range(2)]
    seen = torch.linalg.qr(torch.cat(inputs).double().T).Q
    mean = torch.stack([w - base for w in tuned[:2]]).double().mean(0)
    left = torch.cat([x.double() for x in inputs])
    right = torch.cat([x.double() @ (w - base).double().T for x, w in zip(inputs, tuned, strict=False)])
    for unseen, start in (("base", torch.zeros_like(mean)), ("mean", mean)):
        got = merged(base, tuned[:2], RegMean(off_diagonal=1.0, unseen=unseen), gram=grams(inputs)).double()  # type: ignore[arg-type]
        away = got - start
        assert float((away - away @ seen @ seen.T).norm() / mean.norm()) < 1e-4, "no move outside what was seen"
        assert float((left @ got.T - right).norm() / right.norm()) < 1e-3, "each task's outputs on its own inputs"
    dead = merged(base, tuned[:2], RegMean(), gram=grams(inputs))
    assert not dead[:, 6].any(), "nor at any factor for an input that is always zero"
    nothing = merged(base, tuned, RegMean(off_diagonal=1.0), gram=[torch.zeros(7, 7)] * 3)
    assert not nothing.any()
    assert torch.isfinite(solved(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("transformer.h.1.attn.c_attn.weight", (4, 12)), ("conv1.weight", (6, 2, 3, 3)), ("layers.0.attn.in_proj_weight", (12, 4))],
)
def test_transposed_fused_and_unfolded_layers_are_the_linear_layers_that_they_are(name: str, shape: tuple[int, ...]) -> None:
    transposed = name.startswith("transformer")
    tau = [0.1 * normal(i, *shape) for i in range(3)]
    logical = [one.T if transposed else one.flatten(1) for one in tau]
    inputs = [normal(10 + i, 50, logical[0].shape[1]) for i in range(3)]
    plain = merged(torch.zeros_like(logical[0]), logical, RegMean(), gram=grams(inputs))
    got = merged(torch.zeros(shape), tau, RegMean(), name, gram=grams(inputs))
    torch.testing.assert_close(got.T if transposed else got.flatten(1), plain, rtol=1e-5, atol=1e-7)


def test_kfac_with_the_true_factors_of_a_linear_network_is_its_optimum() -> None:
    """y = P_i W x, squared error against each task's own model: the loss is quadratic in W, and the factors are exact."""
    base, tuned, inputs = case()
    outer = [normal(50 + i, 4, 5) for i in range(3)]
    left = torch.cat([torch.kron(x.double() / len(x) ** 0.5, p.double()) for x, p in zip(inputs, outer, strict=True)])
    right = torch.cat(
        [
            (p.double() @ (w - base).double() @ x.double().T / len(x) ** 0.5).T.reshape(-1)
            for x, p, w in zip(inputs, outer, tuned, strict=True)
        ]
    )
    want = torch.linalg.lstsq(left, right[:, None]).solution.reshape(7, 5).T
    factors = {"gram": grams(inputs), "gradients": [p.T @ p for p in outer]}
    got = merged(base, tuned, Kfac(tolerance=1e-8, iterations=400), **factors)
    assert relative(got, want.float()) < 7 * F32 * float(torch.linalg.cond(left)) ** 2
    other = merged(base, tuned, RegMean(off_diagonal=1.0), gram=factors["gram"])
    loss = [float((left @ x.double().T.reshape(-1) - right).square().sum()) for x in (got, other)]
    assert loss[0] < loss[1]


def test_kfac_with_equal_outputs_is_regmean_and_alone_the_task_itself() -> None:
    base, tuned, inputs = case()
    same = [torch.eye(5) * 0.3] * 3
    got = merged(base, tuned, Kfac(tolerance=1e-8, iterations=400), gram=grams(inputs), gradients=same)
    assert relative(got, merged(base, tuned, RegMean(off_diagonal=1.0), gram=grams(inputs))) < 1e-3
    alone = merged(base, tuned[:1], Kfac(), gram=grams(inputs)[:1], gradients=same[:1])
    assert relative(alone, tuned[0] - base) < 4 * F32
    idle = merged(base, tuned, Kfac(), gram=grams(inputs), gradients=[torch.zeros(5, 5)] * 3)
    assert relative(idle, torch.stack([w - base for w in tuned]).mean(0)) < 1e-6


def essential(taus: Sequence[Tensor], inputs: Sequence[Tensor], power: float, spectrum: float) -> Tensor:
    """One matrix of ESM from the examples themselves: decompositions of the outputs' moves, in float64, as the paper's code goes about it."""
    k = len(taus[0]) // len(taus)
    outputs, held, lengths = [], [], []
    for tau, x in zip(taus, inputs, strict=True):
        _, sizes, right = torch.linalg.svd(x.double() @ tau.double().T)
        variances = sizes[:k] ** 2 / (len(x) - 1)
        weights = (variances / variances.mean()) ** spectrum
        weights = weights / weights.mean()
        whole = right @ tau.double()
        lengths.append(whole.norm())
        outputs.append(right[:k].T * weights)
        held.append((whole * lengths[-1] ** power)[:k] * weights[:, None])
    left, right = torch.cat(outputs, 1), torch.cat(held) / torch.stack(lengths).mean() ** power
    columns = right.norm(dim=0)
    right = right * (columns / columns.mean()) ** power
    product = torch.eye(len(left), dtype=torch.float64)
    for matrix in (left, right):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        product = product @ (u @ v) * s.mean()
    return product


@pytest.mark.parametrize(("power", "spectrum"), [(2.0, 0.15), (0.0, 0.15), (2.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("d_out", [6, 12])
def test_esm_is_the_decomposition_of_the_outputs_moves(power: float, spectrum: float, d_out: int) -> None:
    """With more outputs than inputs too, where the inputs' side is decomposed."""
    base, tuned, inputs = case(d_out=d_out, d_in=8)
    taus = [w - base for w in tuned]
    got = merged(base, tuned, Esm(power=power, spectrum=spectrum), gram=grams(inputs))
    torch.testing.assert_close(got, 2 * essential(taus, inputs, power, spectrum).float(), rtol=2e-3, atol=1e-5)


def test_esm_makes_a_matrix_that_is_long_for_its_kind_longer() -> None:
    """Over the blocks: each by the square of its length over the mean length."""
    _, tuned, inputs = case(d_out=6, d_in=8)
    names = ["layers.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight", "layers.0.attn.q_proj.weight"]
    models = [{name: factor * w for name, factor in zip(names, (1.0, 3.0, 5.0), strict=True)} for w in tuned]
    opened = thetau.open({name: torch.zeros(6, 8) for name in names})
    evidence = {"gram": {task: dict.fromkeys(names, one) for task, one in zip(TASKS, grams(inputs), strict=True)}}
    got = thetau.merge([thetau.open(m) - opened for m in models], Esm(), names=TASKS, evidence=evidence).state_dict()
    single = {name: 2 * essential([m[name] for m in models], inputs, 2.0, 0.15) for name in names}
    mean = (single[names[0]].norm() + single[names[1]].norm()) / 2
    for name in names[:2]:
        want = single[name] * (single[name].norm() / mean) ** 2
        torch.testing.assert_close(got[name], want.float(), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(got[names[2]], single[names[2]].float(), rtol=2e-3, atol=1e-4)


def test_esm_with_few_examples_looks_at_what_they_say() -> None:
    """Two examples, five outputs a task: two directions move, the others count nothing; a task that does not move is left out."""
    base, tuned, _ = case(d_out=10, d_in=8)
    few = [normal(70 + i, 2, 8) for i in range(2)]
    got = merged(base, tuned[:2], Esm(power=0.0, spectrum=0.1), gram=grams(few))
    assert int(torch.linalg.matrix_rank(got, rtol=1e-4)) == 4
    still = merged(base, [*tuned[:2], base], Esm(power=0.0), gram=grams([*few, few[0]]))
    assert torch.isfinite(still).all()
    assert still.any()
    assert not merged(base, [base, base], Esm(), gram=grams(few)).any()
    assert not merged(base, tuned[:2], Esm(), gram=[torch.zeros(8, 8)] * 2).any()


def test_bad_evidence_is_refused() -> None:
    base, tuned, inputs = case()
    good = grams(inputs)
    broken = good[0].clone()
    broken[0, 1] = float("nan")
    with pytest.raises(
        AlignmentError, match=r"bee: its evidence `gram` holds NaN or infinite values at 'layers\.0\.mlp\.fc1\.weight'"
    ):
        merged(base, tuned, RegMean(), gram=[good[0], broken, good[2]])
    with pytest.raises(AlignmentError, match="ape: its evidence `gram` has negative squares"):
        merged(base, tuned, RegMean(), gram=[-good[0], *good[1:]])
    with pytest.raises(AlignmentError, match=r"`gram` of cat has shape \[5, 5\] at .* where \[7, 7\] is needed"):
        merged(base, tuned, RegMean(), gram=[*good[:2], torch.eye(5)])
