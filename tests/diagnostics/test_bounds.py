"""Bounds of task arithmetic: Hessians against torch's own, theorems against quadratics, gaps against losses by hand; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.diagnostics.bounds import Bounds, bounds
from thetau.diagnostics.hessian import LossOperator, spectral_norm
from thetau.diagnostics.results import load_result
from thetau.diagnostics.theorems import (
    Geometry,
    addition_bound,
    addition_condition,
    away,
    gradient_condition,
    negation_bound,
    negation_condition,
    ood_bound,
    ood_condition,
)
from thetau.errors import DataError
from thetau.evaluate import Evaluator
from thetau.evaluate.spaces import WeightSpace
from thetau.evaluate.tuned import open_tuned, read_vectors
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import Encoder, load_encoder
from thetau.studies import Family, mixed_bases
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

NAMES = ("animals", "third", "weather")


def make_tasks(data: Path) -> None:
    for name in ("animals", "weather"):
        make_task(data, name)
    third = make_task(data.parent / "made", "animals")
    (third / "meta.json").write_text((third / "meta.json").read_text().replace('"task": "animals"', '"task": "third"'))
    third.rename(data / "third")


class Bench:
    """Three tasks, learnt from one base, two of them alike."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"
        make_tasks(self.data)
        self.base = make_model(root / "base")
        self.encoder = load_encoder(self.base)
        tasks = [load_task(name, self.data) for name in NAMES]
        self.evaluator = Evaluator(self.encoder, tasks, max_length=32, limits={"test": 24})
        for number, task in enumerate(tasks):
            self.evaluator.load_base()
            config = FinetuneConfig(steps=12, lr=5e-3, batch_size=16, max_length=32, seed=number)
            finetune(self.encoder, task, root / task.name, config, base=str(self.base))
        self.evaluator.load_base()
        self.weights = self.encoder.weights(exact=True)
        self.vectors = read_vectors([open_tuned(root / name) for name in NAMES], self.encoder, self.weights)
        self.space = WeightSpace(self.evaluator, self.weights, self.vectors)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def result(bench: Bench) -> Bounds:
    return bounds(bench.space, bench.evaluator, bench.vectors, scale=0.5)


# The Hessian


def matrix(encoder: Encoder, evaluator: Evaluator, task: str, names: list[str]) -> Tensor:
    """The Hessian of the mean loss over all examples in one batch, by `torch.autograd.functional`, in float64."""
    inputs, head = evaluator.inputs(task, "test"), evaluator.heads[task]
    columns, labels = inputs.batch(range(len(inputs))), torch.tensor(inputs.labels)
    values = [dict(encoder.module.named_parameters())[name].detach() for name in names]
    sizes = [value.numel() for value in values]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.reshape(value.shape) for part, value in zip(flat.split(sizes), values, strict=True)]
        features = torch.func.functional_call(encoder.module, dict(zip(names, parts, strict=True)), (), columns)
        return head.loss(features, labels)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found: Any = torch.autograd.functional.hessian(loss, torch.cat([value.flatten() for value in values]))  # type: ignore[no-untyped-call]
    return torch.as_tensor(found).double()


def test_the_norm_is_that_of_the_whole_matrix(bench: Bench) -> None:
    bench.evaluator.load_base()
    block = "backbone.encoder.layer.0"
    names = [f"{block}.attention.self.query.weight", f"{block}.attention.self.value.bias", f"{block}.output.LayerNorm.weight"]
    operator = LossOperator(bench.encoder, bench.evaluator.heads["animals"], bench.evaluator.inputs("animals", "test"), names)
    whole = matrix(bench.encoder, bench.evaluator, "animals", names)
    vector = operator.start(3)
    flat = torch.cat([part.flatten() for part in operator.product(vector)]).double()
    assert torch.allclose(flat, whole @ torch.cat([part.flatten() for part in vector]).double(), atol=1e-5)
    found = spectral_norm(operator.product, operator.start(), tolerance=1e-6, max_iterations=500)
    assert found.converged
    extreme = torch.linalg.eigvalsh(whole)
    assert found.value == pytest.approx(float(extreme.abs().max()), rel=1e-3)
    assert found.residual is not None and found.residual < 0.05
    assert [torch.equal(a, b) for a, b in zip(operator.start(), operator.start(), strict=True)] == [True] * 3


