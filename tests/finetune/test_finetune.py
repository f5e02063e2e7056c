"""The training loop, its output and its cache."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thetau.errors import DataError, OutputError, RecipeError
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.batches import training_batches
from thetau.finetune.lesson import Lesson
from thetau.finetune.loop import learning_rate, train
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.tasks import Head, Task, load_task, tokenise, zero_shot_head
from tiny import make_model, make_task
from tiny import one_thread as one_thread

FAST = FinetuneConfig(steps=30, lr=5e-3, batch_size=16)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return load_encoder(make_model(tmp_path / "base"))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(make_task(tmp_path / "data", "animals"))


def trained(encoder: Encoder, task: Task, config: FinetuneConfig = FAST) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses of a run in memory; the encoder has the base's weights again afterwards."""
    base = encoder.weights()
    head = zero_shot_head(encoder, task)
    lesson = Lesson(name=task.name, inputs=tokenise(encoder, task.split("train"), config.max_length), head=head)
    losses = train(encoder.module, [lesson], config).losses
    weights = encoder.weights()
    encoder.load(base, "base")
    return weights, losses


def test_training_learns_the_task(encoder: Encoder, task: Task) -> None:
    from thetau.evaluate import Evaluator

    evaluator = Evaluator(encoder, [task])
    before = evaluator.evaluate(encoder.weights(), "test")["animals"]
    weights, losses = trained(encoder, task)
    after = evaluator.evaluate(weights, "test")["animals"]
    assert before.value < 0.7
    assert after.value > 0.9
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(encoder: Encoder, task: Task) -> None:
    torch.manual_seed(1)
    first, losses = trained(encoder, task)
    torch.manual_seed(2)  # the caller's random state does not count
    state = torch.get_rng_state()
    second, again = trained(encoder, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses == again
    assert weights_hash(first) == weights_hash(second)
    other, _ = trained(encoder, task, FinetuneConfig(steps=30, lr=5e-3, batch_size=16, seed=1))
    assert weights_hash(first) != weights_hash(other)


def test_only_the_encoder_moves_and_the_head_is_frozen(encoder: Encoder, task: Task) -> None:
    base = encoder.weights()
    head = zero_shot_head(encoder, task)
    before = head.hash()
    train(encoder.module, [Lesson(name="animals", inputs=tokenise(encoder, task.split("train"), 32), head=head)], FAST)
    assert head.hash() == before
    moved = {name for name, tensor in encoder.weights().items() if not torch.equal(tensor, base[name])}
    unused = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}  # mean pooling never reads the pooler
    assert moved == set(base) - unused
    assert not encoder.module.training
    assert all(parameter.grad is None for parameter in encoder.module.parameters())


def test_training_batches_are_reproducible_whole_and_of_similar_length() -> None:
    lengths = [1 + (7 * i) % 50 for i in range(103)]
    epoch = list(islice(training_batches(lengths, 8, seed=0), 13))
    assert sorted(index for batch in epoch for index in batch) == list(range(103))
    assert epoch == list(islice(training_batches(lengths, 8, seed=0), 13))
    assert epoch != list(islice(training_batches(lengths, 8, seed=1), 13))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch]
    assert sum(spread) / len(spread) < 10, "an unsorted batch of 8 spans about 40"
    second = list(islice(training_batches(lengths, 8, seed=0), 13, 26))
    assert sorted(index for batch in second for index in batch) == list(range(103))
    assert second != epoch


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    config = FinetuneConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)
    assert learning_rate(0, FinetuneConfig(steps=4, lr=1.0, warmup=0.0)) == 1.0


