"""The parts of a method as the engine drives them: whole stacks, post-stages, several outputs, evidence, wrong parts, and their plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import thetau
from commands import run
from fixtures import load_folder
from synthetic import models
from thetau.checkpoint.naming import kind_of
from thetau.engine import kernels
from thetau.engine.executor import Engine
from thetau.engine.planning import plan
from thetau.errors import AlignmentError, PartError, RecipeError, ThetauError
from thetau.methods.reductions import Mean, Scale, Sum
from thetau.parts import (
    BlockReduction,
    Chain,
    Cost,
    Emit,
    Method,
    PerPattern,
    PerTask,
    PostStage,
    Reduction,
    Selection,
    Statistic,
    StreamReduction,
    Transform,
    WholeReduction,
)
from thetau.statistics.norms import SquaredNorms
from thetau.transforms import Trim

SHAPES = {
    "embed.weight": (40, 12),
    "h.0.attn.c_attn.weight": (12, 36),  # GPT-2: transposed and fused
    "layers.0.attn.in_proj_weight": (36, 12),
    "layers.0.mlp.up_proj.weight": (48, 12),
    "layers.1.mlp.up_proj.weight": (48, 12),
    "layers.0.norm.weight": (12,),
    "logit_scale": (),
}
TASKS = ("ape", "bee", "cat")


def made(build: Callable[[], Chain]) -> Method:
    """A method that is whatever chain it is given."""

    @dataclass(frozen=True, kw_only=True)
    class Made(Method):
        def chain(self) -> Chain:
            return build()

    return Made()


@dataclass(frozen=True, kw_only=True)
class RankOne(WholeReduction):
    """The best approximation of rank one of the sum: needs all of a matrix."""

    def reduce(self, stack: Tensor, state: object, site: object) -> Tensor:
        total = stack.sum(0)
        if total.ndim != 2:
            return total
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        return s[0] * u[:, :1] @ v[:1]

    def cost(self, shape: tuple[int, ...], tasks: int) -> Cost:
        return Cost(flops=1e3, memory=1000)


@dataclass(frozen=True, kw_only=True)
class NormLikeTasks(PostStage):
    """Scales the merged vector to the mean length of the tasks', from a statistic of both."""

    def requires(self) -> Statistic:
        return SquaredNorms()

    def prepare(self, result: Tensor, tasks: tuple[str, ...]) -> float:
        lengths = result.sqrt()
        return float(lengths[1:].mean() / lengths[0])

    def adjust(self, merged: Tensor, stack: Tensor | None, state: float, site: object) -> Tensor:
        return merged * state


@dataclass(frozen=True, kw_only=True)
class ClipToTasks(PostStage):
    """No entry is larger than the largest of the tasks': sees the stack."""

    reads_stack: ClassVar[bool] = True

    def adjust(self, merged: Tensor, stack: Tensor | None, state: object, site: object) -> Tensor:
        assert stack is not None
        bound = stack.abs().amax(0)
        return merged.clamp(-bound, bound)