def test_batches_do_not_show(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of unequal size give what one batch gives; and the product is a derivative of the gradient."""
    from thetau.tasks import encoding

    bench.evaluator.load_base()
    names = [name for name, _ in bench.encoder.module.named_parameters()]
    inputs = bench.evaluator.inputs("weather", "test")
    operator = LossOperator(bench.encoder, bench.evaluator.heads["weather"], inputs, names)
    vector = operator.start()
    one = [operator.gradient(), operator.product(vector)]
    monkeypatch.setattr(encoding, "_ROWS_PER_BATCH", 5)
    assert [len(batch) for batch in encoding.ordered_batches(inputs.lengths)] == [5, 5, 5, 5, 4]
    several = [operator.gradient(), operator.product(vector)]
    for a, b in zip(one, several, strict=True):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
    parameters, step = dict(bench.encoder.module.named_parameters()), 1e-3
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, part in zip(names, vector, strict=True):
                parameters[name].add_(sign * step * part)
        slopes.append(operator.gradient())
        bench.evaluator.load_base()
    for product, up, down in zip(several[1], *slopes, strict=True):
        assert torch.allclose(product, (up - down) / (2 * step), atol=5e-3)


def diagonal(*values: float) -> Any:
    return lambda vector: [torch.tensor(values) * vector[0]]


def test_power_iteration_on_known_spectra() -> None:
    start = [torch.full((3,), 3**-0.5)]
    found = spectral_norm(diagonal(1.0, -4.0, 2.0), start, tolerance=1e-6)
    assert (found.value, found.eigenvalue) == pytest.approx((4.0, -4.0), rel=1e-5)
    assert found.converged
    opposed = spectral_norm(diagonal(3.0, -3.0, 1.0), start, tolerance=1e-6)
    assert opposed.value == pytest.approx(3.0, rel=1e-5), "vᵀHv alone would stand still near 0"
    assert opposed.converged
    assert spectral_norm(diagonal(0.0, 0.0, 0.0), start).value == 0.0
    slow = spectral_norm(diagonal(1.0, 0.999, 0.0), [torch.tensor([0.01, 1.0, 0.0])], tolerance=1e-9, max_iterations=3)
    assert not slow.converged
    assert slow.iterations == 3
    assert slow.value <= 1.0
    for tolerance, most in ((0.0, 10), (1.0, 10), (1e-3, 0)):
        with pytest.raises(DataError, match=r"a tolerance between 0 and 1 and at least one iteration. Got"):
            spectral_norm(diagonal(1.0, 1.0, 1.0), start, tolerance=tolerance, max_iterations=most)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_estimate_never_exceeds_the_norm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(6, 6, generator=generator)
    symmetric = square + square.T
    start = torch.randn(6, generator=generator)
    norm = float(torch.linalg.matrix_norm(symmetric.double(), ord=2))
    values = [
        spectral_norm(lambda vector: [symmetric @ vector[0]], [start / start.norm()], tolerance=1e-12, max_iterations=most).value
        for most in (1, 3, 300)
    ]
    assert values[0] <= values[1] * (1 + 1e-5)
    assert values[1] <= values[2] * (1 + 1e-5)
    assert values[2] <= norm * (1 + 1e-5)


def test_an_operator_is_over_parameters_that_exist(bench: Bench) -> None:
    head, inputs = bench.evaluator.heads["animals"], bench.evaluator.inputs("animals", "test")
    for names, got in ((["backbone.nothing"], "'backbone.nothing'"), ([], "'none'")):
        with pytest.raises(DataError, match=f"over parameters of the model, at least one. Got {got}"):
            LossOperator(bench.encoder, head, inputs, names)


# The theorems


@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([0.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_the_bounds_hold_for_quadratics(seed: int, count: int, shared: float) -> None:
    """ℓ_i(θ) = ½(θ − θ_i)ᵀ A_i (θ − θ_i) meets every assumption, so that no gap may exceed its bound. `shared` makes vectors alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = 4
    common = shared * normal(width)
    tau = {f"t{i}": {"w": normal(width) + common} for i in range(count)}
    factors = [normal(width, width) for _ in range(count)]
    curved = {name: factor @ factor.T for name, factor in zip(tau, factors, strict=True)}
    steep = {name: float(torch.linalg.matrix_norm(a, ord=2)) for name, a in curved.items()}
    geometry = Geometry.of(tau)
    size, epsilon = geometry.size, geometry.epsilon
    alphas = torch.rand(count, generator=generator, dtype=torch.float64)
    alphas /= alphas.sum()
    mixed = dict(zip(tau, alphas.tolist(), strict=True))
    assert addition_condition(list(mixed.values())).met

    def loss(task: str, coefficients: dict[str, float]) -> float:
        step = sum((c * tau[name]["w"] for name, c in coefficients.items()), torch.zeros(width)) - tau[task]["w"]
        assert math.sqrt(float(step @ step)) == pytest.approx(geometry.distance(coefficients, task), abs=1e-9)
        return float(step @ curved[task] @ step) / 2

    slack = 1e-9
    for task in tau:
        gap, half = loss(task, mixed), steep[task] / 2 * geometry.squared(away(mixed, task))
        assert gap <= half + slack
        assert half <= (1 - mixed[task]) ** 2 * addition_bound(steep[task], size, epsilon) + slack
        for gone in tau:
            if gone != task:
                for alpha in (0.3, 1.0):
                    gap = loss(task, {gone: -alpha}) - loss(task, {})
                    assert gap <= negation_bound(steep[task], size, epsilon) + slack
                    assert gap <= addition_bound(steep[task], size, epsilon) + slack, "θ_i is the minimum: the tighter form"
        source, beta = geometry.nearest(task)
        gap = loss(task, {source: 1.0})
        assert gap <= ood_bound(steep[task], size, beta) + slack
        assert beta <= 1 + slack
        assert beta == pytest.approx(max(float(tau[task]["w"] @ tau[o]["w"]) for o in tau if o != task) / size)


def test_conditions_say_what_they_got() -> None:
    assert addition_condition([0.25] * 4).met
    outside = addition_condition([0.3] * 4)
    assert not outside.met
    assert outside.got == "Σα = 1.2, smallest α 0.3"
    assert not addition_condition([1.5, -0.5]).met
    assert [negation_condition(alpha).met for alpha in (0.0, 1.0, 1.5, -0.1)] == [True, True, False, False]
    assert [ood_condition(beta).met for beta in (0.5, 1.0, 0.0, -0.2)] == [True, True, False, False]
    assert ood_condition(-0.2).got == "β = -0.2"
    assert gradient_condition(0.01, [1.0], 10.0).met
    steep = gradient_condition(5.0, [1.0, 1.0], 10.0)
    assert not steep.met
    assert steep.got == "‖∇‖ = 5, which could add 100 %"
    assert gradient_condition(0.0, [1.0], 0.0).met
    assert not gradient_condition(1.0, [1.0], 0.0).met


def test_a_tensor_that_a_vector_lacks_counts_as_zero() -> None:
    geometry = Geometry.of({"a": {"x": torch.tensor([3.0, 4.0])}, "b": {"x": torch.tensor([4.0, 3.0]), "y": torch.ones(1)}})
    assert geometry.gram.tolist() == [[25.0, 24.0], [24.0, 26.0]]
    assert (geometry.size, geometry.epsilon) == (26.0, pytest.approx(24 / 650**0.5))
    zero = Geometry.of({"a": {"x": torch.zeros(2)}, "b": {"x": torch.zeros(2)}})
    assert (zero.epsilon, zero.nearest("a")) == (0.0, ("b", 0.0))


# What is measured


def test_losses_are_those_of_the_head(bench: Bench, tmp_path: Path) -> None:
    task = "animals"
    features = bench.space.features({task: 1.0}, task, "test")
    inputs = bench.evaluator.inputs(task, "test")
    logits = bench.evaluator.heads[task].logits(features).double()
    expected = float(-logits.log_softmax(-1)[torch.arange(len(inputs)), torch.tensor(inputs.labels)].mean())
    found = bench.space.losses({task: 1.0}, [task], "test")[task]
    assert (found.value, found.n) == (pytest.approx(expected, rel=1e-5), 24)
    seen: list[int] = []
    kept = Evaluator(bench.encoder, [load_task(task, bench.data)], max_length=32, limits={"test": 24}, cache=tmp_path)
    kept.on_tokens = seen.append
    first = kept.losses(bench.weights, "test")
    assert kept.losses(bench.weights, "test") == first
    assert len(list(tmp_path.glob("loss-*.json"))) == 1
    assert sum(seen) == 2 * kept.size(task, "test")


def test_gaps_and_constants_by_hand(bench: Bench, result: Bounds) -> None:
    live = {
        name: torch.cat([tau.double().flatten() for tau in bench.encoder.parameters(bench.vectors[name]).values()])
        for name in NAMES
    }
    assert result.size == pytest.approx(max(float(tau @ tau) for tau in live.values()), rel=1e-6)
    cosines = {(a, b): float(live[a] @ live[b] / live[a].norm() / live[b].norm()) for a in NAMES for b in NAMES if a != b}
    assert result.epsilon == pytest.approx(max(map(abs, cosines.values())), rel=1e-5)

    def loss(coefficients: dict[str, float], task: str) -> float:
        return bench.space.losses(coefficients, [task], "test")[task].value

    for row in result.comparisons:
        before = {} if row.theorem == "negation" else {row.task: 1.0}
        assert row.gap == pytest.approx(loss(row.coefficients, row.task) - loss(before, row.task), abs=1e-6)
        moved = sum(c * live[name] for name, c in row.coefficients.items())
        assert isinstance(moved, Tensor)
        assert row.distance == pytest.approx(float((moved - live[row.task]).norm()), rel=1e-5)
    assert len([row for row in result.comparisons if row.theorem == "negation"]) == 6
    for half in result.halves:
        assert half.cosine == pytest.approx(cosines[half.task, half.other], rel=1e-4, abs=1e-7)
        summed = {half.task: 0.5, half.other: 0.5}
        assert half.gap == pytest.approx(loss(summed, half.task) - loss({half.task: 1.0}, half.task), abs=1e-6)
    borrowed = {row.task: next(iter(row.coefficients)) for row in result.comparisons if row.theorem == "out of distribution"}
    assert borrowed["animals"] == max(("third", "weather"), key=lambda other: float(live["animals"] @ live[other]))


def test_bounds_are_their_formulas_and_say_where_they_do_not_apply(bench: Bench, result: Bounds) -> None:
    steep = {one.task: one.smoothness.value for one in result.constants if one.smoothness is not None}
    assert len(steep) == 3
    assert result.unconverged == ()
    for row in result.comparisons:
        assert row.bound is not None and row.second_order is not None
        if row.theorem != "out of distribution":
            factor = 1.0 if row.theorem == "addition" else 1.5
            assert row.bound == pytest.approx(steep[row.task] * result.size * (factor + result.epsilon))
        extra = next(one.norm for one in result.constants if one.task == row.task) ** 2 if row.theorem == "negation" else 0.0
        assert row.second_order == pytest.approx(steep[row.task] / 2 * (row.distance**2 + extra), rel=1e-6)
        assert row.second_order <= row.bound * (1 + 1e-6) or not row.conditions[0].met
        assert row.holds is (row.gap <= row.bound + 1e-6)
        assert row.inside is all(condition.met for condition in row.conditions)
    sums = [row for row in result.comparisons if row.theorem == "addition"]
    assert {round(row.coefficients["animals"], 3): row.conditions[0].met for row in sums} == {0.333: True, 0.5: False}
    assert not any(row.inside for row in sums if row.coefficients["animals"] == 0.5)
    # The slope is the derivative of the loss along the very step.
    row = sums[0]
    own = {row.task: 1.0}
    step = 1e-2
    along = [
        bench.space.losses(
            {name: own.get(name, 0.0) + sign * step * (c - own.get(name, 0.0)) for name, c in row.coefficients.items()},
            [row.task],
            "test",
        )[row.task].value
        for sign in (1, -1)
    ]
    assert row.slope == pytest.approx((along[0] - along[1]) / (2 * step), rel=0.02, abs=1e-3)


def test_a_norm_that_has_not_converged_is_said(bench: Bench) -> None:
    two = {name: bench.vectors[name] for name in NAMES[:2]}
    rough = bounds(bench.space, bench.evaluator, two, tolerance=1e-9, max_iterations=1)
    assert rough.unconverged == ("animals", "third")
    assert not any(row.inside for row in rough.comparisons)
    plain = bounds(bench.space, bench.evaluator, two, smoothness=False)
    assert all(row.bound is None and row.holds is None for row in plain.comparisons)
    assert [one.smoothness for one in plain.constants] == [None, None]
    assert [row.gap for row in plain.comparisons] == pytest.approx([row.gap for row in rough.comparisons])
    with pytest.raises(DataError, match=r"at least two are needed. Got 1"):
        bounds(bench.space, bench.evaluator, {"animals": bench.vectors["animals"]})
    with pytest.raises(DataError, match=r"`scale` must be a finite number. Got nan"):
        bounds(bench.space, bench.evaluator, two, scale=math.nan)
    zero = {name: {key: torch.zeros_like(tau) for key, tau in vector.items()} for name, vector in two.items()}
    with pytest.raises(DataError, match="all zero on the model's parameters"):
        bounds(bench.space, bench.evaluator, zero)


# The command


def invoke(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command_writes_json_and_a_chart(bench: Bench, tmp_path: Path) -> None:
    own = ["--base", bench.base, "--data", bench.data, "--max-length", 32, "-o", tmp_path, "--examples", 24]
    models = [bench.root / name for name in NAMES]
    told = invoke("diagnose", "bounds", *models, *own, "--scale", 0.5)
    assert "addition, α = 0.5: 3 of 3 outside the condition α ≥ 0 and Σα = 1 (first: animals, Σα = 1.5, smallest α 0.5)." in told
    found = load_result(Bounds, tmp_path / "bounds.json")
    assert found.tasks == NAMES
    assert found.constants[0].n == 24
    assert (tmp_path / "bounds.png").read_bytes().startswith(b"\x89PNG")
    told = invoke("diagnose", "bounds", *models[:2], *own, "--max-iterations", 1)
    assert "L has not converged and is only a lower estimate: animals, third." in told
    told = invoke("diagnose", "bounds", *models[:2], *own, "--no-smoothness")
    assert "lower estimate" not in told
    assert load_result(Bounds, tmp_path / "bounds.json").constants[0].smoothness is None
    failed = CliRunner().invoke(app, [str(word) for word in ("diagnose", "bounds", *models, *own, "--tolerance", 2)])
    assert "`--tolerance` must be between 0 and 1. Got 2." in str(failed.exception)


def test_tangent_vectors_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.evaluator.load_base()
    config = FinetuneConfig(paradigm="linear", steps=2, batch_size=8, max_length=32)
    for name in NAMES[:2]:
        finetune(bench.encoder, load_task(name, bench.data), tmp_path / name, config, base=str(bench.base))
        bench.evaluator.load_base()
    words = [*(tmp_path / name for name in NAMES[:2]), "--base", bench.base, "--data", bench.data, "-o", tmp_path]
    failed = CliRunner().invoke(app, [str(word) for word in ("diagnose", "bounds", *words)])
    assert "these vectors belong to the tangent space. Give models of paradigm standard or attention." in str(failed.exception)
    assert not (tmp_path / "bounds.json").exists()


# Vectors of two bases


def families(bench: Bench, shift: float) -> tuple[Family, Family]:
    """The bench's, and the same models as if they had been fine-tuned from a base a constant away."""

    def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + shift if value.is_floating_point() else value for name, value in weights.items()}

    models = {name: bench.space.weights({name: 1.0}) for name in NAMES}
    first = Family(name="one", evaluator=bench.evaluator, base=bench.weights, models=models)
    others = {name: moved(weights) for name, weights in models.items()}
    return first, Family(name="two", evaluator=bench.evaluator, base=moved(bench.weights), models=others)


def test_mixed_bases_are_table_2(bench: Bench) -> None:
    first, second = families(bench, 0.25)
    found = mixed_bases(first, second, alpha=0.5)
    assert [(cell.base, cell.row) for cell in found.cells] == [
        (base, row) for base in ("one", "two") for row in ("own", "50/50", "other")
    ]
    floats = [name for name, value in bench.weights.items() if value.is_floating_point()]
    for row, share in (("own", 0.0), ("50/50", 0.5), ("other", 1.0)):
        # By the paper's definition, the other's vectors are the own ones plus the way between the bases.
        expected = {
            name: value
            + 0.5
            * sum((bench.vectors[task][name] + share * 0.25 for task in NAMES), torch.zeros(()))
            * (1.0 if name in floats else 0.0)
            for name, value in bench.weights.items()
            if name in floats
        }
        whole = bench.weights | {name: value.float() for name, value in expected.items()}
        told = bench.evaluator.evaluate(whole, "test", NAMES)
        cell = found.cell("one", row)  # type: ignore[arg-type]
        assert {name: one.value for name, one in cell.accuracy.items()} == {name: one.value for name, one in told.items()}
        assert cell.absolute == pytest.approx(sum(one.value for one in told.values()) / 3)
    assert found.cell("one", "other").norm > 5 * found.cell("one", "own").norm
    own = mixed_bases(first, second, alpha=0.5, minus="own")
    assert own.cell("one", "other").norm == pytest.approx(own.cell("one", "own").norm, rel=1e-3)
    assert own.cell("one", "other").absolute == pytest.approx(own.cell("one", "own").absolute, abs=0.05)


def test_the_wrong_base_cancels_at_the_mean(bench: Bench) -> None:
    """(1 − Tα) θ₀ + α Σ θ_t: at α = 1/T nothing of θ₀ is left."""
    first, second = families(bench, 0.25)
    found = mixed_bases(first, second, alpha=1 / 3)
    mean = {
        name: sum((second.models[task][name] for task in NAMES), torch.zeros(())) / 3 if value.is_floating_point() else value
        for name, value in bench.weights.items()
    }
    told = bench.evaluator.evaluate(mean, "test", NAMES)
    cell = found.cell("one", "other")
    assert {name: one.value for name, one in cell.accuracy.items()} == {name: one.value for name, one in told.items()}


def test_families_that_do_not_fit_are_refused(bench: Bench) -> None:
    first, second = families(bench, 0.1)
    small = {name: value[:1] if value.ndim == 2 else value for name, value in second.base.items()}
    cases: list[tuple[Family, str]] = [
        (Family(name="one", evaluator=bench.evaluator, base=second.base, models=second.models), "Got 'one' twice"),
        (Family(name="two", evaluator=bench.evaluator, base=second.base, models={}), "the same tasks, at least one"),
        (Family(name="two", evaluator=bench.evaluator, base=small, models=second.models), "does not fit the base 'one'"),
    ]
    for other, message in cases:
        with pytest.raises(DataError, match=message):
            mixed_bases(first, other, alpha=0.3)
    with pytest.raises(DataError, match="`alpha` must be a finite number"):
        mixed_bases(first, second, alpha=math.inf)
    with pytest.raises(DataError, match="no cell 'own' over the base 'three'"):
        mixed_bases(first, second, alpha=0.3).cell("three", "own")
    assert json.loads(json.dumps([cell.norm for cell in mixed_bases(first, second, alpha=0.0).cells]))
