"""Twin-Merging's router: its fit against a plain module, routed passes against each input by itself, its files, and `thetau evaluate` with it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from commands import run
from thetau.compression import parts_beside
from thetau.errors import CheckpointError, DataError, OutputError
from thetau.evidence import TwinConfig, learn_router
from thetau.evidence.files import read_facts
from thetau.evidence.twin import TaskRouter, fit, logits, read_router, router_file
from thetau.facade import open_base
from thetau.finetune.batches import training_batches
from thetau.models import load_encoder, read_weights, weights_hash
from thetau.studies import Evaluate, evaluate_checkpoint
from thetau.studies import routed as room
from thetau.tasks import load_task
from tiny import one_thread as one_thread
from tiny_language import folder_of
from tiny_world import NAMES, World

CONFIG = TwinConfig(hidden=8, epochs=6, lr=0.02, batch=8, max_length=24)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("twin"))
    for method in ("twin", "emr"):
        given = {"base": str(world.base), "models": [{"path": str(p), "name": p.name} for p in world.models], "method": method}
        (world.base.parent / f"{method}.yaml").write_text(yaml.safe_dump(given))
        from typer.testing import CliRunner

        from thetau.cli.app import app

        words = [
            "merge",
            str(world.base.parent / f"{method}.yaml"),
            "-o",
            str(world.base.parent / f"by-{method}"),
            "--quiet",
            "--tasks",
        ]
        assert CliRunner().invoke(app, words).exit_code == 0
    return world


@pytest.fixture(params=["twin", "emr"])
def merged(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return shutil.copytree(world.base.parent / f"by-{request.param}", tmp_path / "merged")


def tasks_of(world: World) -> dict[str, Any]:
    return {name: load_task(name, world.data) for name in NAMES}


def test_the_fit_is_that_of_a_plain_module() -> None:
    read = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    told = torch.tensor([0] * 20 + [1] * 6 + [2] * 4)
    config = TwinConfig(hidden=7, epochs=3, lr=0.01, batch=8, seed=4)
    start = fit(read, told, 3, replace(config, epochs=0))
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter, name in zip(module.parameters(), ("first", "first_bias", "second", "second_bias"), strict=True):
            parameter.copy_(start[name])
    assert start["first"].shape == (7, 5)
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    picks = training_batches([1] * 30, 8, 4)
    weight = torch.tensor([30 / 60, 30 / 18, 30 / 12])  # every task weighs alike
    for _ in range(3 * 4):
        batch = next(picks)
        adam.zero_grad()
        nn.functional.cross_entropy(module(read[batch]), told[batch], weight=weight).backward()
        adam.step()
    torch.testing.assert_close(logits(fit(read, told, 3, config), read), module(read).detach(), rtol=1e-4, atol=1e-5)


def test_tasks_that_lie_apart_are_told_apart() -> None:
    centre = torch.eye(3).repeat_interleave(20, 0)
    read = centre + 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    told = torch.arange(3).repeat_interleave(20)
    made = fit(read, told, 3, TwinConfig(hidden=16, lr=0.02))
    assert bool((logits(made, read).argmax(-1) == told).all())
    with pytest.raises(DataError, match="the features of the merged model must be finite"):
        fit(read * float("nan"), told, 3, TwinConfig())


def router(mode: str, sharp: float = 1.0) -> TaskRouter:
    """One that is often wrong."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "first": torch.randn(6, 16, generator=generator),
        "first_bias": torch.zeros(6),
        "second": sharp * torch.randn(3, 6, generator=generator),
        "second_bias": torch.zeros(3),
    }
    return TaskRouter(tasks=NAMES, tensors=tensors, mode=mode)


