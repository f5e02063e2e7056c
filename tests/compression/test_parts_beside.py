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
from thetau.evidence import SurgeryConfig, learn_surgery
from thetau.evidence.surgery import surgery_file
from thetau.facade import open_base
from thetau.methods import build
from thetau.models import load_encoder, read_weights
from thetau.studies import Evaluate, evaluate_checkpoint
from thetau.tasks import load_task
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


def test_a_correction_of_the_merged_model_is_none_of_a_tasks_own(world: World, tmp_path: Path) -> None:
    """Representation Surgery was learned on features that a task with a model of its own does not have."""
    assert merge(world, tmp_path, METHODS["emr"], "--tasks").exit_code == 0
    folder, reading = tmp_path / "merged", Reading(data=world.data)
    merged, config = read_weights(folder), SurgeryConfig(updates=3, rank=2, max_length=24)
    for name, path in zip(NAMES, world.models, strict=True):
        learn_surgery(
            load_encoder(world.base), load_task(name, world.data), merged, read_weights(path), surgery_file(folder, name), config
        )
    alone = evaluate_checkpoint(folder, Session.open(world.models, base=world.base, reading=reading), Evaluate(surgery=False))
    told = evaluate_checkpoint(folder, Session.open(world.models, base=world.base, reading=reading))
    assert (told.own, told.corrected, told.tasks) == (NAMES, (), alone.tasks)
    without = evaluate_checkpoint(folder, Session.open(world.models, base=world.base, reading=reading), Evaluate(tasks=False))
    assert (without.own, without.corrected) == ((), NAMES)


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
    words = ["merge", "--method", "emr", "--tasks", "-b", world.base, "-o", tmp_path / "merged", "--quiet"]
    for number, name in enumerate(NAMES[:2]):  # as suites keep models: in folders that are not called by their tasks
        words += ["-m", shutil.copytree(world.models[number], tmp_path / "runs" / name / "d62560ef")]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert f"is called '{NAMES[0]}/d62560ef', by which `evaluate` finds no task. Name it: {{path: " in str(done.exception)
    assert f"name: {NAMES[1]}}}" in str(done.exception)
    assert not (tmp_path / "merged").exists()
    words = [f"{part.parent.name}={part}" if isinstance(part, Path) and part.name == "d62560ef" else part for part in words]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(parts_beside(tmp_path / "merged", open_base(str(world.base)))) == sorted(NAMES[:2])
    done = merge(world, tmp_path, "emr", "--tasks", name="merged.safetensors")
    assert "goes into the model's folder on a disk" in str(done.exception)
