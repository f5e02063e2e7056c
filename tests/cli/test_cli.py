"""The command line, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import thetau
from commands import folder as folder
from commands import run
from fixtures import random_weights, shifted, write_model
from thetau.cli.options import parse_fields
from thetau.errors import RecipeError
from thetau.methods import PURPOSES, plain


def test_merge_with_options_is_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "merge", "--method", "ties", "-b", "base", "-m", "a", "-m", "b", "--set", "density=0.5", "-o", "out")
    assert code == 0, text
    assert "out: 17 tensors" in text
    assert "not floating-point" in text, "the integer buffer is named"
    base = thetau.open("base")
    vectors = [thetau.open(name) - base for name in "ab"]
    expected = (base + thetau.merge(vectors, thetau.methods.Ties(density=0.5))).state_dict()
    found = load_file("out/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    record = json.loads(Path("out/thetau.json").read_text())
    assert record["recipe"]["method"] == plain(thetau.methods.Ties(density=0.5))
    assert [entry["path"] for entry in record["inputs"]] == ["base", "a", "b"]
    assert "embeddings.word_embeddings.weight" in found


def test_merge_with_a_recipe_and_options_over_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("base: base\nmodels: [a, b]\nmethod: {name: task_arithmetic, scale: {per_task: {a: 0.5, b: 0}}}\n")
    assert run(capsys, "merge", "r.yaml", "-q", "-o", "one")[0] == 0
    one, a, base = (load_file(f"{name}/model.safetensors") for name in ("one", "a", "base"))
    name = "embeddings.word_embeddings.weight"
    assert torch.allclose(one[name], base[name] + 0.5 * (a[name] - base[name]), atol=1e-6)
    assert run(capsys, "merge", "r.yaml", "-q", "--output", "vector", "--dtype", "float16", "-o", "two")[0] == 0
    two = load_file("two/model.safetensors")
    assert two[name].dtype == torch.float16
    assert torch.allclose(two[name].float(), 0.5 * (a[name] - base[name]), atol=1e-4)
    assert thetau.open("two").is_vector


def test_the_plan_reads_headers_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(
        capsys, "merge", "--method", "wudi", "-b", "base", "-m", "a", "-m", "b", "--dtype", "bfloat16", "--dry-run", "-o", "out"
    )
    assert code == 0, text
    assert "merge and write" in text
    assert "solver=gradient_flow" in text, "the cheaper solver is named"
    assert "operations" in text
    assert not Path("out").exists()
    code, text = run(capsys, "merge", "--method", "ties", "-b", "base", "-m", "a", "--dry-run")
    assert code == 0, text
    assert text.count("MagnitudeQuantile for trim") == 2, "the exact quantile takes two passes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tis", "-b", "base", "-m", "a", "-o", "x"], "Did you mean 'ties'"),
        (["--method", "ties", "--set", "densty=1", "-b", "base", "-m", "a", "-o", "x"], "Did you mean 'density'"),
        (["--method", "ties", "-b", "nowhere", "-m", "a", "-o", "x"], "nowhere"),
        (["--method", "ties", "-b", "base", "-o", "x"], "models is missing"),
        (["--method", "ties", "-b", "base", "-m", "a"], "--out"),
        (["--method", "ties", "-b", "base", "-m", "a", "-o", "base"], "exists"),
        (["--method", "ties", "-b", "base", "-m", "a", "-o", "x", "--exclude", "encodr.*"], "matches no tensor"),
        (["--method", "ties", "-b", "base", "-m", "a", "-o", "x", "--max-memory", "little"], "size"),
        (["--method", "ties", "-b", "base", "-m", "a", "-o", "x", "--workers", "0"], "at least 1"),
        (["--set", "density=1", "-b", "base", "-m", "a", "-o", "x"], "`--set` needs `--method`"),
        (["--method", "wudi", "--set", "tensors=[nothing.*]", "-b", "base", "-m", "a", "-o", "x"], "no tensor fits"),
    ],
)
def test_bad_input_ends_in_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, text = run(capsys, "merge", *arguments)
    assert code == 1
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert not Path("x").exists()
    assert not list(folder.glob(".x*"))


def test_the_record_of_a_run_is_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "--method", "wudi", "-b", "base", "-m", "a", "-m", "b", "--set", "steps=3", "--set", "lr=2e-5", "-q"]
    assert run(capsys, *arguments, "-o", "one")[0] == 0
    assert json.loads(Path("one/thetau.json").read_text())["recipe"]["method"]["lr"] == 2e-5
    code, text = run(capsys, "merge", "one/thetau.json", "-q", "-o", "two")
    assert code == 0, text
    one, two = (load_file(f"{name}/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_models_of_one_name_are_told_apart_whatever_their_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (folder / f"{name}2").mkdir()
        (folder / name).rename(folder / f"{name}2" / "model")
    common = ["merge", "--method", "dare_linear", "-b", "base", "-q"]
    assert run(capsys, *common, "-m", "a2/model", "-m", "b2/model", "-o", "one")[0] == 0
    assert run(capsys, *common, "-m", "b2/model", "-m", "a2/model", "-o", "two")[0] == 0
    one, two = (load_file(f"{name}/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, text = run(capsys, "inspect", "base", "a2/model", "b2/model", "-q", "--json", "seen.json")
    assert code == 0, text
    assert json.loads(Path("seen.json").read_text())["compared"] == ["a2/model", "b2/model"]
    code, text = run(capsys, *common, "-m", "t=a2/model", "-m", "t=b2/model", "-o", "three")
    assert code == 1
    assert "models: the name 't' stands twice" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["scale={per_pattern: {'*.layre.0.*': 1, '*': 0.3}}"], "scale.per_pattern: the pattern '*.layre.0.*' matches no tensor"),
        (["scale={per_pattern: {'*.layer.0.*': 1}}"], "no pattern fits"),
        (["scale={per_task: {a: 1, c: 2}}"], "no value for the task 'b'"),
    ],
)
def test_fields_that_vary_are_checked_before_anything_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], fields: list[str], message: str
) -> None:
    sets = [argument for field in fields for argument in ("--set", field)]
    code, text = run(capsys, "merge", "--method", "task_arithmetic", *sets, "-b", "base", "-m", "a", "-m", "b", "--dry-run")
    assert code == 1
    assert message in text


def test_a_pattern_that_fits_nothing_is_named_beside_one_that_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = "tensors=['encoder.layre.*', 'encoder.layer.0.*']"
    code, text = run(capsys, "merge", "--method", "wudi", "--set", tensors, "-b", "base", "-m", "a", "-o", "x")
    assert code == 1
    assert "tensors: the pattern 'encoder.layre.*' matches no tensor" in text
    code, text = run(
        capsys,
        "merge",
        "--method",
        "awd",
        "--set",
        "then=wudi",
        "--set",
        "then.elsewhere=sum",
        "-b",
        "base",
        "-m",
        "a",
        "-o",
        "x",
    )
    assert code == 1
    assert "must leave `elsewhere` to awd" in text


def test_what_is_not_merged_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "merge", "--method", "wudi", "--set", "steps=1", "-b", "base", "-m", "a", "-o", "out")
    assert code == 0, text
    assert "stay the base's: 'embeddings.word_embeddings.weight'" in text
    record = json.loads(Path("out/thetau.json").read_text())
    assert record["not_merged"]["logit_scale"] == "base"
    assert record["not_merged"]["embeddings.position_ids"].startswith("int64")


def test_a_damaged_model_does_not_hide_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file("b/model.safetensors")
    weights["logit_scale"] = torch.tensor(float("nan"))
    save_file(weights, "b/model.safetensors")
    code, text = run(capsys, "inspect", "base", "a", "b", "-q", "--tensors")
    assert code == 0, text
    assert "'logit_scale' holds 1 NaN" in text
    assert "encoder.layer.1.output.dense.weight" in text
    code, text = run(capsys, "inspect", "base", "a", "-q", "--json", "new/deep/x.json")
    assert code == 0, text
    assert json.loads(Path("new/deep/x.json").read_text())["base"]
    for place, said in (("base/config.json/x.json", "config.json is a file"), ("new", "new: is a folder")):
        code, text = run(capsys, "inspect", "base", "a", "--json", place)
        assert code == 1
        assert said in text


def test_inspect_tells_what_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_weights(5)
    write_model(folder / "stranger", other)
    short = {name: value for name, value in shifted(other, 1).items() if "output.dense" not in name}
    write_model(folder / "short", short)
    code, text = run(capsys, "inspect", "base", "a", "b", "stranger", "short", "-q", "--json", "seen.json")
    assert code == 0, text
    assert "stranger: its task vector has 1." in text
    assert "stranger is" not in text
    assert "probably not its base" in text
    assert "short: short: lacks 4 tensors" in text
    seen = json.loads(Path("seen.json").read_text())
    assert seen["compared"] == ["a", "b", "stranger"]
    assert [model["fits_base"] for model in seen["models"]] == [True, True, False, None]
    base, a, b = (thetau.open(name) for name in ("base", "a", "b"))
    assert seen["cosine"][0][1] == pytest.approx((a - base).cosine(b - base))
    code, text = run(capsys, "inspect", "base", "a", "b", "-q")
    assert "base looks like the base of all 2 models" in text


def test_inspect_sees_a_common_direction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = shifted(random_weights(0), 77, 0.1)
    write_model(folder / "true-base", far)
    for seed, name in enumerate(("c", "d")):
        write_model(folder / name, shifted(far, seed, 0.003))
    code, text = run(capsys, "inspect", "base", "c", "d", "-q")
    assert code == 0, text
    assert "share another base" in text


def test_vector_verbs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    base, a, b = (load_file(f"{model}/model.safetensors")[name] for model in ("base", "a", "b"))
    common = ["-b", "base", "-q"]
    assert run(capsys, "vector", "extract", *common, "-m", "a", "-o", "a.safetensors")[0] == 0
    assert torch.equal(load_file("a.safetensors")[name], a - base)
    assert run(capsys, "vector", "negate", *common, "-m", "a.safetensors", "--scale", "0.5", "-o", "negated")[0] == 0
    assert torch.allclose(load_file("negated/model.safetensors")[name], base - 0.5 * (a - base), atol=1e-6)
    assert run(capsys, "vector", "add", *common, "-v", "a", "-v", "b", "-s", "0.5", "-s", "0.25", "-o", "added")[0] == 0
    assert torch.allclose(load_file("added/model.safetensors")[name], base + 0.5 * (a - base) + 0.25 * (b - base), atol=1e-6)
    assert run(capsys, "vector", "apply", *common, "-v", "a.safetensors", "-o", "applied")[0] == 0
    assert torch.allclose(load_file("applied/model.safetensors")[name], a, atol=1e-6)
    arguments = ["vector", "analogy", *common, "--a", "a", "--b", "b", "--c", "a.safetensors", "--vector-only", "-o", "analogy"]
    assert run(capsys, *arguments)[0] == 0
    assert torch.allclose(load_file("analogy/model.safetensors")[name], b - base, atol=1e-6), "A is C here, so B is left"
    code, text = run(capsys, "vector", "info", "a.safetensors", "-q")
    assert code == 0, text
    assert "task vector of 16 tensors" in text
    assert f"norm {(thetau.open('a') - thetau.open('base')).norm():.6g}" in text
    code, text = run(capsys, "vector", "info", "a")
    assert code == 1
    assert "thetau vector extract" in text
    code, text = run(capsys, "vector", "add", *common, "-v", "a", "-s", "1", "-s", "2", "-o", "x")
    assert code == 1
    assert "once a vector (1)" in text


def test_methods_lists_and_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text = run(capsys, "methods")
    assert code == 0
    assert all(name in text for name in thetau.methods.names())
    code, text = run(capsys, "methods", "wudi")
    assert "gradient_flow" in text
    assert "2503.08099" in text
    code, text = run(capsys, "methods", "wuddi")
    assert code == 1
    assert "Did you mean 'wudi'" in text


def test_methods_are_filtered_by_what_they_are_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text = run(capsys, "methods", "--for", "no-base")
    assert code == 0
    assert "karcher" in text
    assert "task_arithmetic" not in text
    code, text = run(capsys, "methods", "--for", "data-free", "--for", "lora", "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert {"wudi", "star"} <= set(rows)
    assert "ties" not in rows
    assert (rows["wudi"]["passes"], rows["wudi"]["reads"], rows["wudi"]["suits"]) == (1, "stream", ["lora"])
    code, text = run(capsys, "methods", "fisher")
    assert "base: yes; models: any number; data: fisher; passes over the inputs: 2; reads: block" in text
    code, text = run(capsys, "methods", "iso_c")
    assert "Use it where a few directions" in text
    code, text = run(capsys, "methods", "--for", "lore")
    assert code == 1
    assert "Did you mean 'lora'" in text
    code, text = run(capsys, "methods", "wudi", "--for", "lora")
    assert code == 1
    assert "is one method" in text
    code, text = run(capsys, "methods", "--help")
    assert all(purpose in text for purpose in PURPOSES)


def test_task_heads_are_left_out_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        weights = load_file(f"{name}/model.safetensors")
        save_file(weights | {"classifier.weight": torch.ones(3, 8)}, f"{name}/model.safetensors")
    code, text = run(capsys, "merge", "--method", "average", "-b", "base", "-m", "a", "-m", "b", "-o", "out")
    assert code == 1
    assert "classifier.weight" in text
    assert "`exclude: [pattern]`" in text
    code, text = run(
        capsys, "merge", "--method", "average", "-b", "base", "-m", "a", "-m", "b", "--exclude", "classifier.*", "-o", "out"
    )
    assert code == 0, text
    assert "1 tensors are excluded and left out: 'classifier.weight'" in text
    assert "classifier.weight" not in load_file("out/model.safetensors")


def test_fields_on_the_command_line() -> None:
    assert parse_fields(["density=0.1", "lr=1e-3", "trim=tensor", "balance=false"]) == {
        "density": 0.1,
        "lr": 0.001,
        "trim": "tensor",
        "balance": False,
    }
    nested = {"then": {"name": "ties", "density": 0.2}}
    assert parse_fields(["then=ties", "then.density=0.2"]) == nested
    assert parse_fields(["then.density=0.2", "then=ties"]) == nested
    with pytest.raises(RecipeError, match="field=value"):
        parse_fields(["density"])
