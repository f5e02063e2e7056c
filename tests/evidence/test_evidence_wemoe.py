"""WEMoE: the mixed pass and its first steps against a plain loop over examples, its laws, its files, and `thetau evaluate` with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

import thetau
from commands import run
from thetau.errors import AlignmentError, CheckpointError, DataError, OutputError, RecipeError
from thetau.evidence import MixtureConfig, learn_mixture
from thetau.evidence import wemoe as room
from thetau.evidence.wemoe import Learner, mixture_file, read_mixture
from thetau.finetune.batches import training_batches
from thetau.finetune.lesson import Lesson
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.models import mixture as running_room
from thetau.models.mixture import Mixture, Router, mixing, mlp_blocks
from thetau.studies import Evaluate, evaluate_checkpoint
from thetau.tasks import encode, load_task, make_head
from tiny import one_thread as one_thread
from tiny_language import folder_of
from tiny_vision import made, saved
from tiny_world import NAMES, World

CONFIG = MixtureConfig(steps=4, lr=0.05, batch=6, max_length=24, seed=3)
BLOCK = "encoder.layer.0"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("wemoe"))
    base: Any = thetau.open(world.base)
    merged = thetau.merge([thetau.open(path) - base for path in world.models], thetau.methods.TaskArithmetic())
    (base + merged).save(world.base.parent / "merged")
    return world


@pytest.fixture
def merged(world: World, tmp_path: Path) -> Path:
    return shutil.copytree(world.base.parent / "merged", tmp_path / "merged")


def expressions(world: World) -> dict[str, Any]:
    base: Any = thetau.open(world.base)
    return {path.name: (thetau.open(path) - base).named(path.name) for path in world.models}


def lessons(encoder: Encoder, world: World) -> list[Lesson]:
    found = []
    for name in NAMES:
        task = load_task(name, world.data)
        found.append(
            Lesson(
                name=name, inputs=encode(encoder, task, "validation", max_length=24), head=make_head(encoder, task, max_length=24)
            )
        )
    return found


def mixture_of(encoder: Encoder, world: World, given: list[Lesson], depth: int = 2) -> Mixture:
    blocks = mlp_blocks(encoder, given[0].inputs.batch([0]))
    generator = torch.Generator().manual_seed(3)
    routers = {block: Router.drawn(depth, 16, 3, 0.3, generator) for block in blocks}
    held = [vector.state_dict() for _, vector in sorted(expressions(world).items())]
    names = running_room.mixed_names(encoder, blocks)
    return Mixture(tasks=NAMES, blocks=blocks, routers=routers, vectors={n: torch.stack([one[n] for one in held]) for n in names})


def plainly(
    encoder: Encoder,
    mixture: Mixture,
    base: Mapping[str, Tensor],
    routers: Mapping[str, Mapping[str, Tensor]],
    columns: Mapping[str, Tensor],
) -> Tensor:
    """Each example by itself, without padding, through the whole model with weights of its own; the tiny model has one block."""
    (block,) = mixture.blocks
    entered: list[Tensor] = []
    first = encoder.backbone.get_submodule(f"{block}.intermediate.dense")
    rows = []
    for number in range(len(columns["input_ids"])):
        length = int(columns["attention_mask"][number].sum())
        alone = {name: column[number : number + 1, :length] for name, column in columns.items()}
        handle = first.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        encoder.module(**alone)
        handle.remove()
        h, known = entered.pop()[0], routers[block]
        told = known["second_bias"][None]
        if "first" in known:
            h = (h @ known["first"].T + known["first_bias"]).relu()
        if "second" in known:
            told = h @ known["second"].T + known["second_bias"]
        share = told.mean(0)
        weights = {
            f"backbone.{live}": base[name] + (share.reshape(-1, *[1] * base[name].ndim) * mixture.vectors[name]).sum(0)
            for live, name in encoder.names.items()
            if name in mixture.vectors
        }
        rows.append(functional_call(encoder.module, weights, (), alone))
    return torch.cat(rows)


def test_the_mlps_are_found_in_the_order_in_which_they_run(world: World) -> None:
    encoder = load_encoder(world.base)
    found = mlp_blocks(encoder, lessons(encoder, world)[0].inputs.batch([0]))
    assert found == {BLOCK: (f"{BLOCK}.intermediate.dense.weight", f"{BLOCK}.output.dense.weight")}
    assert running_room.mixed_names(encoder, found)[1] == f"{BLOCK}.intermediate.dense.bias"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("entries", [1 << 24, 1], ids=["together", "one by one"])
def test_the_pass_and_its_gradient_are_those_of_each_example_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, depth: int, entries: int
) -> None:
    monkeypatch.setattr(running_room, "_ENTRIES", entries)
    encoder = load_encoder(world.base)
    given = lessons(encoder, world)
    base = encoder.weights(exact=True)
    mixture = mixture_of(encoder, world, given, depth)
    encoder.load(read_weights(world.base.parent / "merged"), "merged")
    for parameter in encoder.module.parameters():
        parameter.requires_grad_(False)
    columns = given[0].inputs.batch([0, 1, 2, 5])
    assert not bool(columns["attention_mask"].all()), "some are padded"
    noise = torch.Generator().manual_seed(1)
    routers = {
        block: {
            name: (tensor + 0.3 * torch.randn(tensor.shape, generator=noise)).requires_grad_()
            for name, tensor in router.tensors.items()
        }
        for block, router in mixture.routers.items()
    }
    moved = replace(mixture, routers={block: Router(tensors=parts) for block, parts in routers.items()})
    before = encoder.module(**columns)
    weigh = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    with mixing(encoder, moved, base) as (same, told):
        made = same.module(**columns)
        assert told.shares[BLOCK].shape == (4, 3)
        assert (same.form != encoder.form) and same.form == encoder.form + f", mixture {moved.hash()}"
        (made * weigh).sum().backward()
    got = {name: tensor.grad.clone() for name, tensor in routers[BLOCK].items() if tensor.grad is not None}
    for tensor in routers[BLOCK].values():
        tensor.grad = None
    want = plainly(encoder, moved, base, routers, columns)
    (want * weigh).sum().backward()
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
    assert sorted(got) == sorted(routers[BLOCK])
    for name, tensor in routers[BLOCK].items():
        assert tensor.grad is not None
        torch.testing.assert_close(got[name], tensor.grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(encoder.module(**columns), before, rtol=0, atol=0, msg="something is left behind")


def load(encoder: Encoder, world: World) -> torch.nn.Module:
    encoder.load(read_weights(world.base.parent / "merged"), "merged")
    return encoder.module


def test_the_first_steps_are_those_of_a_plain_loop(world: World) -> None:
    """Adam with a step that falls as a cosine, on the summed entropy of a batch of every task."""
    encoder = load_encoder(world.base)
    given = lessons(encoder, world)
    base = encoder.weights(exact=True)
    mixture = mixture_of(encoder, world, given)
    load(encoder, world)
    learner = Learner(encoder, mixture, base, given, CONFIG)
    assert learner.finish() is None
    routers = {
        block: {name: tensor.clone().requires_grad_() for name, tensor in router.tensors.items()}
        for block, router in mixture.routers.items()
    }
    adam = torch.optim.Adam(routers[BLOCK].values(), lr=0.05)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=4)
    picks = [training_batches(lesson.inputs.lengths, 6, f"3/{lesson.name}") for lesson in given]
    said = []
    for _ in range(4):
        adam.zero_grad()
        total = torch.zeros(())
        for lesson, pick in zip(given, picks, strict=True):
            read = plainly(encoder, mixture, base, routers, lesson.inputs.batch(next(pick)))
            shares = lesson.head.logits(read).softmax(-1)
            total = total - (shares * shares.log()).sum(-1).mean()
        total.backward()  # type: ignore[no-untyped-call]
        adam.step()
        falls.step()
        said.append(float(total.detach()))
    assert [math.fsum(row) for row in learner.entropies.history] == pytest.approx(said, rel=1e-4)
    assert said[-1] < said[0]
    for name, tensor in routers[BLOCK].items():
        # Adam divides by the root of a squared gradient, so an entry without any moves by rounding alone: compare what moves.
        torch.testing.assert_close(
            learner.parameters[f"{BLOCK}/{name}"].detach(), tensor.detach(), rtol=0.02, atol=4e-3, msg=name
        )


def test_a_router_of_depth_0_is_task_arithmetic(world: World, merged: Path) -> None:
    """Before the first step, with the same number everywhere."""
    encoder = load_encoder(world.base)
    learn_mixture(
        encoder,
        {name: load_task(name, world.data) for name in NAMES},
        expressions(world),
        read_weights(merged),
        mixture_file(merged),
        replace(CONFIG, steps=0, depth=0),
    )
    told = evaluate_checkpoint(merged, world.session)
    assert told.mixed == NAMES
    without = evaluate_checkpoint(merged, world.session, Evaluate(mixture=False))
    assert without.mixed == ()
    assert {name: one.value for name, one in told.tasks.items()} == {name: one.value for name, one in without.tasks.items()}
    weights, inputs = read_weights(merged), world.session.evaluator.inputs("animals", "test")
    plain = world.session.evaluator.features(weights, "animals", "test")
    with mixing(world.session.encoder, read_mixture(mixture_file(merged), weights, encoder.base_hash), world.session.weights) as (
        same,
        _,
    ):
        mixed = torch.cat([same.module(**inputs.batch([place])) for place in range(len(inputs))])
    torch.testing.assert_close(mixed.detach(), plain, rtol=1e-4, atol=1e-5)


def test_cut_off_and_resumed_it_has_the_same_bits(
    world: World, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {name: load_task(name, world.data) for name in NAMES}
    config = replace(CONFIG, steps=7, save_every=2, window=3)
    weights = read_weights(merged)

    def learn(path: Path, **more: Any) -> Any:
        return learn_mixture(load_encoder(world.base), tasks, expressions(world), weights, path, config, **more)

    whole = learn(tmp_path / "whole.safetensors")

    def stop(step: int, entropy: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut.safetensors", tick=stop)
    assert not (tmp_path / "cut.safetensors").exists()
    steps: list[int] = []
    resumed = learn(tmp_path / "cut.safetensors", tick=lambda step, entropy: steps.append(step))
    assert steps == [5, 6, 7]
    one, two = load_file(whole.path), load_file(resumed.path)
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert (resumed.entropy, resumed.shares) == (whole.entropy, whole.shares)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "the state is gone"


def test_the_file_and_what_is_refused(world: World, merged: Path, tmp_path: Path) -> None:
    encoder, weights = load_encoder(world.base), read_weights(merged)
    tasks = {name: load_task(name, world.data) for name in NAMES}
    path = mixture_file(merged)

    def learn(config: MixtureConfig = CONFIG, vectors: Any = None, path: Path = path) -> Any:
        return learn_mixture(encoder, tasks, expressions(world) if vectors is None else vectors, weights, path, config)

    result = learn()
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert (result.blocks, result.steps, result.examples) == (1, 4, dict.fromkeys(NAMES, 20))
    assert result.numbers == 16 * 16 + 16 + 3 * 16 + 3
    assert learn() == replace(result, cached=True)
    with pytest.raises(OutputError, match=r"hold this very mixture\. It holds one of the merged model"):
        learn(replace(CONFIG, seed=1))
    read = read_mixture(path, weights, encoder.base_hash)
    assert read.tasks == NAMES
    assert sorted(read.routers[BLOCK].tensors) == ["first", "first_bias", "second", "second_bias"]
    with pytest.raises(DataError, match="was learned for another merged model, the merged model, than the one that is measured"):
        read_mixture(path, read_weights(world.models[0]), encoder.base_hash)
    with pytest.raises(DataError, match="was learned over another base"):
        read_mixture(path, weights, "another")
    held = load_file(path)
    facts = {f"thetau.{name}": value for name, value in room.read_facts(path, "wemoe").items()}
    save_file(
        {name: tensor for name, tensor in held.items() if "router" not in name}, tmp_path / "damaged.safetensors", metadata=facts
    )
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: is damaged, 'second_bias' is missing"):
        read_mixture(tmp_path / "damaged.safetensors", weights, encoder.base_hash)
    narrow = replace(read, vectors=read.vectors | {f"{BLOCK}.output.dense.bias": torch.zeros(3, 4)})
    with (
        pytest.raises(DataError, match=r"the mixture is of another model: 'encoder\.layer\.0\.output\.dense\.bias'"),
        mixing(encoder, narrow, weights),
    ):
        pass
    new = tmp_path / "new.safetensors"
    with pytest.raises(
        DataError,
        match=r"step 1: a share that block encoder\.layer\.0 gives an example of animals is 30, beyond ± 10: it diverges",
    ):
        learn(replace(CONFIG, depth=0, start=30.0), path=new)
    assert weights_hash(encoder.weights()) == encoder.base_hash
    with pytest.raises(DataError, match="a mixture needs at least one task vector"):
        learn(vectors={}, path=new)
    with pytest.raises(DataError, match="other: no task is given for this vector"):
        learn(vectors={"other": expressions(world)["animals"]}, path=new)
    attention = f"{BLOCK}.attention.self.query.weight"
    start = read_weights(world.base)
    some = thetau.open(start | {attention: start[attention] + 0.01}) - thetau.open(start)
    with pytest.raises(AlignmentError, match="no MLP is changed by any of the task vectors"):
        learn(vectors={"animals": some}, path=new)
    encoder.load(weights, "another")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        learn(path=new)
    with pytest.raises(RecipeError, match=r"`MixtureConfig\(depth=\.\.\.\)` must be in \[0, 2\]\. Got 3"):
        MixtureConfig.of({"depth": 3}, "here")


def test_a_router_may_start_at_a_whole_number() -> None:
    made = Router.drawn(0, 4, 3, 1, torch.Generator())
    assert torch.equal(made.tensors["second_bias"], torch.ones(3))


def test_tasks_that_cannot_teach_a_router(world: World, merged: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world.data, tmp_path / "data")
    task = load_task("animals", data)
    given = {"animals": expressions(world)["animals"]}
    encoder, weights = load_encoder(world.base), read_weights(merged)
    with pytest.raises(DataError, match=r"task 'animals': is a regression; its predictions have no entropy"):
        learn_mixture(encoder, {"animals": replace(task, metric="pearson")}, given, weights, tmp_path / "m.safetensors", CONFIG)
    language = load_encoder(folder_of(tmp_path / "language", "t5"))
    with pytest.raises(
        DataError, match="is of kind text_to_text, and MLPs are mixed by input in encoders of sentence, image, mask"
    ):
        mlp_blocks(language, {})


def test_a_collapse_keeps_the_routers_from_before(
    world: World, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        room.Entropies, "collapsed", lambda self, step: "step 4: its entropy has collapsed." if step == 4 else None
    )
    tasks = {name: load_task(name, world.data) for name in NAMES}
    config = replace(CONFIG, steps=9, window=2, lr=1e-3)

    def learn(config: MixtureConfig, name: str) -> Any:
        return learn_mixture(load_encoder(world.base), tasks, expressions(world), read_weights(merged), tmp_path / name, config)

    stopped = learn(config, "stopped.safetensors")
    assert (stopped.steps, stopped.stopped) == (4, "step 4: its entropy has collapsed. Kept are the routers of step 2.")
    assert stopped.notes == (stopped.stopped,)
    fresh = learn(replace(config, steps=9), "fresh.safetensors")
    assert all(
        torch.equal(one, two) for one, two in zip(load_file(stopped.path).values(), load_file(fresh.path).values(), strict=True)
    )
    start = learn(replace(config, steps=0), "start.safetensors")
    assert not torch.equal(
        load_file(start.path)[f"router/{BLOCK}/second_bias"], load_file(stopped.path)[f"router/{BLOCK}/second_bias"]
    )


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip-vision"])
def test_image_encoders_have_mlps_to_mix(tmp_path: Path, kind: str) -> None:
    encoder = load_encoder(saved(tmp_path / kind, made(kind)))
    columns = {"pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    blocks = mlp_blocks(encoder, {"pixel_values": columns["pixel_values"][:1]})
    assert [len(names) for names in blocks.values()] == [2]
    base = encoder.weights(exact=True)
    names = running_room.mixed_names(encoder, blocks)
    assert len(names) == 4
    added = {name: 0.1 * torch.randn(2, *base[name].shape, generator=torch.Generator().manual_seed(5)) for name in names}
    (block,) = blocks
    shares = torch.tensor([0.5, -1.0])
    mixture = Mixture(tasks=("a", "b"), blocks=blocks, routers={block: Router(tensors={"second_bias": shares})}, vectors=added)
    with torch.no_grad(), mixing(encoder, mixture, base) as (same, _):
        got = same.module(**columns)
    encoder.load(base | {name: base[name] + torch.einsum("t,t...->...", shares, added[name]) for name in names}, "by hand")
    with torch.no_grad():
        torch.testing.assert_close(got, encoder.module(**columns), rtol=1e-4, atol=1e-5)


def test_the_command_and_evaluate(world: World, merged: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--base", str(world.base), "--data", str(world.data)]
    measure = ["evaluate", "--model", str(merged), *[word for name in NAMES for word in ("--task", name)], *common, "--json"]
    code, text = run(capsys, *measure, str(tmp_path / "before.json"))
    assert code == 0, text
    models = list(map(str, world.models))
    learn = ["evidence", "wemoe", *models, "--merged", str(merged), *common, "--max-length", "24"]
    code, text = run(capsys, *learn, "--steps", "30", "--set", "lr=0.02", "--json", str(tmp_path / "facts.json"))
    assert code == 0, text
    assert "30 steps" in text and "mixture.safetensors" in text
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["examples"] == dict.fromkeys(NAMES, 20)
    assert sum(last for _, last in facts["entropy"].values()) < sum(first for first, _ in facts["entropy"].values())
    code, text = run(capsys, *measure, str(tmp_path / "after.json"))
    assert code == 0, text
    assert "MLPs mixed by input" in " ".join(text.split())
    code, text = run(capsys, *measure, str(tmp_path / "without.json"), "--no-mixture")
    assert code == 0, text
    before, after, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after", "without"))
    assert (before["mixed"], after["mixed"]) == ([], list(NAMES))
    assert without["tasks"] == before["tasks"]
    thetau.open(merged)  # still one model
    code, text = run(capsys, "evidence", "wemoe", *models, "--merged", str(tmp_path / "nowhere"), *common)
    assert (code, "must be the folder of a merged model" in text) == (1, True)
    shutil.copyfile(world.models[0] / "model.safetensors", merged / "model.safetensors")
    code, text = run(capsys, *measure, str(tmp_path / "wrong.json"))
    assert (code, "was learned for another merged model" in text) == (1, True)