@dataclass(frozen=True, kw_only=True)
class ModelAndMasks(Emit):
    """The merged vector, and where each task agrees with its sign."""

    def names(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return ("merged", *(f"mask of {task}" for task in tasks))

    def emit(self, name: str, merged: Tensor | None, stack: Tensor, state: object, site: Any) -> Tensor:
        assert merged is not None
        if name == "merged":
            return merged
        return (stack[site.tasks.index(name.removeprefix("mask of "))] * merged > 0).to(merged.dtype)


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    return models(SHAPES, TASKS)


def opened(weights: Any) -> tuple[Any, list[Any]]:
    base = thetau.open(weights[0], name="base")
    return base, [thetau.open(state, name=task) - base for task, state in weights[1].items()]


def deltas(weights: Any, name: str) -> Tensor:
    return torch.stack([weights[1][task][name] - weights[0][name] for task in TASKS])


def merged(weights: Any, chain: Callable[[], Chain], engine: Engine | None = None, **options: Any) -> dict[str, Tensor]:
    _, vectors = opened(weights)
    return thetau.merge(vectors, made(chain), engine=engine, **options).state_dict(engine=engine)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Whole stacks.


def test_a_whole_reduction_gets_logical_matrices(weights: Any) -> None:
    got = merged(weights, lambda: Chain(reduction=RankOne(), split_fused=True))
    for name in SHAPES:
        total = deltas(weights, name).sum(0)
        logical = total.T if name.startswith("h.0") else total
        parts = logical.chunk(3) if "attn" in name else (logical,)
        if total.ndim == 2:
            one = [torch.linalg.svd(part, full_matrices=False) for part in parts]
            logical = torch.cat([s[0] * u[:, :1] @ v[:1] for u, s, v in one])
        close(got[name], logical.T if name.startswith("h.0") else logical)


def test_a_whole_reduction_gives_the_same_bits_from_any_number_of_workers(weights: Any) -> None:
    chain = lambda: Chain(transforms=(Trim(density=0.5),), reduction=RankOne(), post=(Scale(scale=0.5),))  # noqa: E731
    one = merged(weights, chain, Engine(workers=1))
    other = merged(weights, chain, Engine(workers=3, window=7))
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_the_plan_knows_what_a_whole_stack_takes(weights: Any) -> None:
    base, vectors = opened(weights)
    planned = plan(base + thetau.merge(vectors, made(lambda: Chain(reduction=RankOne()))), engine=Engine(workers=1))
    steps = {step.name: step for step in planned.passes[-1].steps}
    name = "layers.0.mlp.up_proj.weight"
    assert steps[name].memory >= 4 * len(TASKS) * 48 * 12 + 1000  # the stack in float32, and what the part says
    assert steps[name].flops == 1e3
    assert planned.flops == len(SHAPES) * 1e3


@dataclass(frozen=True, kw_only=True)
class HalveLargest(Transform):
    """Halves each task's largest entry of a tensor: a transform that must see all of it."""

    access: ClassVar[Any] = "whole"

    def apply(self, stack: Tensor, state: object, site: object) -> Tensor:
        size = stack.abs().reshape(len(stack), -1).amax(1).reshape(-1, *[1] * (stack.ndim - 1))
        return torch.where(stack.abs() == size, stack / 2, stack)


def test_a_whole_transform_before_an_elementwise_reduction(weights: Any) -> None:
    got = merged(weights, lambda: Chain(transforms=(HalveLargest(),), reduction=Mean()), Engine(workers=2, window=3))
    for name in SHAPES:
        stack = deltas(weights, name)
        for row in stack.reshape(len(TASKS), -1):
            row[row.abs().argmax()] /= 2
        close(got[name], stack.mean(0))


# Stages after the reduction.


@pytest.mark.parametrize("reduction", [Mean(), RankOne()])
def test_a_post_stage_with_a_statistic_of_the_merged_vector_and_the_stack(weights: Any, reduction: Reduction) -> None:
    plain = merged(weights, lambda: Chain(reduction=reduction))
    got = merged(weights, lambda: Chain(reduction=reduction, post=(NormLikeTasks(), Scale(scale=2.0))))
    lengths = torch.stack([torch.cat([deltas(weights, name)[i].reshape(-1) for name in SHAPES]).norm() for i in range(3)])
    length = torch.cat([plain[name].reshape(-1) for name in SHAPES]).norm()
    for name in SHAPES:
        close(got[name], 2 * plain[name] * lengths.mean() / length)


@pytest.mark.parametrize("reduction", [Sum(), RankOne()])
def test_a_post_stage_that_sees_the_stack(weights: Any, reduction: Reduction) -> None:
    plain = merged(weights, lambda: Chain(reduction=reduction))
    got = merged(weights, lambda: Chain(reduction=reduction, post=(ClipToTasks(),)))
    for name in SHAPES:
        bound = deltas(weights, name).abs().amax(0)
        close(got[name], plain[name].clamp(-bound, bound))


def test_a_stream_is_fed_from_the_stack_where_a_later_stage_reads_it(weights: Any) -> None:
    method = thetau.methods.Wudi(solver="gradient_flow", tensors="matrices")
    plain = merged(weights, method.chain)

    def clipped() -> Chain:
        chain = method.chain()
        return Chain(reduction=chain.reduction, post=(*chain.post, ClipToTasks()), selection=chain.selection)

    got = merged(weights, clipped)
    for name in plain:
        bound = deltas(weights, name).abs().amax(0)
        close(got[name], plain[name].clamp(-bound, bound))


def test_scale_means_theta_plus_lambda_tau_everywhere(weights: Any) -> None:
    """λ in `merge` and λ in `tune` are one thing: also outside the selection."""
    _, vectors = opened(weights)
    one, half = (
        thetau.merge(vectors, thetau.methods.TsvM(scale=scale, tensors="linear", elsewhere="mean")).state_dict()
        for scale in (1.0, 0.5)
    )
    for name in SHAPES:
        close(half[name], 0.5 * one[name])
    close(half["embed.weight"], 0.5 * deltas(weights, "embed.weight").mean(0))


# Several outputs.


@pytest.mark.parametrize("reduction", [Mean(), RankOne()])
def test_several_named_outputs(weights: Any, reduction: Reduction, tmp_path: Path) -> None:
    base, vectors = opened(weights)
    emitted = thetau.outputs(vectors, made(lambda: Chain(reduction=reduction, emit=ModelAndMasks())))
    assert list(emitted) == ["merged", "mask of ape", "mask of bee", "mask of cat"]
    plain = merged(weights, lambda: Chain(reduction=reduction))
    (base + emitted["merged"]).save(tmp_path / "model")
    written = load_folder(tmp_path / "model")
    mask = emitted["mask of bee"].state_dict()
    for name in SHAPES:
        close(written[name], weights[0][name] + plain[name])
        assert torch.equal(mask[name], (deltas(weights, name)[1] * plain[name] > 0).float())


def test_outputs_of_a_method_that_has_one_are_its_tasks(weights: Any) -> None:
    _, vectors = opened(weights)
    emitted = thetau.outputs(vectors, thetau.methods.Awd(tensors="all"))
    same = thetau.transform(vectors, thetau.methods.Awd(tensors="all"))
    assert list(emitted) == list(TASKS)
    for one, other in zip(emitted.values(), same, strict=True):
        a, b = one.state_dict(), other.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in SHAPES)


