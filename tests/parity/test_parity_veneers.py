"""SVC and LARV, which go over another method: against dense references in float64 numpy, written from the formulas, and their laws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import thetau
from matrices import task_vectors
from synthetic import merged_vector, relative, vectors_of
from thetau import merge
from thetau.engine.executor import Engine
from thetau.engine.merge import Merge
from thetau.methods import Average, Awd, DareTies, Larv, Svc, TaskArithmetic, Ties, TsvM, Wudi
from thetau.methods.reductions import Mean
from thetau.parts import Chain, Method
from tiny import one_thread as one_thread

NAME = "layers.0.mlp.fc1.weight"
SHAPES = [(2, 24, 40), (4, 40, 24), (3, 30, 30), (1, 9, 7)]
State = dict[str, Tensor]


def over(method: Any, vectors: list[Tensor], name: str = NAME) -> Tensor:
    """The merged matrix, through the engine."""
    tuned = {f"t{index}": {name: vector} for index, vector in enumerate(vectors)}
    merged: Tensor = merged_vector({name: torch.zeros_like(vectors[0])}, tuned, method)[name]
    return merged


# SVC.


def calibrated(merged: Tensor, vectors: list[Tensor], alpha: float) -> Tensor:
    u, s, vt = np.linalg.svd(merged.double().numpy(), full_matrices=False)
    out = np.zeros(merged.shape)
    for r in range(len(s)):
        row = u[:, r] @ merged.double().numpy()
        rows = [u[:, r] @ v.double().numpy() for v in vectors]
        counted = [max(alpha, row @ one / (one @ one)) for one in rows]
        out += len(vectors) / sum(counted) * s[r] * np.outer(u[:, r], vt[r])
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
@pytest.mark.parametrize("then", [TaskArithmetic(scale=0.4), TsvM()], ids=repr)
def test_svc_is_the_dense_construction(shape: tuple[int, int, int], alpha: float | None, then: Any) -> None:
    vectors = task_vectors(*shape, rms=1e-2)
    want = calibrated(over(then, vectors), vectors, 1 / len(vectors) if alpha is None else alpha)
    assert relative(over(Svc(then=then, alpha=alpha), vectors), want) < 1e-4


@pytest.mark.parametrize("then", [Ties(density=0.6), DareTies(drop=0.5), Awd()], ids=repr)
def test_svc_counts_the_vectors_as_they_were(then: Any) -> None:
    """Not those that a method's transforms have trimmed, thinned or disentangled."""
    vectors = task_vectors(3, 20, 24, rms=1e-2)
    assert relative(over(Svc(then=then, alpha=0.2), vectors), calibrated(over(then, vectors), vectors, 0.2)) < 1e-4


@pytest.mark.parametrize("scale", [0.26, 0.5, 1.0, 3.0])
def test_svc_gives_equal_vectors_back(scale: float) -> None:
    """K of them, merged at any λ above α / K: each direction is counted λ K times."""
    (vector,) = task_vectors(1, 20, 24, rms=1e-2)
    assert relative(over(Svc(then=TaskArithmetic(scale=scale), alpha=1.0), [vector] * 4), vector) < 1e-5


def test_svc_amplifies_no_more_than_alpha_allows() -> None:
    (vector,) = task_vectors(1, 20, 24, rms=1e-2)
    assert relative(over(Svc(then=TaskArithmetic(scale=0.1), alpha=0.25), [vector]), 0.4 * vector) < 1e-5


def test_svc_does_not_see_a_scale_while_nothing_falls_under_alpha() -> None:
    vectors = [vector.abs() for vector in task_vectors(3, 20, 24, rms=1e-2)]
    first = vectors[0].new_ones(20, 1) @ vectors[0].new_ones(1, 24)  # one direction, and every task goes along it
    vectors = [first * float(vector.mean()) for vector in vectors]
    once, twice = (over(Svc(then=TaskArithmetic(scale=scale), alpha=0.01), vectors) for scale in (0.3, 0.9))
    assert relative(twice, once) < 1e-5


def test_svc_does_not_let_a_task_speak_where_it_says_nothing() -> None:
    """Tasks with rows of their own: each direction is one task's alone, and the other, whose part there is rounding, counts as α."""
    first, second = task_vectors(2, 24, 20, rms=1e-2)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    first, second = turn[:, :12] @ first[:12], turn[:, 12:] @ second[12:]
    first[:, 10:], second[:, :10] = 0, 0
    got = over(Svc(then=TaskArithmetic(scale=0.5), alpha=0.1), [first, second])
    assert relative(got, (first + second) * 0.5 * 2 / 0.6) < 1e-4


