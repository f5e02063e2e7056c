"""`thetau verify`: what was written is still there, and is what the recipe says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import thetau
from fixtures import random_weights, shifted, write_model
from thetau.cli.app import app
from thetau.errors import CheckpointError

RUN = CliRunner()


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = random_weights(0)
    write_model(tmp_path / "base", base)
    for index in (1, 2):
        write_model(tmp_path / f"m{index}", shifted(base, index))
    recipe = {"base": "base", "models": ["m1", "m2"], "method": {"name": "ties", "density": 0.4}, "shard_size": "1KB"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    result = RUN.invoke(app, ["merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def run(*arguments: object) -> tuple[int, str]:
    result = RUN.invoke(app, ["verify", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_a_good_output(merged: Path) -> None:
    code, said = run(merged, "--again", "--recipe", merged.parent / "recipe.yaml")
    assert code == 0, said
    assert "good against thetau.json, the recipe, a new run" in said
    found = thetau.verify(merged)
    assert found.good and found.tensors == len(random_weights(0)) and found.against == ("thetau.json",)


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return folder / index["weight_map"][name]


def change(name: str, how: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = shard_of(folder, name)
        weights = load_file(file)
        how(weights)
        file.chmod(0o644)
        save_file(weights, file)

    return apply


NAME = "encoder.layer.0.intermediate.dense.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit": (change(NAME, lambda w: w[NAME].view(torch.int32).bitwise_xor_(1)), "its bytes are not those that were written"),
    "nan": (change(NAME, lambda w: w[NAME][0, 0].fill_(float("nan"))), "1 values are not finite"),
    "dtype": (change(NAME, lambda w: w.update({NAME: w[NAME].double()})), r"is float64 \[16, 8\]; float32 \[16, 8\] was written"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(merged: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(merged)
    found = thetau.verify(merged)
    assert not found.good
    assert any(NAME in problem for problem in found.problems)
    with pytest.raises(AssertionError, match=message):
        assert not found.problems, "\n".join(found.problems)
    code, said = run(merged)
    assert code == 1 and NAME in said


def test_another_recipe(merged: Path) -> None:
    recipe = merged.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("0.4", "0.5"), encoding="utf-8")
    code, said = run(merged, "--recipe", recipe)
    assert code == 1 and "recipe: `method` is" in said and "0.4" in said


def test_inputs_that_changed_since(merged: Path) -> None:
    write_model(merged.parent / "m1", shifted(random_weights(0), 7))
    code, said = run(merged, "--again")
    assert code == 1
    assert "this input has changed since the output was made" in said
    assert "a new run gives other bits" in said


def test_missing_and_added_tensors(merged: Path) -> None:
    record = merged / "thetau.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["tensors"]["gone"] = content["tensors"].pop(NAME)
    record.write_text(json.dumps(content), encoding="utf-8")
    problems = thetau.verify(merged).problems
    assert "'gone': is missing." in problems
    assert f"'{NAME}': was not written by this run." in problems


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tensors": 3}', '{"tensors": {"a": {"dtype": 1}}}', "[" * 100_000])
def test_a_damaged_record(merged: Path, content: str) -> None:
    (merged / "thetau.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"thetau\.json: damaged"):
        thetau.verify(merged)


def test_an_output_without_a_record(tmp_path: Path) -> None:
    write_model(tmp_path / "other", random_weights(0))
    with pytest.raises(CheckpointError, match=r"has no thetau\.json"):
        thetau.verify(tmp_path / "other")


def test_made_in_python(tmp_path: Path) -> None:
    base = thetau.open(random_weights(0), name="base")
    (base * 0.5 + base * 0.5).save(tmp_path / "out")
    assert thetau.verify(tmp_path / "out").good
    with pytest.raises(CheckpointError, match=r"made in Python.*Leave `--again` out"):
        thetau.verify(tmp_path / "out", again=True)


def test_a_single_file(tmp_path: Path) -> None:
    thetau.open(random_weights(0), name="base").save(tmp_path / "out.safetensors")
    code, said = run(tmp_path / "out.safetensors")
    assert code == 0 and "itself alone" in said
