"""What every method must do, whatever it is: run over the registry, and over variants of its members.

A method that cannot pass one of these says so in `EXEMPT`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import thetau
from synthetic import State, differences, merged, merged_vector, models, relative, vectors_of
from thetau import methods
from thetau.checkpoint.naming import kind_of
from thetau.errors import AlignmentError, RecipeError, ThetauError
from thetau.methods import Awd, Bilateral, DareTies, PerPattern, PerTask, TaskArithmetic, Ties, Wudi
from thetau.parts import Site

STEPS = 8  # of WUDI's Adam: enough to tell, and fast


def quick(method: Any) -> Any:
    """The same with fewer steps."""
    if isinstance(method, Wudi | Awd):
        method = replace(method, steps=STEPS)
    return replace(method, then=quick(method.then)) if isinstance(method, Awd) else method


CLUSTERS = PerTask({"zebra": 1.0, "ape": 0.0, "Cat": 1.0})
VARIANTS: dict[str, Any] = {
    **{name: methods.get(name)() for name in methods.names()},
    "ties-majority": Ties(cancelled="majority", density=0.5),
    "ties-tensor": Ties(trim="tensor"),
    "dare_ties-untrimmed": DareTies(density=1.0, drop=0.5),
    "breadcrumbs-vector": methods.Breadcrumbs(trim="vector", density=0.5, gamma=0.2),
    "localize_stitch-mask": methods.LocalizeStitch(density=0.3, sharing="mask", clusters=CLUSTERS),
    "localize_stitch-twice": methods.LocalizeStitch(density=0.3, sharing="twice", clusters=CLUSTERS, rounding="half_even"),
    "localize_stitch-all": methods.LocalizeStitch(density=1.0, trim="tensor", sharing="mask", clusters=CLUSTERS),
    "wudi-closed_form": Wudi(solver="closed_form"),
    "wudi-gradient_flow": Wudi(solver="gradient_flow"),
    "wudi-all-mean": Wudi(tensors="all", elsewhere="mean"),
    "wudi-split-sum": Wudi(split_fused=True, elsewhere="sum"),
    "wudi-random": Wudi(reference="random", rows=0.5),
    "bilateral-all-mean": Bilateral(tensors="all", elsewhere="mean", solver="flow"),
    "bilateral-split-sum": Bilateral(split_fused=True, elsewhere="sum", rank=0.3, balance="loss"),
    "bilateral-right": Bilateral(p=0.0, start="mean", precondition=True),
    "bilateral-random": Bilateral(reference="random"),
    "tsv_m-linear": methods.TsvM(tensors="linear", split_fused=True, rank=2),
    "awd-tensor": Awd(scope="tensor", tensors=("layers.0.mlp*",)),
    "awd-row": Awd(scope="row", tensors=("layers.0.mlp*",)),
    "awd-adam": Awd(solver="adam", elsewhere="mean"),
    "awd-ties": Awd(then=Ties(), tensors="all"),
    "awd-dare": Awd(then=DareTies(drop=0.5)),
    "awd-wudi": Awd(then=Wudi(solver="gradient_flow")),
}
VARIANTS = {name: quick(method) for name, method in VARIANTS.items()}
EXEMPT: dict[tuple[str, str], str] = {}  # (test, variant): reason
SHAPES = {
    "embeddings.word.weight": (40, 16),
    "layers.0.attn.qkv.weight": (48, 16),
    "layers.0.mlp.fc1.weight": (24, 16),
    "layers.0.norm.weight": (16,),
    "transformer.h.1.attn.c_attn.weight": (16, 48),
    "conv.weight": (4, 3, 2, 2),
    "logit_scale": (),
    "empty": (0, 16),
}
TASKS = ("zebra", "ape", "Cat")  # sorted otherwise than given


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the engine's workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chosen(request: pytest.FixtureRequest) -> Any:
    reason = EXEMPT.get((request.node.originalname.removeprefix("test_"), request.param))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return VARIANTS[request.param]


@pytest.fixture(params=VARIANTS)
def method(request: pytest.FixtureRequest) -> Any:
    """Every method and variant."""
    return chosen(request)


@pytest.fixture(params=[*methods.names(), "wudi-closed_form", "awd-ties"])
def plain_method(request: pytest.FixtureRequest) -> Any:
    """The methods as they are registered, and two variants that take other ways through the engine."""
    return chosen(request)


@pytest.fixture(scope="module")
def small() -> tuple[State, dict[str, State], Callable[[Any], State]]:
    """A base, its models, and what each method makes of them with seed 0, made once."""
    base, tuned = models(SHAPES, TASKS)
    made: dict[str, State] = {}

    def result(method: Any) -> State:
        if repr(method) not in made:
            made[repr(method)] = merged(base, tuned, method)
        return made[repr(method)]

    return base, tuned, result


Small = tuple[State, dict[str, State], Callable[[Any], State]]


def same(got: State, want: State) -> None:
    """Names, dtypes, shapes and bits."""
    assert list(got) == list(want) or sorted(got) == sorted(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


def touched(method: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the method's own selection takes this tensor."""
    selection = method.chain().selection
    taken = selection.takes(name, shape, kind_of(name, shape)) and 0 not in shape
    return taken and (method.chain().access != "stream" or len(shape) >= 2)


