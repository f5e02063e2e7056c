"""The lazy algebra of weights, and what users see of it: save, load, apply, negate, compare, warn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from fixtures import assert_same, leftovers, load_folder, random_weights, shifted, write_model
from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.errors import AlignmentError, CheckpointError, OutputError, RecipeError

WEIGHTS = [random_weights(0), shifted(random_weights(0), 1), shifted(random_weights(0), 2), shifted(random_weights(0), 3)]
MODELS = [thetau.open(weights, name=name) for weights, name in zip(WEIGHTS, ("base", "a", "b", "c"), strict=True)]
BASE, (A, B, C) = MODELS[0], [model - MODELS[0] for model in MODELS[1:]]
FLOATS = [name for name, value in WEIGHTS[0].items() if value.is_floating_point()]

exact = st.integers(-64, 64).map(lambda number: number / 8)  # binary fractions, of which sums and products are exact
scalars = st.floats(-4, 4).filter(lambda number: number == 0 or abs(number) > 1e-3)


Three = tuple[float, float, float]
exacts, approximate = st.tuples(exact, exact, exact), st.tuples(scalars, scalars, scalars)


def vector(weights: Three) -> thetau.Expression:
    """Any combination of three task vectors."""
    return weights[0] * A + weights[1] * B - weights[2] * C


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in FLOATS])


def value(vector: thetau.Expression) -> Tensor:
    """All its entries, zeros where it is nothing."""
    return (
        flat(vector.state_dict())
        if vector.terms
        else torch.zeros(sum(WEIGHTS[0][name].numel() for name in FLOATS), dtype=torch.float64)
    )


def terms(expression: thetau.Expression) -> dict[str, float]:
    return {source.key: weight for weight, source in expression.terms}


# Laws


@given(exacts, exacts)
def test_adding_and_subtracting_gives_the_same_back(a_: Three, b_: Three) -> None:
    a, b = vector(a_), vector(b_)
    assert terms((a + b) - b) == terms(a)
    assert terms((a - b) + b) == terms(a)
    assert terms((BASE + a) - BASE) == terms(a)
    assert terms(a - a) == {}


@given(exacts, exacts, exacts)
def test_addition_commutes_and_associates(a_: Three, b_: Three, c_: Three) -> None:
    a, b, c = vector(a_), vector(b_), vector(c_)
    assert terms(a + b) == terms(b + a)
    assert terms((a + b) + c) == terms(a + (b + c))


@given(exacts)
def test_negation(a_: Three) -> None:
    a = vector(a_)
    negated = -a
    assert terms(-negated) == terms(a)
    assert terms(a + -a) == {}
    assert terms(BASE - a) == terms(BASE + -a)
    assert terms(-a) == terms(a * -1) == terms(-1.0 * a)


@given(exacts, exacts, exact)
def test_scaling_distributes(a_: Three, b_: Three, scale: float) -> None:
    a, b = vector(a_), vector(b_)
    assert terms(scale * (a + b)) == terms(scale * a + scale * b)
    assert terms(0 * a) == {}
    assert terms(1 * a) == terms(a)
    assert terms(a / 2) == terms(0.5 * a)


@settings(max_examples=8)
@given(approximate, approximate, scalars)
def test_the_laws_hold_for_values_within_rounding(a_: Three, b_: Three, scale: float) -> None:
    a, b = vector(a_), vector(b_)
    size = 1e-5 * (1 + abs(scale))
    assert torch.allclose(value(scale * (a + b)), scale * value(a) + scale * value(b), atol=size)
    assert torch.allclose(value(a - b), value(a) - value(b), atol=size)
    assert torch.equal(value(-a), -value(a))


@settings(max_examples=8)
@given(approximate, approximate)
def test_products_are_those_of_the_flattened_tensors(a_: Three, b_: Three) -> None:
    a, b = vector(a_), vector(b_)
    x, y = value(a), value(b)
    assert math.isclose(a.dot(b), float(x @ y), rel_tol=1e-5, abs_tol=1e-6 * float(x.norm() * y.norm()))
    assert math.isclose(a.norm(), float(x.norm()), rel_tol=1e-6)
    want = float(torch.nn.functional.cosine_similarity(x, y, dim=0)) if a.terms and b.terms else 0.0
    assert math.isclose(a.cosine(b), want, abs_tol=1e-5)


def test_the_gram_matrix() -> None:
    got = thetau.gram([A, B, C])
    stack = torch.stack([value(vector) for vector in (A, B, C)])
    assert got.dtype == torch.float64
    assert torch.allclose(got, stack @ stack.T, rtol=1e-10)
    assert torch.equal(got, got.T)
    swapped = thetau.gram([C, A, B])
    assert torch.equal(swapped, got[[2, 0, 1]][:, [2, 0, 1]])


def test_excluded_tensors_are_not_counted() -> None:
    got = A.norm(exclude=["encoder.*", "embeddings.*"])
    assert math.isclose(got, float((WEIGHTS[1]["logit_scale"] - WEIGHTS[0]["logit_scale"]).abs()), rel_tol=1e-6)


def test_norms_of_models_and_of_nothing() -> None:
    assert math.isclose(BASE.norm(), float(flat(WEIGHTS[0]).norm()), rel_tol=1e-10)
    assert (A - A).norm() == 0
    assert (A - A).cosine(A) == 0


def test_sums() -> None:
    assert terms(sum([A, B, C])) == terms(A + B + C)  # type: ignore[arg-type,call-overload]
    assert torch.equal(value(sum([A, B])), value(A + B))  # type: ignore[arg-type,call-overload]


def test_analogy() -> None:
    """τ_C + τ_B − τ_A: d is to c as b is to a."""
    got = (BASE + (C + B - A)).state_dict()
    for name in FLOATS:
        want = WEIGHTS[3][name].double() + WEIGHTS[2][name].double() - WEIGHTS[1][name].double()
        assert torch.allclose(got[name].double(), want, atol=1e-6), name


def test_other_operands_are_type_errors() -> None:
    for action in (
        lambda: A + 1,
        lambda: 1 - A,
        lambda: A * B,
        lambda: A * "2",
        lambda: True * A,
        lambda: A / "2",
        lambda: A - None,
    ):  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            action()
    with pytest.raises(TypeError, match="unsupported operand"):
        sum([A], start=1)  # type: ignore[call-overload]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scaling_by_no_number(scale: float) -> None:
    with pytest.raises(ValueError, match=r"Weights can only be scaled by a finite number. Got"):
        scale * A


def test_expressions_say_what_they_are() -> None:
    assert repr(BASE) == "<model: base>"
    assert repr(BASE - 0.5 * A).startswith("<model: 1.5·")
    assert repr(A).startswith("<task vector: ")
    assert repr(BASE + BASE).startswith("<combination of degree 2: 2·")
    assert repr(A.named("sst2")) == "<task vector: sst2>"


def test_nothing_is_read_before_it_is_needed(base: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = SafetensorsFile.fill

    def spy(self: SafetensorsFile, view: memoryview, offset: int, what: str) -> None:
        read.append(what)
        real(self, view, offset, what)

    monkeypatch.setattr(SafetensorsFile, "fill", spy)
    start = thetau.open(base)
    vector = thetau.open(models[0]) - start
    assert read == []
    merged = thetau.merge([vector, -vector], thetau.methods.Average(), names=["x", "y"])
    repr(start + 0.5 * merged - vector)
    assert set(read) == {"tensor 'embeddings.position_ids'"}  # to say whether it is the same in all
    merged.norm()
    assert len(set(read)) == len(WEIGHTS[0])


# Degree


def test_a_merge_wants_task_vectors() -> None:
    for wrong, kind in ((MODELS[1], "model"), (BASE + BASE, "combination of degree 2")):
        with pytest.raises(AlignmentError, match=rf"A merge needs task vectors \(degree 0\)\. Got <{kind}: .*subtract the base"):
            thetau.merge([A, wrong], thetau.methods.Average())
    with pytest.raises(AlignmentError, match=r"A merge needs at least one task vector. Got none"):
        thetau.merge([], thetau.methods.Average())


def test_names_must_be_different_and_as_many() -> None:
    for names in (["x"], ["x", "x"]):
        with pytest.raises(RecipeError, match="`names` must be 2 different names"):
            thetau.merge([A, B], thetau.methods.Average(), names=names)


# Saved task vectors


@pytest.mark.parametrize("name", ["tau", "tau.safetensors"])
def test_a_task_vector_is_saved_and_opened(tmp_path: Path, base: Path, models: list[Path], name: str) -> None:
    start, model = thetau.open(base), thetau.open(models[0])
    report = (model - start).save(tmp_path / name, shard_bytes=500)
    loaded = thetau.open(tmp_path / name)
    assert loaded.is_vector and not loaded.is_model
    assert report.tensors == len(FLOATS)
    stored = load_folder(tmp_path / name) if name == "tau" else load_file(tmp_path / name)
    assert sorted(stored) == sorted(FLOATS)
    assert_same(stored, {tensor: WEIGHTS[1][tensor] - WEIGHTS[0][tensor] for tensor in FLOATS})
    assert_same(loaded.state_dict(), stored)
    if name == "tau":
        assert json.loads((tmp_path / "tau" / "thetau.json").read_text(encoding="utf-8"))["kind"] == "task_vector"
        assert "config.json" not in leftovers(tmp_path / "tau")
        assert len(list((tmp_path / "tau").glob("*.safetensors"))) > 1
    else:
        with safe_open(tmp_path / name, framework="pt") as opened:
            assert opened.metadata()["thetau.kind"] == "task_vector"
    back = (start + loaded).state_dict()
    for tensor in FLOATS:
        want = WEIGHTS[1][tensor]
        unit = torch.finfo(torch.float32).eps * torch.maximum(want.abs(), WEIGHTS[0][tensor].abs())
        assert ((back[tensor] - want).abs() <= unit).all(), tensor
    assert torch.equal(back["embeddings.position_ids"], WEIGHTS[0]["embeddings.position_ids"])


def test_without_a_file_between_the_model_comes_back_bit_for_bit() -> None:
    assert_same((BASE + A).state_dict(), WEIGHTS[1])
    assert_same((MODELS[1] - A).state_dict(), WEIGHTS[0])


def test_a_saved_vector_does_what_the_lazy_one_does(tmp_path: Path, base: Path, models: list[Path]) -> None:
    start = thetau.open(base)
    lazy = [thetau.open(path) - start for path in models]
    for number, vector in enumerate(lazy):
        vector.save(tmp_path / f"tau{number}.safetensors")
    saved = [thetau.open(tmp_path / f"tau{number}.safetensors") for number in range(2)]
    for method in (thetau.methods.Average(), thetau.methods.Ties()):
        want = (start + thetau.merge(lazy, method, names=["x", "y"])).state_dict()
        assert_same((start + thetau.merge(saved, method, names=["x", "y"])).state_dict(), want)
    assert math.isclose(saved[0].cosine(saved[1]), lazy[0].cosine(lazy[1]), rel_tol=1e-6)
    merged = thetau.merge(lazy, thetau.methods.Average())
    merged.save(tmp_path / "merged.safetensors")
    assert_same((start + thetau.open(tmp_path / "merged.safetensors")).state_dict(), (start + merged).state_dict())


def test_vectors_without_a_base_take_the_union(tmp_path: Path) -> None:
    for name, tensors in (("x", {"v": torch.ones(2), "w": torch.ones(3)}), ("y", {"w": torch.full((3,), 3.0)})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"thetau.kind": "task_vector"})
    x, y = (thetau.open(tmp_path / f"{name}.safetensors") for name in "xy")
    want = {"v": torch.full((2,), 0.5), "w": torch.full((3,), 2.0)}
    assert_same(thetau.merge([x, y], thetau.methods.Average()).state_dict(), want)
    assert_same((0.5 * (x + y)).state_dict(), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_vector_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    A.save(tmp_path / "tau.safetensors", dtype=dtype)
    wanted = getattr(torch, dtype)
    assert_same(
        load_file(tmp_path / "tau.safetensors"), {name: (WEIGHTS[1][name] - WEIGHTS[0][name]).to(wanted) for name in FLOATS}
    )


def test_float64_is_computed_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    base, model = ({"w": torch.randn(100, dtype=torch.float64, generator=generator)} for _ in range(2))
    with pytest.warns(thetau.ThetauWarning, match="probably not the model"):
        got = (thetau.open(model) - thetau.open(base)).state_dict(dtype="float64")
    assert torch.equal(got["w"], model["w"] - base["w"])


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    models = [{"w": (base["w"].float() + 0.01 * number).to(torch.bfloat16)} for number in (1, 2, 3)]
    start = thetau.open(base)
    got = (start + thetau.merge([thetau.open(model) - start for model in models], thetau.methods.Average())).state_dict()
    total = sum(model["w"].float() - base["w"].float() for model in models)
    assert torch.equal(got["w"], (base["w"].float() + total / 3).to(torch.bfloat16))


# Warnings and refusals


def test_a_vector_of_another_base(tmp_path: Path, base: Path, models: list[Path]) -> None:
    start = thetau.open(base)
    (thetau.open(models[0]) - start).save(tmp_path / "tau.safetensors")
    vector = thetau.open(tmp_path / "tau.safetensors")
    (start + vector).state_dict()  # no warning
    other = thetau.open(models[1])
    with pytest.warns(
        thetau.ThetauWarning, match=r"tau\.safetensors: this task vector was taken from another base than .*model2 \(their f"
    ):
        (other + vector).state_dict()
    with pytest.warns(thetau.ThetauWarning, match="taken from another base than"):
        report = (other + thetau.merge([vector], thetau.methods.Average())).save(tmp_path / "out")
    assert len(report.warnings) == 1
    mixed = thetau.merge([thetau.open(models[0]) - start, start - other], thetau.methods.Average(), names=["x", "y"])
    with pytest.warns(
        thetau.ThetauWarning, match=r"y: this task vector was taken from another base, .*model2, than .*base \(their"
    ):
        (start + mixed).state_dict()


def test_a_base_of_the_same_weights_elsewhere_is_no_other_base(tmp_path: Path, base: Path, models: list[Path]) -> None:
    copy = thetau.open(write_model(tmp_path / "copy", random_weights(0)))
    start = thetau.open(base)
    vector = thetau.open(models[0]) - start
    (copy + thetau.merge([vector], thetau.methods.Average())).state_dict()
    vector.save(tmp_path / "tau.safetensors")
    (copy + thetau.open(tmp_path / "tau.safetensors")).state_dict()


@pytest.mark.parametrize("method", ["Average", "TaskArithmetic", "Ties", "Awd", "none"])
def test_a_base_that_is_not_the_base(tmp_path: Path, method: str) -> None:
    base = thetau.open(random_weights(5), name="five")
    vector = (MODELS[1] - base).named("sst2")
    norm, size = float((flat(WEIGHTS[1]) - flat(random_weights(5))).norm()), float(flat(random_weights(5)).norm())
    if method == "Awd":  # looks at the tensors that it acts on
        norm, size = (
            float(flat_of(difference).norm())
            for difference in (lambda n: WEIGHTS[1][n] - random_weights(5)[n], lambda n: random_weights(5)[n])
        )
    who = "state dict of 17 tensors" if method == "none" else "sst2"
    message = rf"{who}: ‖τ‖ = {norm:.4g} is {norm / size:.2f} of the base's norm {size:.4g}; fine-tuning gives less than 0\.3\. .* is probably not"
    merged = vector if method == "none" else thetau.merge([vector], getattr(thetau.methods, method)())
    for _ in range(2):  # the numbers do not grow when it is read again
        with pytest.warns(thetau.ThetauWarning, match=message):
            (merged if method == "none" else base + merged).state_dict()


def flat_of(get: Any) -> Tensor:
    """The weight matrices of the blocks."""
    return torch.cat([get(name).double().reshape(-1) for name in FLOATS if "layer" in name and get(name).ndim == 2])


def test_only_the_models_count_not_what_is_done_with_them() -> None:
    (BASE + 60 * A).state_dict()
    (40 * (A - B)).state_dict()
    other = thetau.open(random_weights(5), name="five")
    with pytest.warns(thetau.ThetauWarning) as caught:
        (other - 0.001 * ((MODELS[1] - other) + (MODELS[2] - other))).state_dict()
    assert ["state dict of 17 tensors: ‖τ‖" in str(w.message) or "tensors (2): ‖τ‖" in str(w.message) for w in caught] == [
        True,
        True,
    ]


def test_parts_of_a_merge_do_not_add_up_in_the_warning() -> None:
    base = thetau.open(random_weights(5))
    weights = shifted(WEIGHTS[1], 8)
    tasks = [(thetau.open(w) - base).named(name) for w, name in ((WEIGHTS[1], "x"), (weights, "y"))]
    parts = thetau.transform(tasks, thetau.methods.Average())
    norm = float((flat(WEIGHTS[1]) - flat(random_weights(5))).norm())
    with pytest.warns(thetau.ThetauWarning) as caught:
        (base + 0.5 * (parts[0] + parts[1])).state_dict()
    assert [f"x: ‖τ‖ = {norm:.4g} is" in str(warning.message) for warning in caught] == [True, False]


@pytest.mark.parametrize("method", ["Average", "TaskArithmetic", "Ties", "Awd", "Wudi"])
def test_an_all_zero_vector_is_noted(tmp_path: Path, base: Path, models: list[Path], method: str) -> None:
    same = write_model(tmp_path / "same", random_weights(0))
    start = thetau.open(base)
    vectors = [thetau.open(same) - start, thetau.open(models[0]) - start]
    report = (start + thetau.merge(vectors, getattr(thetau.methods, method)())).save(tmp_path / "out")
    assert [note for note in report.notes if "all zero" in note] == [
        "same: its task vector is all zero in the tensors that were merged."
    ]
    assert not report.warnings


def test_the_base_itself_as_a_model(tmp_path: Path, base: Path) -> None:
    start = thetau.open(base)
    merged = thetau.merge([thetau.open(base) - start], thetau.methods.Average(), names=["nothing"])
    report = (start + merged).save(tmp_path / "out")
    assert "nothing: its task vector is all zero in the tensors that were merged." in report.notes
    assert_same(load_folder(tmp_path / "out"), random_weights(0))


def broken(tmp_path: Path, **places: float) -> Path:
    """A model folder with values that are no numbers."""
    weights = shifted(random_weights(0), 1)
    matrix = weights["encoder.layer.0.intermediate.dense.weight"].view(-1)
    for number, (_, what) in enumerate(places.items()):
        matrix[7 + number] = what
    return write_model(tmp_path / "broken", weights)


@pytest.mark.parametrize("method", ["Average", "TaskArithmetic", "Ties", "Awd", "Wudi", "DareLinear", "none"])
@pytest.mark.parametrize("where", ["model", "base"])
def test_values_that_are_no_numbers(tmp_path: Path, base: Path, method: str, where: str) -> None:
    path = broken(tmp_path, a=math.nan, b=math.inf, c=math.nan)
    start, model = (thetau.open(base), thetau.open(path)) if where == "model" else (thetau.open(path), thetau.open(base))
    vector = model - start
    merged = (
        vector
        if method == "none"
        else start + thetau.merge([vector, 2 * vector], getattr(thetau.methods, method)(), names=["x", "y"])
    )
    message = r"broken/model\.safetensors: tensor 'encoder\.layer\.0\.intermediate\.dense\.weight' holds 2 NaN and 1 infinite values of 128\. Nothing was w"
    with pytest.raises(CheckpointError, match=message):
        merged.save(tmp_path / "out")
    assert leftovers(tmp_path) == ["base", "broken"]


def test_values_that_are_no_numbers_can_be_left_out(tmp_path: Path, base: Path) -> None:
    start = thetau.open(base)
    name = "encoder.layer.0.intermediate.dense.weight"
    vector = thetau.open(broken(tmp_path, a=math.nan)) - start
    got = (start + thetau.merge([vector], thetau.methods.Average(), exclude=[name])).state_dict()
    assert torch.equal(got[name], WEIGHTS[0][name])


@pytest.mark.parametrize(("dtype", "large"), [("float16", 70000.0), ("float8_e4m3fn", 600.0), ("float8_e5m2", 70000.0)])
def test_values_that_the_outputs_dtype_cannot_hold(tmp_path: Path, dtype: str, large: float) -> None:
    weights = random_weights(0)
    weights["logit_scale"] = torch.tensor(-large)
    base = thetau.open(write_model(tmp_path / "base", weights))
    with pytest.raises(
        OutputError,
        match=rf"'logit_scale': {re.escape(f'{large:.4g}')} does not fit {dtype}\. Choose another output dtype .*Nothing was written",
    ):
        base.save(tmp_path / "out", dtype=dtype)
    assert leftovers(tmp_path) == ["base"]
    base.save(tmp_path / "out", dtype="bfloat16")


def test_a_vector_too_long_for_half_precision(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"does not fit float16"):
        (BASE + 1e8 * A).save(tmp_path / "out", dtype="float16")
    assert leftovers(tmp_path) == []


# Opening


def test_names_come_from_paths(base: Path, models: list[Path]) -> None:
    assert thetau.open(base).label == "base"
    assert thetau.open(base, name="x").label == "x"
    start = thetau.open(base)
    merged = thetau.merge([thetau.open(path) - start for path in models], thetau.methods.Average())
    assert merged.terms[0][1].tasks == ("model1", "model2")  # type: ignore[attr-defined]


def test_a_given_name_survives_what_is_still_the_same_task(base: Path, models: list[Path]) -> None:
    start = thetau.open(base)
    alpha, beta = thetau.open(models[0], name="alpha") - start, thetau.open(models[1], name="beta") - start
    assert alpha.name == "alpha"
    assert [one.name for one in (0.5 * alpha, alpha * 2, alpha / 4, -alpha, -(0.3 * alpha))] == ["alpha"] * 5
    assert (thetau.open(WEIGHTS[1], name="a") - start).name == "a"
    for nobodys in (alpha + beta, alpha - beta, alpha + alpha, 0.5 * (alpha + beta), start + alpha, start + 0.5 * alpha):
        assert nobodys.name is None
    assert ((start + alpha) - start).name is None
    assert sum([alpha]).name == "alpha"  # type: ignore[union-attr]
    by_task = thetau.methods.TaskArithmetic(scale=thetau.PerTask({"alpha": 1.0, "beta": 0.25}))
    merged = thetau.merge([alpha, beta], by_task)
    assert merged.terms[0][1].tasks == ("alpha", "beta")  # type: ignore[attr-defined]
    torch.testing.assert_close(flat(merged.state_dict()), flat((alpha + 0.25 * beta).state_dict()), atol=1e-6, rtol=0)


def test_tasks_of_one_name_are_told_apart(tmp_path: Path, base: Path) -> None:
    start = thetau.open(base)
    paths = [
        write_model(tmp_path / place / "final", shifted(random_weights(0), number)) for number, place in enumerate(("x", "y"))
    ]
    merged = thetau.merge([thetau.open(path) - start for path in paths], thetau.methods.Average())
    tasks: Any = merged.terms[0][1].tasks  # type: ignore[attr-defined]
    assert len(set(tasks)) == 2 and "x/final" in tasks[0] and "y/final" in tasks[1]


def test_adapters_of_a_combination_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match=r"An adapter's base must be one opened checkpoint. Got <task vector"):
        thetau.open(tmp_path, base=A)