def parts(world: World, merged: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_weights(merged), dict(parts_beside(merged, open_base(str(world.base))))


def alone(world: World, weights: dict[str, Tensor], models: dict[str, Any], routing: TaskRouter, task: str) -> Tensor:
    """Each input by itself: the merged model, the router, then weights of its own."""
    encoder, inputs = load_encoder(world.base), world.session.evaluator.inputs(task, "test")
    encoder.load(weights, "merged")
    states = {name: models[name].state_dict() for name in NAMES}
    rows = []
    for place in range(len(inputs)):
        columns = inputs.batch([place])
        shares = routing(encoder.module(**columns)).softmax(-1)[0]
        if routing.mode == "top":
            shares = nn.functional.one_hot(shares.argmax(), 3).float()
        own = {
            f"backbone.{live}": weights[stored]
            + sum(share * (states[name][stored] - weights[stored]) for share, name in zip(shares, NAMES, strict=True))
            for live, stored in encoder.names.items()
        }
        rows.append(functional_call(encoder.module, own, (), columns))
    return torch.cat(rows).detach()


@pytest.mark.parametrize("mode", ["soft", "top"])
def test_a_routed_pass_is_that_of_each_input_by_itself(
    world: World, merged: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, models = parts(world, merged)
    evaluator, routing = world.session.evaluator, router(mode)
    read: dict[str, Tensor] = {}
    judge = evaluator.judge

    def seen(task: str, split: str, features: Tensor) -> Any:
        read[task] = features
        return judge(task, split, features)

    monkeypatch.setattr(evaluator, "judge", seen)
    found, right = room.measure_routed(evaluator, routing, weights, models, ["animals", "weather"], "test")
    for task in ("animals", "weather"):
        want = alone(world, weights, models, routing, task)
        torch.testing.assert_close(read[task], want, rtol=1e-3, atol=1e-4)
        assert found[task] == judge(task, "test", read[task])[0]
    plain = evaluator.features(weights, "animals", "test")
    assert right["animals"] == pytest.approx(float((routing(plain).argmax(-1) == 0).float().mean()))


def test_a_sharp_router_mixes_nothing(world: World, merged: Path) -> None:
    """Probabilities of 0 and 1: the mixture is the likeliest task's model, up to what (θ* + (θ_t − θ*)) − θ_t rounds."""
    weights, models = parts(world, merged)
    both = [
        room.measure_routed(world.session.evaluator, router(mode, 1e4), weights, models, ["third"], "test")
        for mode in ("soft", "top")
    ]
    assert both[0][0]["third"].value == pytest.approx(both[1][0]["third"].value, abs=1 / 20)
    assert both[0][1] == both[1][1]


def test_a_router_that_is_right_is_the_tasks_name(world: World, merged: Path) -> None:
    weights, models = parts(world, merged)
    told = {name: {"second": torch.zeros(3, 6), "second_bias": 99.0 * torch.eye(3)[place]} for place, name in enumerate(NAMES)}
    for name, more in told.items():
        always = replace(router("top"), tensors={**router("top").tensors, **more})
        found, right = room.measure_routed(world.session.evaluator, always, weights, models, [name], "test")
        assert right == {name: 1.0}
        assert found == world.session.evaluator.evaluate(models[name].state_dict(), "test", [name])


def test_the_file_and_what_is_refused(world: World, merged: Path, tmp_path: Path) -> None:
    encoder, weights, path = load_encoder(world.base), read_weights(merged), router_file(merged)
    result = learn_router(encoder, tasks_of(world), weights, path, CONFIG)
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert (result.tasks, result.examples) == (NAMES, dict.fromkeys(NAMES, 20))
    assert 0 <= result.held <= 1
    assert result.learned > 1 / 3, "better than chance"
    assert learn_router(encoder, tasks_of(world), weights, path, CONFIG) == replace(result, cached=True)
    whole = learn_router(encoder, tasks_of(world), weights, tmp_path / "whole.safetensors", replace(CONFIG, hold=0))
    assert math.isnan(whole.held)
    assert read_router(path, weights).mode == "soft"
    with pytest.raises(OutputError, match=r"hold this very router\. It holds one of the merged model"):
        learn_router(encoder, tasks_of(world), weights, path, replace(CONFIG, mode="top"))
    with pytest.raises(DataError, match="was learned for another merged model, the merged model, than the one that is measured"):
        read_router(path, read_weights(world.models[0]))
    facts = {f"thetau.{name}": value for name, value in read_facts(path, "twin-router").items()}
    save_file({"first": load_file(path)["first"]}, tmp_path / "damaged.safetensors", metadata=facts)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: is damaged, 'first_bias' is missing"):
        read_router(tmp_path / "damaged.safetensors", weights)
    new = tmp_path / "new.safetensors"
    with pytest.raises(DataError, match=r"a router tells tasks apart, and needs two at least\. Got animals"):
        learn_router(encoder, {"animals": tasks_of(world)["animals"]}, weights, new, CONFIG)
    with pytest.raises(DataError, match=r"task 'animals': all its 20 examples are held back \(`hold=1`\)"):
        learn_router(encoder, tasks_of(world), weights, new, replace(CONFIG, hold=1))
    with pytest.raises(DataError, match="is of kind text_to_text, whose outputs are of a task already"):
        learn_router(load_encoder(folder_of(tmp_path / "language", "t5")), tasks_of(world), weights, new, CONFIG)
    weights, models = parts(world, merged)
    del models["third"]
    with pytest.raises(DataError, match="its router knows the task 'third', for which nothing lies beside the model"):
        room.measure_routed(world.session.evaluator, router("top"), weights, models, ["animals"], "test")
    encoder.load(weights, "another")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        learn_router(encoder, tasks_of(world), weights, new, CONFIG)


def test_the_command_and_evaluate(world: World, merged: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--base", str(world.base), "--data", str(world.data)]
    told = ["--mode", "top", "--json", str(tmp_path / "facts.json")]
    code, text = run(
        capsys,
        "evidence",
        "twin",
        "--merged",
        str(merged),
        *common,
        "--max-length",
        "24",
        "--set",
        "lr=0.02",
        *told,
    )
    assert code == 0, text
    assert "tells 3 tasks apart" in text
    assert json.loads((tmp_path / "facts.json").read_text())["mode"] == "top"
    measure = ["evaluate", "--model", str(merged), *[word for name in NAMES for word in ("--task", name)], *common, "--json"]
    code, text = run(capsys, *measure, str(tmp_path / "routed.json"))
    assert code == 0, text
    assert "chosen by the router" in " ".join(text.split())
    code, text = run(capsys, *measure, str(tmp_path / "named.json"), "--no-router")
    assert code == 0, text
    by_router, by_name = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("routed", "named"))
    assert (by_router["own"], by_name["own"]) == ([], list(NAMES))
    assert sorted(by_router["routed"]) == sorted(NAMES)
    assert by_name["routed"] == {}
    assert evaluate_checkpoint(merged, world.session, Evaluate(tasks=False)).routed == {}
    plain = shutil.copytree(world.models[0], tmp_path / "plain")
    code, text = run(capsys, "evidence", "twin", "--merged", str(plain), *common)
    assert (code, "nothing lies beside this model for single tasks" in text) == (1, True)