# Shapes, dtypes, corner cases.


def test_shapes(method: Any, small: Small) -> None:
    base, _, result = small
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in result(method).items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in base.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(plain_method: Any, dtype: torch.dtype) -> None:
    base, tuned = models(SHAPES, TASKS, dtype=dtype)
    out = merged(base, tuned, plain_method)
    assert sorted(out) == sorted(base)
    for name, shape in SHAPES.items():
        assert tuple(out[name].shape) == shape
        assert out[name].dtype == dtype
        assert bool(out[name].isfinite().all())
    assert any(not torch.equal(out[name], base[name]) for name in base)


def test_dtypes_may_differ(plain_method: Any) -> None:
    """Base and models in three dtypes: differences are taken in float32, and the base's dtype comes out."""
    base, tuned = models(SHAPES, TASKS)
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    kinds = dict(zip(TASKS, (torch.float16, torch.bfloat16, torch.float32), strict=True))
    mixed = {task: {name: t.to(kinds[task]) for name, t in state.items()} for task, state in tuned.items()}
    widened = {task: {name: t.float() for name, t in state.items()} for task, state in mixed.items()}
    out = merged(base, mixed, plain_method)
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    same(out, merged(base, widened, plain_method))


def test_one_task(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS[:1])
    out = merged(base, tuned, plain_method)
    assert all(bool(tensor.isfinite().all()) for tensor in out.values())
    if isinstance(plain_method, Wudi | Bilateral | methods.TsvM):
        for name, shape in SHAPES.items():
            if touched(plain_method, name, shape):
                torch.testing.assert_close(out[name], tuned[TASKS[0]][name], rtol=0, atol=1e-6)


def test_all_zero_vectors_give_the_base(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    same(merged(base, dict.fromkeys(tuned, base), method), base)


def test_one_zero_vector_among_others(plain_method: Any, small: Small) -> None:
    base, tuned, result = small
    out = merged(base, {**tuned, "none": base}, plain_method)
    assert all(bool(tensor.isfinite().all()) for tensor in out.values())
    if isinstance(plain_method, Wudi | Bilateral) and plain_method.elsewhere != "mean":
        for name in base:  # it drops out; in the last bits it can change on which side A is kept
            torch.testing.assert_close(out[name], result(plain_method)[name], rtol=0, atol=1e-5)


def test_a_tensor_that_no_task_changed(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    for state in tuned.values():
        state["layers.0.mlp.fc1.weight"] = base["layers.0.mlp.fc1.weight"].clone()
    out = merged(base, tuned, plain_method)
    assert torch.equal(out["layers.0.mlp.fc1.weight"], base["layers.0.mlp.fc1.weight"])


def test_identical_tasks(plain_method: Any) -> None:
    """Where all agree, a mean gives what they agree on, and so does WUDI's minimum."""
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, dict.fromkeys(TASKS, tuned["ape"]), plain_method)
    assert all(bool(tensor.isfinite().all()) for tensor in out.values())
    if plain_method in (methods.Average(), Wudi(solver="closed_form", steps=STEPS)):
        for name, shape in SHAPES.items():
            if touched(plain_method, name, shape):
                assert relative(out[name] - base[name], tuned["ape"][name] - base[name]) < 1e-3, name


def test_opposed_tasks(plain_method: Any) -> None:
    base, tuned = models(SHAPES, ("a",))
    other = {name: (2 * base[name] - tensor) for name, tensor in tuned["a"].items()}
    out = merged(base, {"a": tuned["a"], "b": other}, plain_method)
    assert all(bool(tensor.isfinite().all()) for tensor in out.values())


# Order, workers, blocks, seeds: the same bits.


def test_order_of_tasks(method: Any, small: Small) -> None:
    base, tuned, result = small
    same(merged(base, {task: tuned[task] for task in ("ape", "Cat", "zebra")}, method), result(method))


def test_order_of_tensors(method: Any, small: Small) -> None:
    base, tuned, result = small
    turned = list(reversed(base))
    shuffled = {
        task: {name: state[name] for name in turned[index:] + turned[:index]} for index, (task, state) in enumerate(tuned.items())
    }
    same(merged({name: base[name] for name in turned}, shuffled, method), result(method))


LARGE = {"layers.0.mlp.fc1.weight": (130, 600), "layers.1.mlp.fc1.bias": (70_000,), "layers.1.mlp.fc1.weight": (40, 50)}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, State], Path]:
    """Tensors of several blocks of 65,536 elements, in memory and as files, bfloat16 and float32 mixed."""
    base, tuned = models(LARGE, TASKS)
    tuned["ape"] = {name: tensor.bfloat16() for name, tensor in tuned["ape"].items()}
    folder = tmp_path_factory.mktemp("large")
    for name, state in {"base": base, **tuned}.items():
        (folder / name).mkdir()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name / "model.safetensors")
    return base, tuned, folder