def test_svc_sees_a_transposed_matrix_as_it_is_used() -> None:
    """GPT-2 stores `[d_in, d_out]`; rows are the output's."""
    vectors = task_vectors(3, 20, 16, rms=1e-2)
    plain = over(Svc(), vectors)
    turned = over(Svc(), [vector.T.contiguous() for vector in vectors], "transformer.h.0.mlp.c_fc.weight")
    assert relative(turned.T, plain) < 1e-5


def test_svc_splits_what_its_method_splits() -> None:
    vectors = task_vectors(2, 48, 16, rms=1e-2)
    name = "layers.0.attn.qkv.weight"
    got = over(Svc(then=TsvM(split_fused=True)), vectors, name)
    parts = [over(Svc(then=TsvM()), [v[first : first + 16] for v in vectors]) for first in (0, 16, 32)]
    assert relative(got, torch.cat(parts)) < 1e-5
    assert relative(over(Svc(then=TsvM()), vectors, name), got) > 1e-3


def test_svc_leaves_what_is_no_matrix_of_its_choice() -> None:
    vectors = task_vectors(3, 12, 12, rms=1e-2)
    names = ("embeddings.word.weight", NAME)
    tuned = {
        f"t{i}": {**dict.fromkeys(names, v), "layers.0.norm.weight": v[0], "conv.weight": v.reshape(3, 4, 3, 4)}
        for i, v in enumerate(vectors)
    }
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned["t0"].items()}
    plain = merged_vector(base, tuned, TaskArithmetic())
    every, linear = merged_vector(base, tuned, Svc()), merged_vector(base, tuned, Svc(matrices="linear"))
    assert {name for name in base if not torch.equal(every[name], plain[name])} == set(names)
    assert {name for name in base if not torch.equal(linear[name], plain[name])} == {NAME}


# LARV.


