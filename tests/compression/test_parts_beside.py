"""What a method makes for single tasks: kept beside the merged model, and measured by `evaluate` and suites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import thetau
from thetau.cli.app import app
from thetau.compression import parts_beside
from thetau.errors import CheckpointError
from thetau.evaluate import Session
from thetau.evaluate.options import Reading
from thetau.facade import open_base
from thetau.methods import build
from thetau.studies import Evaluate, evaluate_checkpoint
from tiny import one_thread as one_thread
from tiny_world import NAMES, World

METHODS = {
    "emr": {"name": "emr"},
    "tall": {"name": "tall_masks"},
    "twin": {"name": "twin", "density": 0.25},
    "twin of ties": {"name": "twin", "then": "ties", "keep": "magnitude"},
    "twin at random": {"name": "twin", "keep": "bernoulli"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("beside"))


def merge(world: World, folder: Path, method: Any, *words: str, name: str = "merged") -> Any:
    models = [{"path": str(path), "name": path.name} for path in world.models]
    (folder / "r.yaml").write_text(yaml.safe_dump({"base": str(world.base), "models": models, "method": method}))
    return CliRunner().invoke(app, ["merge", str(folder / "r.yaml"), "-o", str(folder / name), "--quiet", *words])


def made(world: World, method: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The tasks' models, as the library makes them in memory."""
    base = thetau.open(world.base)
    vectors = [thetau.open(path) - base for path in world.models]
    built = build(method["name"], {key: value for key, value in method.items() if key != "name"})
    outputs = thetau.outputs(vectors, built, names=NAMES)
    return {task: (base + vector).state_dict() for task, vector in outputs.items()}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_tasks_models_are_those_of_the_method(world: World, tmp_path: Path, method: dict[str, Any]) -> None:
    done = merge(world, tmp_path, method, "--tasks")
    assert done.exit_code == 0, (done.output, done.exception)
    found = parts_beside(tmp_path / "merged", open_base(str(world.base)))
    want = made(world, method)
    assert sorted(found) == sorted(NAMES)
    for task, expression in found.items():
        got = expression.state_dict()
        assert set(got) == set(want[task])
        for name, tensor in want[task].items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{task} {name}")
    if method["name"] == "emr":
        assert [path.name for path in (tmp_path / "merged/tasks").iterdir()] == ["masks.safetensors"]


@pytest.mark.parametrize("method", [METHODS["emr"], METHODS["twin"]], ids=["emr", "twin"])
def test_evaluate_measures_each_task_with_its_own(world: World, tmp_path: Path, method: dict[str, Any]) -> None:
    assert merge(world, tmp_path, method, "--tasks").exit_code == 0
    reading = Reading(data=world.data)
    session = Session.open(world.models, base=world.base, reading=reading)
    want = {
        task: session.evaluator.evaluate(weights, "test", [task])[task].value for task, weights in made(world, method).items()
    }
    plain = session.evaluator.evaluate(thetau.open(tmp_path / "merged").state_dict(), "test")
    told = evaluate_checkpoint(tmp_path / "merged", session)
    assert told.own == NAMES
    for task in NAMES:
        assert told.tasks[task].value == pytest.approx(want[task], abs=1 / 40 + 1e-9)
    without = evaluate_checkpoint(tmp_path / "merged", session, Evaluate(tasks=False))
    assert (without.own, without.tasks) == ((), plain)
    words = ["evaluate", "-m", tmp_path / "merged", "-t", "animals", "-b", world.base, "--data", world.data]
    done = CliRunner().invoke(app, [*map(str, words), "--json", str(tmp_path / "e.json")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "with what was made for 1 of the tasks" in " ".join(done.output.split())
    assert json.loads((tmp_path / "e.json").read_text())["own"] == ["animals"]


def test_parts_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    assert merge(world, tmp_path, METHODS["twin"], "--tasks").exit_code == 0
    assert merge(world, tmp_path, METHODS["emr"], "--tasks", name="masks").exit_code == 0
    assert merge(world, tmp_path, "average", name="other").exit_code == 0
    shutil.copytree(tmp_path / "merged/tasks", tmp_path / "other/tasks")
    base = open_base(str(world.base))
    with pytest.raises(
        CheckpointError, match=r"was not made over .* as it is now\. Merge again with `--tasks`, or remove the file"
    ):
        parts_beside(tmp_path / "other", base)
    with pytest.raises(CheckpointError, match=r"masks\.safetensors.*: was not made over"):
        parts_beside(tmp_path / "masks", open_base(str(world.models[0])))
    assert parts_beside(tmp_path, base) == {}


def test_what_has_no_parts_is_told_before_the_merge(world: World, tmp_path: Path) -> None:
    done = merge(world, tmp_path, "ties", "--tasks")
    assert done.exit_code == 1
    assert "`ties` makes nothing for single tasks. `emr`, `tall_masks` and `twin` do." in str(done.exception)
    assert not (tmp_path / "merged").exists()
    done = merge(world, tmp_path, "emr", "--tasks", name="merged.safetensors")
    assert "goes into the model's folder on a disk" in str(done.exception)