# Models, not task vectors.


@dataclass(frozen=True, kw_only=True)
class GeometricMean(BlockReduction):
    """Means something of weights only: the geometric mean of their magnitudes, with the first one's sign."""

    def reduce(self, stack: Tensor, state: object, site: object) -> Tensor:
        return stack[0].sign() * stack.abs().log().mean(0).exp()


def test_a_chain_over_models_gets_the_weights_themselves(weights: Any) -> None:
    base, vectors = opened(weights)
    got = (base + thetau.merge(vectors, made(lambda: Chain(reduction=GeometricMean(), models=True)))).state_dict()
    for name in SHAPES:
        stack = torch.stack([weights[1][task][name] for task in TASKS])
        close(got[name], stack[0].sign() * stack.abs().log().mean(0).exp())


@pytest.mark.parametrize("reduction", [GeometricMean(), RankOne()])
def test_stages_and_outputs_of_a_chain_over_models_see_models(weights: Any, reduction: Reduction) -> None:
    """Post-stages, their statistics and what is emitted: all on the scale of weights, and θ₀ is taken off once at the end."""
    base, vectors = opened(weights)
    stacks = {name: torch.stack([weights[1][task][name] for task in TASKS]) for name in SHAPES}
    plain = (base + thetau.merge(vectors, made(lambda: Chain(reduction=reduction, models=True)))).state_dict()
    got = (
        base + thetau.merge(vectors, made(lambda: Chain(reduction=reduction, post=(NormLikeTasks(),), models=True)))
    ).state_dict()
    lengths = torch.stack([torch.cat([stacks[name][i].reshape(-1) for name in SHAPES]).norm() for i in range(3)])
    length = torch.cat([plain[name].reshape(-1) for name in SHAPES]).norm()
    emitted = thetau.outputs(vectors, made(lambda: Chain(reduction=reduction, models=True)))
    for name in SHAPES:
        torch.testing.assert_close(got[name], plain[name] * lengths.mean() / length, rtol=1e-4, atol=1e-5)
    for task, output in emitted.items():
        state = (base + output).state_dict()
        assert all(torch.allclose(state[name], weights[1][task][name], atol=1e-6) for name in SHAPES)