def block_models(shapes: dict[str, tuple[int, int]], tasks: int = 3) -> tuple[State, dict[str, State]]:
    """A base, and models whose vectors grow and turn from block to block."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned: dict[str, State] = {f"t{task}": {} for task in range(tasks)}
    for number, (name, shape) in enumerate(shapes.items()):
        for state in tuned.values():
            left, right = (torch.randn(size, 2 + number, generator=generator) for size in shape)
            state[name] = base[name] + 0.02 * left @ right.T + 0.01 * number * base[name]
    return base, tuned


def rank_of(matrix: Tensor) -> float:
    share = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def conflict_of(base: Tensor, delta: Tensor) -> float:
    a, d = base.double(), delta.double()
    left, right = a @ d.T - d @ a.T, a.T @ d - d.T @ a
    return float((left.norm() + right.norm()) / (2 * a.norm() * d.norm()))


def scores(base: State, delta: State, blocks: list[list[str]], eta: float, rho: float) -> list[float]:
    contrast = [np.mean([rank_of(base[n]) / rank_of(delta[n]) for n in names]) for names in blocks]
    conflict = np.array([np.mean([conflict_of(base[n], delta[n]) for n in names]) for names in blocks])
    standard = (conflict - conflict.mean()) / conflict.std()
    return [
        float(e**eta * ((number + 1) / len(blocks)) ** rho / (1 + np.log1p(np.exp(c))))
        for number, (e, c) in enumerate(zip(contrast, standard, strict=True))
    ]


BLOCKS = {
    f"layers.{number}.{part}": shape
    for number in range(3)
    for part, shape in (("attn.q_proj.weight", (16, 16)), ("mlp.fc1.weight", (40, 16)), ("mlp.fc2.weight", (16, 40)))
}
NAMES = [[name for name in BLOCKS if name.startswith(f"layers.{number}.")] for number in range(3)]


@pytest.mark.parametrize(("eta", "rho"), [(1.0, 0.5), (0.5, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("then", [TaskArithmetic(), TsvM(scale=-0.5)], ids=repr)
def test_larv_is_the_dense_construction(eta: float, rho: float, then: Any) -> None:
    base, tuned = block_models(BLOCKS)
    delta = merged_vector(base, tuned, then)
    want = scores(base, delta, NAMES, eta, rho)
    got = merged_vector(base, tuned, Larv(then=then, gate="tanh", eta=eta, rho=rho, gamma=0.7))
    for names, score in zip(NAMES, want, strict=True):
        for name in names:
            assert relative(got[name], (1 + 0.5 * np.tanh(0.7 * (score - 1))) * delta[name].double()) < 1e-5
    tiers = merged_vector(base, tuned, Larv(then=then, eta=eta, rho=rho, tiers=(-1.0, 0.0, 2.0)))
    for place, number in enumerate(np.argsort(want)):
        for name in NAMES[number]:
            assert torch.equal(tiers[name], (-1.0, 0.0, 2.0)[place] * delta[name]), name


def test_larv_gives_a_block_the_same_scale_whatever_stores_it() -> None:
    """Tall and wide matrices go by the smaller side, so that a transposed model has the same scores."""
    base, tuned = block_models(BLOCKS)
    turned = [{name: tensor.T.contiguous() for name, tensor in state.items()} for state in (base, *tuned.values())]
    method = Larv(gate="tanh")
    want = merged_vector(base, tuned, method)
    got = merged_vector(turned[0], dict(zip(tuned, turned[1:], strict=True)), method)
    for name in base:
        assert relative(got[name].T, want[name]) < 1e-6


def test_larv_of_a_vector_along_the_base_finds_neither_contrast_nor_conflict() -> None:
    """Δ ∝ θ₀: e = 1 and c = 0 in every block, so that only the depth is left: g = (ℓ/L)^ρ / (1 + log 2)."""
    base, _ = block_models(BLOCKS)
    tuned = {task: {name: (1 + share) * tensor for name, tensor in base.items()} for task, share in (("a", 0.25), ("b", 0.125))}
    got = merged_vector(base, tuned, Larv(then=Average(), gate="tanh", gamma=1.0))
    for number, names in enumerate(NAMES):
        scale = 1 + 0.5 * np.tanh(((number + 1) / 3) ** 0.5 / (1 + np.log(2)) - 1)
        for name in names:
            assert relative(got[name], scale * 0.1875 * base[name].double()) < 1e-5


def test_larv_scales_all_tensors_of_a_block_and_none_outside() -> None:
    base, tuned = block_models(BLOCKS)
    generator = torch.Generator().manual_seed(9)
    for name in ("layers.0.norm.weight", "layers.2.mlp.fc1.bias", "embeddings.word.weight"):
        base[name] = torch.randn(16, 16, generator=generator) if "word" in name else torch.randn(16, generator=generator)
        for state in tuned.values():
            state[name] = base[name] + torch.randn(base[name].shape, generator=generator)
    for then in (TaskArithmetic(), Wudi(solver="gradient_flow", elsewhere="mean")):
        plain, got = merged_vector(base, tuned, then), merged_vector(base, tuned, Larv(then=then, tiers=(0.25, 0.5, 2.0)))
        assert torch.equal(got["embeddings.word.weight"], plain["embeddings.word.weight"])
        for number, names in enumerate(NAMES):
            others = [name for name in got if name.startswith(f"layers.{number}.")]
            found = {round(float(got[name].norm() / plain[name].norm()), 4) for name in others}
            assert len(others) >= len(names) and len(found) == 1 and found <= {0.25, 0.5, 2.0}


def test_larv_counts_depth_in_each_tower() -> None:
    shapes = {f"{tower}.layers.{number}.mlp.fc1.weight": (16, 12) for tower in ("text", "vision") for number in range(2)}
    base, _ = block_models(shapes)
    tuned = {"a": {name: 1.25 * tensor for name, tensor in base.items()}}
    got = merged_vector(base, tuned, Larv(then=Average(), gate="tanh"))
    first, last = (
        got[f"text.layers.{number}.mlp.fc1.weight"].norm() / base[f"text.layers.{number}.mlp.fc1.weight"].norm()
        for number in (0, 1)
    )
    assert first < last
    for number, want in ((0, first), (1, last)):
        name = f"vision.layers.{number}.mlp.fc1.weight"
        torch.testing.assert_close(got[name].norm() / base[name].norm(), want, rtol=1e-5, atol=0)


def test_larv_says_what_it_did() -> None:
    base, tuned = block_models(BLOCKS)
    _, vectors = vectors_of(base, tuned)
    merged: Any = merge(vectors, Larv(), names=list(tuned))
    merged.state_dict(engine=Engine(workers=1))
    (source,) = merged.sources()
    assert any(note.startswith("larv: scales of 3 blocks from 0.500 (layers.") for note in source.notes)


# Over methods that work on models, over one another, and with AWD.


@dataclass(frozen=True, kw_only=True)
class ModelMean(Method):
    """The mean of the models themselves."""

    def chain(self) -> Chain:
        return Chain(reduction=Mean(), models=True)


@pytest.mark.parametrize("outer", [Svc, Larv])
def test_over_a_method_on_models_the_base_is_taken_off_and_put_back(outer: Any) -> None:
    """Else it is what it is over the same method on vectors, to the rounding of the base's entries."""
    base, tuned = block_models(BLOCKS)
    _, vectors = vectors_of(base, tuned)

    def through(method: Method) -> State:
        merged = Merge(dict(zip(tuned, vectors, strict=True)), method.chain(), label="mean")
        under = ((-1.0, merged.reference),) if merged.degree else ()  # what a merge of models gives is a model
        return thetau.Expression(((1.0, merged), *under), reference=merged.reference).state_dict()

    got, want = through(outer(then=ModelMean())), through(outer(then=Average()))
    plain = through(Average())
    assert all(relative(got[name], want[name]) < 1e-4 for name in base)
    assert any(relative(got[name], plain[name]) > 1e-3 for name in base)