def test_workers_windows_and_files(method: Any, large: tuple[State, dict[str, State], Path]) -> None:
    base, tuned, folder = large
    want = merged(base, tuned, method, seed=1, engine=thetau.Engine(workers=1))
    for engine in (thetau.Engine(workers=2), thetau.Engine(workers=2, window=1)):
        same(merged(base, tuned, method, seed=1, engine=engine), want)
    opened = thetau.open(str(folder / "base"))
    vectors = [thetau.open(str(folder / task)) - opened for task in TASKS]
    engine = thetau.Engine(workers=2, window=70_000)
    stored = (opened + thetau.merge(vectors, method, names=TASKS, seed=1, engine=engine)).state_dict(engine=engine)
    same(stored, want)


def test_seeds(method: Any, small: Small) -> None:
    base, tuned, result = small
    first = result(method)
    other = merged(base, tuned, method, seed=1)
    randomised = "drop=" in repr(method) or "reference='random'" in repr(method)
    assert randomised == any(not torch.equal(first[name], other[name]) for name in base)


def test_inputs_are_not_changed(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS[:2])
    again, others = models(SHAPES, TASKS[:2])
    for tensor in merged(base, tuned, plain_method).values():  # and nothing of the output is the input
        tensor.fill_(7)
    same(base, again)
    for task, state in tuned.items():
        same(state, others[task])


# Algebra.


def test_doubling(plain_method: Any) -> None:
    """Twice the vectors give twice the result; twice, so that no bit is lost on the way in."""
    base, tuned = models(SHAPES, TASKS)
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    tau = differences(base, tuned)
    once = merged_vector(zero, tau, plain_method)
    if isinstance(plain_method, Awd):
        plain_method = replace(
            plain_method, alpha=plain_method.alpha / 2
        )  # α‖δ‖ beside cosines: α belongs to the scale of the vectors
    twice = merged_vector(zero, {task: {name: 2 * t for name, t in state.items()} for task, state in tau.items()}, plain_method)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-4, atol=1e-6)


def with_scale(method: Any, scale: Any) -> Any:
    if isinstance(method, Awd):
        return replace(method, then=with_scale(method.then, scale))
    return replace(method, scale=scale)