def test_a_chain_over_models_can_have_the_base_among_them(weights: Any, tmp_path: Path) -> None:
    """Weights by identity show who stands where; the compiled loop gives the bits that torch gives, and a stranger is noticed."""
    base, vectors = opened(weights)
    share = PerTask({"": 0.5, TASKS[0]: 0.25, TASKS[1]: 0.25})
    method = made(lambda: Chain(reduction=Sum(scale=share), models=True, with_base=True))
    expression = base + thetau.merge(vectors[:2], method)
    got = expression.state_dict()
    for name in SHAPES:
        want = 0.5 * weights[0][name] + 0.25 * weights[1][TASKS[0]][name] + 0.25 * weights[1][TASKS[1]][name]
        close(got[name], want)
    save_file(weights[0], tmp_path / "base.safetensors")
    for task in TASKS[:2]:
        save_file(weights[1][task], tmp_path / f"{task}.safetensors")
    stored = thetau.open(tmp_path / "base.safetensors")
    models = [thetau.open(tmp_path / f"{task}.safetensors", name=task) for task in TASKS[:2]]
    merged = stored + thetau.merge([model - stored for model in models], method)
    assert {step.by for step in plan(merged, engine=Engine()).passes[-1].steps} == (
        {"loop"} if kernels.available() else {"torch"}
    )
    merged.save(tmp_path / "out.safetensors")
    written = thetau.open(tmp_path / "out.safetensors").state_dict()
    assert all(torch.equal(written[name], got[name]) for name in SHAPES)
    generator = torch.Generator().manual_seed(5)
    stranger = thetau.open({name: torch.randn(t.shape, generator=generator) for name, t in weights[0].items()}, name=TASKS[1])
    with pytest.warns(thetau.ThetauWarning, match=f"{TASKS[1]}: lies .* of its norm away from .* They are probably not related"):
        (stored + thetau.merge([models[0] - stored, stranger - stored], method)).state_dict()


def test_a_chain_over_models_leaves_the_rest_to_the_base_or_to_their_mean(weights: Any) -> None:
    base, vectors = opened(weights)
    for elsewhere in ("base", "mean"):
        selection = Selection(tensors="linear", elsewhere=elsewhere)
        state = (
            base + thetau.merge(vectors, made(lambda s=selection: Chain(reduction=GeometricMean(), models=True, selection=s)))
        ).state_dict()
        outside = [name for name, shape in SHAPES.items() if not selection.takes(name, shape, kind_of(name, shape))]
        assert outside
        for name in outside:
            mean = torch.stack([weights[1][task][name] for task in TASKS]).mean(0)
            close(state[name], weights[0][name] if elsewhere == "base" else mean)
    with pytest.raises(TypeError, match="has no sum of models elsewhere"):
        Chain(reduction=GeometricMean(), models=True, selection=Selection(elsewhere="sum"))
    with pytest.raises(TypeError, match="needs `models=True`"):
        Chain(reduction=GeometricMean(), with_base=True)


def test_a_method_says_how_many_it_takes(weights: Any) -> None:
    _, vectors = opened(weights)

    class Pair(Method):
        takes = (2, 2)

        def chain(self) -> Chain:
            return Chain(reduction=GeometricMean(), models=True)

    with pytest.raises(RecipeError, match=r"Pair takes 2 models\. Got 3\."):
        thetau.merge(vectors, Pair())