@pytest.mark.parametrize("order", [(Svc, Larv), (Larv, Svc)])
def test_one_over_the_other_is_one_after_the_other(order: tuple[Any, Any]) -> None:
    outer, inner = order
    chain: Chain = outer(then=inner(then=TsvM())).chain()
    assert [type(stage).__name__ for stage in chain.post][-2:] == [
        {Svc: "Calibrate", Larv: "Rescale"}[one] for one in (inner, outer)
    ]
    base, tuned = block_models(BLOCKS)
    once, twice = merged_vector(base, tuned, inner(then=TsvM())), merged_vector(base, tuned, outer(then=inner(then=TsvM())))
    assert any(not torch.equal(once[name], twice[name]) for name in base)


def test_svc_undoes_what_larv_scaled() -> None:
    """While nothing falls under α, a factor by tensor does not matter to it."""
    base, tuned = block_models({name: shape for name, shape in BLOCKS.items() if "fc1" in name}, tasks=1)
    got = merged_vector(base, tuned, Svc(then=Larv(then=Average()), alpha=0.1))
    want = merged_vector(base, tuned, Average())
    for name in base:
        assert relative(got[name], want[name]) < 1e-4


@pytest.mark.parametrize(
    "method",
    [
        Awd(then=Svc(then=Ties())),
        Awd(then=Svc(then=Wudi(solver="gradient_flow"))),
        Awd(then=Larv(then=Svc(then=Wudi(solver="gradient_flow")))),
        Svc(then=Awd(then=TsvM())),
        Larv(then=Awd(then=DareTies(drop=0.5))),
    ],
    ids=repr,
)
def test_awd_goes_with_both(method: Method) -> None:
    base, tuned = block_models(BLOCKS)
    assert all(bool(tensor.isfinite().all()) for tensor in merged_vector(base, tuned, method).values())


def test_awd_still_sees_a_changed_selection_inside() -> None:
    with pytest.raises(ValueError, match=r"`Awd\(then=\.\.\.\)` must leave `tensors` to awd"):
        Awd(then=Svc(then=Wudi(tensors="all")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Svc(alpha=0.0), r"`Svc\(alpha=\.\.\.\)` must be in \(0, 1\], or None for 1/K\. Got 0\.0\."),
        (lambda: Larv(tiers=()), r"`Larv\(tiers=\.\.\.\)` must be one or more finite numbers\. Got \(\)\."),
        (lambda: Larv(tiers=(1.0, float("nan"))), r"`Larv\(tiers=\.\.\.\)` must be one or more finite numbers\."),
        (lambda: Larv(gamma=0.0), r"`Larv\(gamma=\.\.\.\)` must be a positive number\. Got 0\.0\."),
    ],
)
def test_fields_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_are_counted() -> None:
    """A decomposition and K products over what the method itself takes; for LARV a first walk with three products and two spectra."""
    stage = Svc(then=TsvM()).chain().post[-1]
    assert stage.cost((768, 768), 8).flops > 8 * 2 * 768**3
    assert stage.cost((768,), 8).flops == 0
    rescale = Larv().chain().post[-1]
    assert rescale.solving(8, [768**2]).flops > 6 * 768**3
    statistic = rescale.requires()
    assert statistic is not None
    assert statistic.memory(8, 768**2) > 8 * 3 * 768**2