def test_linear_in_scale(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    one = merged_vector(base, tuned, with_scale(plain_method, 1.0))
    got = merged_vector(base, tuned, with_scale(plain_method, -3.0))
    for name, shape in SHAPES.items():
        if touched(plain_method, name, shape) or name in got:  # θ₀ + λ τ_m: what lies outside the selection is scaled too
            torch.testing.assert_close(got[name], -3 * one[name], rtol=1e-5, atol=1e-7)


def test_scale_by_pattern(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    one = merged_vector(base, tuned, with_scale(plain_method, 1.0))
    got = merged_vector(base, tuned, with_scale(plain_method, PerPattern({"layers.0.attn*": 0.5, "*": 2.0})))
    for name, shape in SHAPES.items():
        if touched(plain_method, name, shape):
            factor = 0.5 if name.startswith("layers.0.attn") else 2.0
            torch.testing.assert_close(got[name], factor * one[name], rtol=1e-5, atol=1e-7)
    uncovered = with_scale(plain_method, PerPattern({"layers.1.*": 1.0}))
    with pytest.raises(ThetauError, match=r"layers\.1|no pattern fits"):
        merged_vector(base, tuned, uncovered)


BY_TASK = [TaskArithmetic(), methods.DareLinear(drop=0.5), Awd(then=methods.DareLinear(drop=0.5))]


@pytest.mark.parametrize("method", BY_TASK, ids=repr)
def test_scale_by_task(method: Any) -> None:
    """A sum takes weights by task: by name, or in the order in which the tasks are given."""
    base, tuned = models(SHAPES, TASKS)
    values = dict(zip(TASKS, (0.5, -1.0, 2.0), strict=True))
    total: dict[str, Tensor] = {}
    for task in TASKS:
        one = merged_vector(base, tuned, with_scale(method, PerTask({t: float(t == task) for t in TASKS})))
        total = {name: total.get(name, 0) + values[task] * tensor for name, tensor in one.items()}
    got = merged_vector(base, tuned, with_scale(method, PerTask(values)))
    for name in got:
        torch.testing.assert_close(got[name], total[name], rtol=1e-5, atol=1e-7)
    same(merged_vector(base, tuned, with_scale(method, tuple(values.values()))), got)
    turned = {task: tuned[task] for task in reversed(TASKS)}
    same(merged_vector(base, turned, with_scale(method, tuple(reversed(values.values())))), got)


@pytest.mark.parametrize("method", BY_TASK, ids=repr)
def test_wrong_scales_by_task(method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    with pytest.raises(RecipeError, match="`scale` has 2 values for 3 tasks"):
        merged_vector(base, tuned, with_scale(method, (1.0, 2.0)))
    with pytest.raises(RecipeError, match=r"'aep' is not a task\. Did you mean 'ape'\?"):
        merged_vector(base, tuned, with_scale(method, PerTask({"zebra": 1.0, "aep": 1.0, "Cat": 1.0})))


# Selection.


def test_only_what_is_selected_differs(method: Any, small: Small) -> None:
    base, tuned, result = small
    tau = differences(base, tuned)
    out = result(method)
    elsewhere = method.chain().selection.elsewhere
    for name, shape in SHAPES.items():
        if touched(method, name, shape):
            assert not torch.equal(out[name], base[name]) or out[name].numel() == 1, name  # one entry may be dropped or trimmed
        elif elsewhere == "base" or 0 in shape:
            assert torch.equal(out[name], base[name]), name
        else:
            total = tau["Cat"][name] + tau["ape"][name] + tau["zebra"][name]
            place = Site(name=name, shape=shape, kind=kind_of(name, shape), layer=None, tasks=("Cat", "ape", "zebra"))
            (weight,) = set(method.chain().reduction.weights(place))  # λ counts here too
            want = weight * total / (3 if elsewhere == "mean" else 1)
            torch.testing.assert_close(out[name], base[name] + want, rtol=0, atol=1e-6)


def test_excluded_tensors_stay_and_count_for_nothing(plain_method: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, tuned, plain_method, exclude=["layers.0.mlp*", "logit_scale"])
    assert torch.equal(out["layers.0.mlp.fc1.weight"], base["layers.0.mlp.fc1.weight"])
    assert torch.equal(out["logit_scale"], base["logit_scale"])
    left = [name for name in base if not name.startswith("layers.0.mlp") and name != "logit_scale"]
    small = merged({n: base[n] for n in left}, {t: {n: s[n] for n in left} for t, s in tuned.items()}, plain_method)
    for name in left:
        assert torch.equal(out[name], small[name]), name


@pytest.mark.parametrize("cls", [Wudi, Awd])
def test_tensors_by_pattern(cls: Any) -> None:
    base, tuned = models(SHAPES, TASKS)
    out = merged(base, tuned, quick(cls(tensors=("layers.0.mlp*", "conv.weight"))))
    changed = {name for name in base if not torch.equal(out[name], base[name])}
    assert changed == {"layers.0.mlp.fc1.weight", "conv.weight"}
    with pytest.raises(AlignmentError, match=r"(?s)nothing\.like\.it"):
        merged(base, tuned, cls(tensors=("nothing.like.it",)))


def test_a_vector_without_a_base(plain_method: Any) -> None:
    """Task vectors that were saved on their own merge as the differences do."""
    base, tuned = models(SHAPES, TASKS)
    want = merged_vector(base, tuned, plain_method)
    _, vectors = vectors_of(base, tuned)
    extracted = [vector.state_dict() for vector in vectors]
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    again = merged_vector(zero, dict(zip(TASKS, extracted, strict=True)), plain_method)
    for name in want:
        assert torch.equal(again[name], want[name]), name


def test_every_registered_method_is_covered() -> None:
    assert {type(method) for method in VARIANTS.values()} == {methods.get(name) for name in methods.names()}
    assert all(any(field.name in ("scale", "then") for field in fields(method)) for method in VARIANTS.values())