def test_a_chain_over_models_needs_the_base(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    vectors[0].save(tmp_path / "ape.safetensors")
    saved = thetau.open(tmp_path / "ape.safetensors")
    with pytest.raises(AlignmentError, match="needs the base's own weights"):
        thetau.merge([saved], made(lambda: Chain(reduction=GeometricMean(), models=True)))


# Evidence.


def fishers(weights: Any, folder: Path, tasks: tuple[str, ...] = TASKS, **changes: Tensor) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    folder.mkdir(exist_ok=True)
    for task in tasks:
        values = {name: torch.rand(shape, generator=generator) ** 4 for name, shape in SHAPES.items() if name != "logit_scale"}
        save_file(
            {**values, **changes},
            folder / f"{task}.safetensors",
            metadata={"thetau.kind": "evidence", "thetau.evidence": "fisher"},
        )
        found[task] = folder / f"{task}.safetensors"
    return found


def test_fisher_is_the_weighted_mean(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    files = fishers(weights, tmp_path / "f")
    method = thetau.methods.Fisher(normalise=True, floor=0.0, coefficients=PerTask({"ape": 1.0, "bee": 2.0, "cat": 0.5}))
    for engine in (Engine(workers=1), Engine(workers=2, window=5)):
        got = thetau.merge(vectors, method, evidence={"fisher": files}, engine=engine).state_dict(engine=engine)
        given = {task: thetau.open(path).state_dict() for task, path in files.items()}
        for name in SHAPES:
            stack = deltas(weights, name)
            if name == "logit_scale":  # nothing is known of it: averaged, as `elsewhere` says
                close(got[name], stack.mean(0))
                continue
            norms = [torch.cat([one.reshape(-1) for one in given[task].values()]).double().norm() for task in TASKS]
            w = torch.stack([c * given[t][name].double() / n for t, n, c in zip(TASKS, norms, (1.0, 2.0, 0.5), strict=True)])
            close(got[name], ((w * stack).sum(0) / w.sum(0)).float())


def test_equal_fishers_give_the_mean_and_order_does_not_matter(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    files = fishers(weights, tmp_path / "f")
    same = dict.fromkeys(TASKS, files["ape"])
    mean = thetau.merge(vectors, thetau.methods.Average()).state_dict()
    got = thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": same}).state_dict()
    turned = thetau.merge(vectors[::-1], thetau.methods.Fisher(), evidence={"fisher": files}).state_dict()
    straight = thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": files}).state_dict()
    for name in SHAPES:
        close(got[name], mean[name])
        assert torch.equal(turned[name], straight[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, RecipeError, "needs the evidence `fisher`"),
        ({"fisher": ("ape", "bee")}, RecipeError, "fisher: none for the task 'cat'"),
        ({"fisher": (*TASKS, "dog")}, RecipeError, "fisher: 'dog' is not a task"),
        ({"fisher": TASKS, "gram": TASKS}, RecipeError, "no part needs the evidence `gram`"),
    ],
)
def test_evidence_that_does_not_fit_the_tasks(weights: Any, tmp_path: Path, change: Any, error: type, message: str) -> None:
    _, vectors = opened(weights)
    files = fishers(weights, tmp_path / "f", (*TASKS, "dog"))
    evidence = {kind: {task: files[task] for task in tasks} for kind, tasks in change.items()}
    with pytest.raises(error, match=message):
        thetau.merge(vectors, thetau.methods.Fisher(), evidence=evidence)


def test_evidence_of_another_shape_or_of_unknown_tensors_is_refused(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    wrong = fishers(weights, tmp_path / "wrong", **{"embed.weight": torch.ones(41, 12)})
    with pytest.raises(AlignmentError, match=r"wrong/ape\.safetensors.*fisher.*ape.*\[41, 12\].*'embed\.weight'.*\[40, 12\]"):
        thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": wrong})
    extra = fishers(weights, tmp_path / "extra", **{"other.weight": torch.ones(3)})
    with pytest.raises(AlignmentError, match=r"other\.weight"):
        thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": extra})


def test_a_fisher_of_zeros_and_a_negative_one_are_refused(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    files = fishers(weights, tmp_path / "f")
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items() if name != "logit_scale"}
    nothing = fishers(weights, tmp_path / "zero", ("bee",), **zeros)
    with pytest.raises(AlignmentError, match="bee: its Fisher information is zero everywhere"):
        thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": {**files, **nothing}}).state_dict()
    below = fishers(weights, tmp_path / "below", ("bee",), **{"embed.weight": -torch.ones(40, 12)})
    with pytest.raises(AlignmentError, match=r"'embed\.weight': its Fisher information is negative"):
        thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": {**files, **below}}).state_dict()


def test_evidence_of_another_model_is_said_and_only_that(weights: Any, tmp_path: Path) -> None:
    for name, state in {"base": weights[0], **weights[1]}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    base = thetau.open(tmp_path / "base.safetensors")
    models_of = {task: thetau.open(tmp_path / f"{task}.safetensors", name=task) for task in TASKS}
    prints = {task: model.terms[0][1].fingerprint() for task, model in models_of.items()}
    values = {name: torch.ones(shape) for name, shape in SHAPES.items()}

    def collected(task: str, of: str) -> Path:
        facts = {"thetau.kind": "evidence", "thetau.base": "what its encoder held", "thetau.weights": prints[of]}
        save_file(values, tmp_path / f"{task}-of-{of}.safetensors", metadata=facts)
        return tmp_path / f"{task}-of-{of}.safetensors"

    def save(evidence: dict[str, Path], out: str) -> Any:
        vectors = [model - base for model in models_of.values()]
        return (base + thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": evidence})).save(tmp_path / out)

    assert save({task: collected(task, task) for task in TASKS}, "right").warnings == ()  # a warning would be an error here
    wrong = {"ape": collected("ape", "ape"), "bee": collected("bee", "cat"), "cat": collected("cat", "cat")}
    with pytest.warns(thetau.ThetauWarning, match="evidence `fisher` of bee was collected from another model"):
        assert len(save(wrong, "wrong").warnings) == 1


def test_evidence_is_no_task_vector(weights: Any, tmp_path: Path) -> None:
    _, vectors = opened(weights)
    files = fishers(weights, tmp_path / "f")
    base, _ = opened(weights)
    fisher = thetau.open(files["ape"])
    for use in (
        lambda: thetau.merge([*vectors, fisher], thetau.methods.Average()),
        lambda: base + fisher,
        lambda: fisher - base,
        lambda: vectors[0] + 0.5 * fisher,
        lambda: vectors[0].cosine(fisher),
        lambda: fisher.norm(),
        lambda: thetau.gram([fisher, *vectors]),
    ):
        with pytest.raises(AlignmentError, match=r"ape\.safetensors: is evidence, not a task vector"):
            use()
    assert set(fisher.state_dict()) == set(SHAPES) - {"logit_scale"}  # it can be read


def test_evidence_in_a_recipe_and_made_again(weights: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state in {"base": weights[0], **weights[1]}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    fishers(weights, tmp_path / "f")
    lines = "\n".join(f"    {task}: f/{task}.safetensors" for task in TASKS)
    recipe = f"base: base\nmodels: [ape, bee, cat]\nmethod: fisher\nevidence:\n  fisher:\n{lines}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert run(capsys, "merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--quiet")[0] == 0
    given = [f"--evidence=fisher:{task}={tmp_path / 'f' / task}.safetensors" for task in TASKS]
    named = [argument for task in TASKS for argument in ("-m", str(tmp_path / task))]
    assert (
        run(
            capsys,
            "merge",
            "--method",
            "fisher",
            "-b",
            str(tmp_path / "base"),
            *named,
            *given,
            "-o",
            str(tmp_path / "other"),
            "--quiet",
        )[0]
        == 0
    )
    first, second = load_folder(tmp_path / "out"), load_folder(tmp_path / "other")
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert thetau.verify(tmp_path / "out", again=True).good


def test_fields_by_task_and_by_pattern_at_once(weights: Any) -> None:
    _, vectors = opened(weights)
    scale = PerTask({"ape": PerPattern({"layers.*": 0.25, "*": 1.0}), "bee": 0.5, "cat": PerPattern({"*": -1.0})})
    got = thetau.merge(vectors, thetau.methods.TaskArithmetic(scale=scale)).state_dict()
    for name in SHAPES:
        factors = torch.tensor([0.25 if name.startswith("layers.") else 1.0, 0.5, -1.0])
        close(got[name], torch.einsum("k,k...->...", factors, deltas(weights, name)))


# Wrong parts.


@dataclass(frozen=True, kw_only=True)
class WrongShape(Transform):
    def apply(self, stack: Tensor, state: object, site: object) -> Tensor:
        return stack[:1]


@dataclass(frozen=True, kw_only=True)
class Breaks(BlockReduction):
    def reduce(self, stack: Tensor, state: object, site: object) -> Tensor:
        raise ZeroDivisionError("no tasks left")


def test_a_part_of_wrong_shape_is_named_with_the_tensor(weights: Any) -> None:
    with pytest.raises(PartError, match=r"WrongShape gave shape \[1, .*\] at '.*', where \[3, .*\] is due"):
        merged(weights, lambda: Chain(transforms=(WrongShape(),), reduction=Mean()))


def test_a_part_that_fails_is_named_with_the_tensor(weights: Any) -> None:
    with pytest.raises(PartError, match=r"Breaks failed at '.*': ZeroDivisionError: no tasks left"):
        merged(weights, lambda: Chain(reduction=Breaks()))


def test_a_reduction_without_cost_cannot_be_built() -> None:
    class NoCost(StreamReduction):
        def init(self, d_out: int, d_in: int, tasks: int) -> Tensor:
            return torch.zeros(d_out, d_in)

        def add(self, total: Tensor, vector: Tensor, site: object) -> Tensor:
            return total + vector

        def result(self, total: Tensor, site: object) -> Tensor:
            return total

    with pytest.raises(TypeError, match=r"NoCost.*cost"):
        NoCost()  # type: ignore[abstract]


def test_something_that_is_no_part_cannot_be_chained() -> None:
    build: Any = Chain
    with pytest.raises(Exception, match=r"Mean|reduction"):
        build(reduction=object())
    with pytest.raises(Exception, match=r"Transform|transforms"):
        build(transforms=(Mean(),), reduction=Mean())


# The plan.


def by(planned: Any) -> list[set[str]]:
    return [{step.by for step in one.steps} for one in planned.passes]


@pytest.fixture
def stored(weights: Any, tmp_path: Path) -> tuple[Any, list[Any]]:
    for name, state in {"base": weights[0], **weights[1]}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    base = thetau.open(tmp_path / "base.safetensors")
    return base, [thetau.open(tmp_path / f"{task}.safetensors", name=task) - base for task in TASKS]


def test_the_plan_says_what_runs_where_and_not_by_name(stored: Any) -> None:
    base, vectors = stored
    engine = Engine(workers=2)

    def planned(method: Any) -> Any:
        return plan(base + thetau.merge(vectors, method, engine=engine), engine=engine)

    methods = thetau.methods
    assert by(planned(methods.Ties())) == [{"loop"}, {"loop"}, {"loop"}]
    assert by(planned(methods.Awd(tensors="all"))) == [{"loop"}, {"loop"}]
    shared = methods.LocalizeStitch(sharing="mask", clusters=PerTask({"ape": 0, "bee": 0, "cat": 1}))
    assert by(planned(shared)) == [{"loop"}, {"loop"}, {"torch"}]
    assert by(planned(methods.Awd(scope="row", tensors="all"))) == [{"torch"}]
    assert by(planned(made(lambda: Chain(reduction=GeometricMean())))) == [{"torch"}]  # a plugin, say
    slow, fast = planned(made(lambda: Chain(reduction=GeometricMean()))), planned(methods.Average())
    assert slow.duration(1e12, 1e12) > 3 * fast.duration(1e12, 1e12)


def test_what_runs_is_what_is_planned(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, vectors = stored
    ran: list[tuple[Any, ...]] = []
    real = Engine.run

    def watching(self: Engine, steps: Any, *given: Any, **others: Any) -> Any:
        ran.append(tuple(steps))
        return real(self, steps, *given, **others)

    monkeypatch.setattr(Engine, "run", watching)
    engine = Engine(workers=2)
    expression = base + thetau.merge(vectors, thetau.methods.Ties(), engine=engine)
    planned = plan(expression, engine=engine)
    expression.save(tmp_path / "out", engine=engine)
    assert ran == [one.steps for one in planned.passes]


def test_a_solver_that_holds_everything_is_planned_and_refused(stored: Any) -> None:
    base, vectors = stored
    method = thetau.methods.Awd(solver="adam", tensors="all", steps=5)
    planned = plan(base + thetau.merge(vectors, method), engine=Engine())
    everything = 4 * len(TASKS) * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert planned.passes[0].held == everything
    assert planned.memory > 4 * everything
    assert planned.flops > 0
    small = Engine(max_memory=3 * everything, workers=1, window=64)
    with pytest.raises(ThetauError, match=r"what is then solved needs .* the memory budget is"):
        (base + thetau.merge(vectors, method, engine=small)).state_dict()