class _Exploding(torch.nn.Module):
    """Features that leave the classes within a few steps, whatever the optimiser does."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        self.calls, self.last = 0, last

    def forward(self, **columns: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        wrong = torch.tensor([[-1.0, 1.0]]).repeat(len(columns["input_ids"]), 1)
        return wrong * (0.0 if self.calls <= 25 else self.last) + 0 * self.weight.sum()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (float("nan"), r"the loss diverged: nan at step 26 of 60\. Lower the learning rate"),
        (50.0, r"its mean over the last 20 steps is"),
    ],
)
def test_a_diverging_loss_stops_the_run(encoder: Encoder, tmp_path: Path, last: float, message: str) -> None:
    folder = make_task(tmp_path / "one", "animals")
    lines = [{"text": "meow purr", "label": 0}] * 32
    (folder / "train.jsonl.gz").unlink()
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokens = tokenise(encoder, load_task(folder).split("train"), 32)
    with pytest.raises(DataError, match=message):
        train(_Exploding(last), [Lesson(name="one", inputs=tokens, head=Head(classes=torch.eye(2)))], FinetuneConfig(steps=60))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"`FinetuneConfig\(steps=\.\.\.\)` must be an integer of at least 1\. Got 0"),
        ({"batch_size": True}, r"batch_size=\.\.\.\)` must be an integer of at least 1\. Got True"),
        ({"lr": 0.0}, r"`FinetuneConfig\(lr=\.\.\.\)` must be in \(0, inf\)\. Got 0\.0"),
        ({"warmup": 1.0}, r"must be in \[0, 1\)\. Got 1\.0"),
        ({"weight_decay": -0.1}, r"must be in \[0, inf\)\. Got -0\.1"),
        ({"paradigm": "standart"}, r"Got 'standart'\. Did you mean 'standard'\?"),
    ],
)
def test_a_config_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**values)


def test_unknown_and_wrong_keys_are_raised_together() -> None:
    with pytest.raises(RecipeError) as caught:
        FinetuneConfig.of({"step": 5, "lr": -1.0}, "s.yaml")
    assert caught.value.problems[0] == "unknown key 'step'. Did you mean 'steps'?"
    assert "Got -1.0" in caught.value.problems[1]


# Output and cache


def test_the_output_is_an_ordinary_checkpoint(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    out = tmp_path / "models" / "animals"
    result = finetune(encoder, task, out, FAST, base="tiny")
    assert weights_hash(encoder.weights()) == encoder.base_hash, "the encoder has the base's weights again"
    weights = read_weights(out)
    assert weights_hash(weights) == result.weights_hash
    assert set(weights) == set(read_weights(encoder.folder)), "the base's names, buffers included, so that they can be subtracted"
    assert {t.dtype for t in weights.values()} == {torch.float32, torch.int64}
    assert AutoModel.from_pretrained(out).config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(out)("meow")["input_ids"] == encoder.tokenizer("meow")["input_ids"]
    record = json.loads((out / "thetau_finetune.json").read_text(encoding="utf-8"))
    assert record["config"]["steps"] == 30
    assert record["base"] == "tiny"
    assert record["base_hash"] == encoder.base_hash
    assert len(record["losses"]) == 30
    assert [path.name for path in out.parent.iterdir()] == ["animals"], "no temporary folder is left"
    assert load_encoder(out).base_hash == result.weights_hash


def test_the_same_run_is_done_once(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    steps: list[int] = []
    first = finetune(encoder, task, tmp_path / "out", FAST, base="tiny", tick=lambda step, loss: steps.append(step))
    assert steps == list(range(1, 31))
    second = finetune(encoder, task, tmp_path / "out", FAST, base="tiny", tick=lambda step, loss: steps.append(step))
    assert len(steps) == 30
    assert (first.cached, second.cached) == (False, True)
    assert (first.key, first.weights_hash, first.last_loss) == (second.key, second.weights_hash, second.last_loss)


def test_another_run_is_never_mixed_into_an_output(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(encoder, task, out, FAST, base="tiny")
    with pytest.raises(OutputError, match="a run on 'animals' with other settings, data or base"):
        finetune(encoder, task, out, FinetuneConfig(steps=31, lr=5e-3, batch_size=16), base="tiny")
    data = load_task(make_task(tmp_path / "more", "animals", sizes=(66, 20, 40)))
    with pytest.raises(OutputError, match="with other settings, data or base"):
        finetune(encoder, data, out, FAST, base="tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(OutputError, match="It holds something else"):
        finetune(encoder, task, tmp_path / "full", FAST, base="tiny")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_damaged_weights_in_the_cache_are_noticed(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    finetune(encoder, task, out, FAST, base="tiny")
    weights = load_file(out / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, out / "model.safetensors")
    with pytest.raises(OutputError, match="no longer those that were written there"):
        finetune(encoder, task, out, FAST, base="tiny")


def test_an_interrupted_run_leaves_nothing(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, task, tmp_path / "out" / "x", FAST, base="tiny", tick=stop)
    assert not (tmp_path / "out").exists()
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert not finetune(encoder, task, tmp_path / "out" / "x", FAST, base="tiny").cached


def test_a_failed_write_leaves_nothing(encoder: Encoder, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        OutputError, match=r"models/out/model\.safetensors: the disk is full\. Free some space.*No output was made\."
    ):
        finetune(encoder, task, tmp_path / "models" / "out", FAST, base="tiny")
    assert not (tmp_path / "models").exists()


def test_half_precision_bases_keep_their_dtype(tmp_path: Path, task: Task) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in weights.items()}, folder / "model.safetensors")
    encoder = load_encoder(folder)
    finetune(encoder, task, tmp_path / "out", FAST, base="half")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16, torch.int64}


def test_pairs_are_trained(encoder: Encoder, tmp_path: Path) -> None:
    folder = make_task(tmp_path / "data", "animals", kind="text_pair")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl.gz").unlink()
        rows = [{"text": "meow", "text2": "purr" if i % 2 else "bark", "label": i % 2} for i in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, losses = trained(encoder, load_task(folder))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# Command line


def test_the_command_trains_and_says_so(tmp_path: Path) -> None:
    import typer

    from thetau.cli.finetune import finetune as command

    app = typer.Typer()
    app.command()(command)
    model, _ = make_model(tmp_path / "base"), make_task(tmp_path / "data", "animals")
    arguments = [
        "--model",
        str(model),
        "--task",
        "animals",
        "--data",
        str(tmp_path / "data"),
        "--steps",
        "5",
        "-o",
        str(tmp_path / "out"),
    ]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "animals, 64 examples, 5 steps" in first.output
    again = CliRunner().invoke(app, arguments)
    assert "already holds this run (same config, data and base); nothing done." in again.output
    wrong = CliRunner().invoke(app, [*arguments, "--lr", "-1"])
    assert isinstance(wrong.exception, RecipeError)
