"""Causal models are taught answers: every paradigm, the loss on answers alone, runs that go on to the same bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.common import ROOT
from thetau.errors import DataError
from thetau.evaluate import Evaluator, Session
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.studies import Tune, tune
from thetau.tasks import Task, load_task
from thetau.tasks.causal.head import CausalHead
from thetau.tasks.encoding import encode_causal
from tiny import one_thread as one_thread
from tiny_causal import ANSWERS, ROWS, causal_task, hugging_face, talker

FAST: dict[str, Any] = {"steps": 40, "batch_size": 4, "lr": 1e-2, "save_every": 10}


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return load_encoder(talker(tmp_path / "base"))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(causal_task(tmp_path / "tasks", chat=True, max_new_tokens=5))


def exact(encoder: Encoder, task: Task, folder: Path) -> int:
    found = Evaluator(encoder, [task]).evaluate(read_weights(folder, base=encoder.folder), "test")[task.name]
    encoder.load(read_weights(encoder.folder), "base")
    return found.correct  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("paradigm", ["standard", "attention", "lora"])
def test_answers_are_learnt(encoder: Encoder, task: Task, tmp_path: Path, paradigm: str) -> None:
    out = tmp_path / "out"
    more = {"rank": 8, "lr": 3e-2} if paradigm == "lora" else {}
    result = finetune(
        encoder, task, out, FinetuneConfig(paradigm=paradigm, **{**FAST, "steps": 60, **more}), base=str(encoder.folder)
    )
    assert result.last_loss < result.first_loss / 2
    assert exact(encoder, task, encoder.folder) == 0
    assert exact(encoder, task, out) >= len(ROWS) - (paradigm == "attention") * 2
    if paradigm != "lora":
        network, words = hugging_face(out)
        assert words.chat_template, "what was learnt is said by transformers too, with the template that lies beside it"
        ids = words.apply_chat_template(
            [{"role": "user", "content": "the dog is"}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        said = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=2)
        if paradigm == "standard":
            assert words.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == ANSWERS["dog"]
    trained = json.loads((out / "thetau_finetune.json").read_text())["trained"]
    if paradigm == "attention":
        assert trained
        assert all("self_attn" in name for name in trained)


def test_the_gradient_is_that_of_the_answers(encoder: Encoder, task: Task) -> None:
    """Against transformers' own loss with its labels, one example after another."""
    inputs = encode_causal(encoder, task, "train", max_length=64)
    everything = list(range(len(inputs)))
    loss = CausalHead().loss(encoder.module(**inputs.batch(everything)), inputs.targets(everything))
    loss.backward()
    network, words = hugging_face(encoder.folder)
    for row in ROWS:
        turns = [{"role": "user", "content": f"the {row['word']} is"}]
        prompt = words.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        answer = [*words(row["answer"])["input_ids"], words.eos_token_id]
        (
            network(torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])).loss / len(ROWS)
        ).backward()
    theirs = dict(network.named_parameters())
    for name, parameter in encoder.backbone.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name


@pytest.mark.parametrize("paradigm", ["standard", "lora", "linear"])
def test_an_interrupted_run_goes_on_to_the_same_bits(encoder: Encoder, task: Task, tmp_path: Path, paradigm: str) -> None:
    config = FinetuneConfig(paradigm=paradigm, **{**FAST, "steps": 12, "save_every": 5})
    whole = finetune(encoder, task, tmp_path / "whole", config, base="tiny")

    def stop(step: int, loss: float) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, task, tmp_path / "cut", config, base="tiny", tick=stop)
    steps: list[int] = []
    again = finetune(encoder, task, tmp_path / "cut", config, base="tiny", tick=lambda step, _: steps.append(step))
    assert steps[0] == 6
    assert again.weights_hash == whole.weights_hash


def test_batches_in_parts_give_the_same_model(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    made = [
        finetune(encoder, task, tmp_path / str(parts), FinetuneConfig(**{**FAST, "steps": 5}, accumulation=parts), base="tiny")
        for parts in (1, 4)
    ]
    first, second = (read_weights(one.out) for one in made)
    assert weights_hash(first) != encoder.base_hash
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name


def test_the_linear_form_and_its_penalty(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    other = load_task(causal_task(tmp_path / "tasks", [{"word": "bone", "answer": "leash"}], "other"))
    config = FinetuneConfig(paradigm="taujp", strength=1e-3, **{**FAST, "steps": 15, "lr": 3e-3})
    found = finetune(encoder, task, tmp_path / "out", config, base="tiny", against=[other])
    assert found.tangent
    assert found.last_loss < found.first_loss
    record = json.loads((tmp_path / "out" / "thetau_finetune.json").read_text())
    assert max(record["penalties"]) > 0


def test_choices_and_texts_are_taught_too(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"word": word, "label": (number + 1) % 2} for number, word in enumerate(ANSWERS)]
    choices = load_task(causal_task(tmp_path, rows, kind="choices", choices=["wet", "dry"]))
    texts = load_task(causal_task(tmp_path, [{"text": "the cat is the dog ."}], "texts", kind="perplexity", prompt=None))
    for task in (choices, texts):
        before = Evaluator(encoder, [task]).evaluate(encoder.weights(exact=True), "test")[task.name]
        finetune(encoder, task, tmp_path / "out" / task.name, FinetuneConfig(**FAST), base="tiny")
        after = Evaluator(encoder, [task]).evaluate(read_weights(tmp_path / "out" / task.name), "test")[task.name]
        encoder.load(read_weights(encoder.folder), "base")
        assert after.value > before.value if task is choices else after.value < before.value


def test_what_is_too_long_is_said(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves nothing of `max_length` for its answer"):
        finetune(encoder, task, tmp_path / "out", FinetuneConfig(max_length=5, **FAST), base="tiny")
    assert not (tmp_path / "out").exists()
    plain = load_task(causal_task(tmp_path, name="plain"))
    result = finetune(encoder, plain, tmp_path / "out", FinetuneConfig(max_length=5, **{**FAST, "steps": 1}), base="tiny")
    assert result.truncated == sum(len(answer.split()) > 1 for answer in ANSWERS.values())


def test_merged_models_are_measured_and_the_pages_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two fine-tunes to a λ that is chosen on validation; what docs/causal.md shows runs on the same models."""
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder(talker(tmp_path / "smollm2"))
    for name, row in (("arithmetic", ROWS[0]), ("mood", ROWS[1])):
        task = load_task(causal_task(tmp_path / "skills", [row], name, max_new_tokens=3))
        finetune(encoder, task, tmp_path / "models" / name, FinetuneConfig(**{**FAST, "steps": 20}), base="smollm2")
    models, tasks = ["models/arithmetic", "models/mood"], ["skills/arithmetic", "skills/mood"]
    session = Session.open(models, base="smollm2", tasks=tasks)
    found = tune(session, Tune(method="task_arithmetic", alphas=(0.5, 1.0)))
    assert found.result.tuned.normalised > 0  # type: ignore[union-attr]
    page = (ROOT / "docs" / "causal.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        exec(block, {})
    assert "()" in capsys.readouterr().out, "nothing was counted besides"


def test_what_needs_classes_says_so(encoder: Encoder, task: Task, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from thetau.cli.app import app

    finetune(encoder, task, tmp_path / "models" / "sounds", FinetuneConfig(**{**FAST, "steps": 2}), base=str(encoder.folder))
    model, where = str(tmp_path / "models" / "sounds"), ["--data", str(tmp_path / "tasks"), "--base", str(encoder.folder)]
    for arguments, message in (
        (
            ["evidence", "fisher", "-m", model, "-o", str(tmp_path / "f.safetensors")],
            "is of kind generation, whose answers are texts",
        ),
        (["evidence", "adamerging", model, "-o", str(tmp_path / "a")], "is of kind generation, whose answers are texts"),
        (["diagnose", "kernel", model, "-o", str(tmp_path / "k")], "a causal language model is measured as itself"),
    ):
        done = CliRunner().invoke(app, [*arguments, *where])
        assert isinstance(done.exception, DataError), arguments
        assert message in str(done.exception)
    done = CliRunner().invoke(app, ["evidence", "gram", "-m", model, "-o", str(tmp_path / "g.safetensors"), *where])
    assert done.exit_code == 0, "which needs inputs alone"
    other = load_task(causal_task(tmp_path / "tasks", [{"word": "bone", "answer": "leash"}], "other"))
    finetune(encoder, other, tmp_path / "models" / "other", FinetuneConfig(**{**FAST, "steps": 2}), base=str(encoder.folder))
    both = [model, str(tmp_path / "models" / "other")]
    done = CliRunner().invoke(app, ["diagnose", "bounds", *both, "--examples", "2", "-o", str(tmp_path / "b"), *where])
    assert done.exit_code == 0, done.exception
