"""Causal models measured, against plain loops over transformers; in batches or not, padded on either side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.errors import CheckpointError, DataError
from thetau.evaluate import Evaluator, Reading, Session, causal
from thetau.evaluate.accuracy import wilson
from thetau.evaluate.answers import Answers
from thetau.evaluate.causal import generations, piece_likelihoods
from thetau.evaluate.options import BASE
from thetau.models import Encoder, load_encoder
from thetau.models.causal import Side, end_tokens
from thetau.studies.arithmetic import negation, on_one_task
from thetau.studies.checkpoints import base_for
from thetau.tasks import load_task
from thetau.tasks.encoding import encode_causal
from tiny import WORDS
from tiny import one_thread as one_thread
from tiny_causal import ROWS, causal_task, hugging_face, talker

FAMILIES = ("llama", "qwen3", "gpt2")
CHOICES = [
    {"text": "this is about the", "options": ["cat meow", "dog", "sun bright warm dry cloud"], "label": 0},
    {"text": "a", "options": ["rain wet puddle", "bone leash ."], "label": 1},
    {
        "text": "the question is the same as the other question about the dog .",
        "options": ["bark", "purr", "whiskers the"],
        "label": 2,
    },
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(talker(tmp_path_factory.mktemp(request.param) / "m", request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(talker(tmp_path_factory.mktemp("llama") / "m"))


def weights(encoder: Encoder) -> Any:
    return encoder.weights(exact=True)


def plain_likelihood(folder: Path, prompt: str, answer: str) -> float:
    """One forward pass of transformers, nothing padded, one token after another."""
    network, words = hugging_face(folder)
    before, after = words(prompt)["input_ids"], words(answer)["input_ids"]
    with torch.no_grad():
        told = network(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(told[len(before) + place - 1, token]) for place, token in enumerate(after))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 32])
def test_likelihoods_are_those_of_a_plain_loop(
    model: Encoder, tmp_path: Path, side: Side, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "ROWS", rows)
    task = load_task(causal_task(tmp_path, CHOICES, kind="choices", prompt="{text}", choices="options"))
    found = piece_likelihoods(model, encode_causal(model, task, "test", max_length=64), side=side)
    expected = [[plain_likelihood(model.folder, row["text"], answer) for answer in row["options"]] for row in CHOICES]  # type: ignore[attr-defined, arg-type]
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    for length, size in {"none": lambda _: 1, "characters": len, "tokens": lambda text: len(text.split())}.items():
        scaled = load_task(
            causal_task(tmp_path, CHOICES, f"by-{length}", kind="choices", prompt="{text}", choices="options", length=length)
        )
        measured = Evaluator(model, [scaled]).evaluate(weights(model), "test")[scaled.name]
        correct = 0
        for row, values in zip(CHOICES, expected, strict=True):
            scores = [value / size(answer) for value, answer in zip(values, row["options"], strict=True)]  # type: ignore[arg-type, call-overload]
            correct += max(range(len(scores)), key=scores.__getitem__) == row["label"]
        assert isinstance(measured, Answers)
        assert (measured.correct, measured.n, measured.name) == (correct, 3, "accuracy")
        assert (measured.low, measured.high) == pytest.approx(wilson(correct, 3))


@pytest.mark.parametrize("unit", ["token", "word", "byte"])
def test_perplexity_is_that_of_a_plain_loop(model: Encoder, tmp_path: Path, unit: str) -> None:
    texts = ["the cat is a cat .", "rain", " ".join(WORDS * 4)]
    task = load_task(causal_task(tmp_path, [{"text": text} for text in texts], kind="perplexity", prompt=None, unit=unit))
    network, words = hugging_face(model.folder)
    nats = count = 0.0
    for text in texts:
        ids = [words.bos_token_id, *words(text)["input_ids"]]
        for begin in range(0, len(ids) - 1, 63):  # windows of the context, 64, that share one token
            part = ids[begin : begin + 64]
            with torch.no_grad():
                told = network(torch.tensor([part])).logits[0].double().log_softmax(-1)
            nats -= sum(float(told[place, token]) for place, token in enumerate(part[1:]))
        count += {"token": len(ids) - 1, "word": len(text.split()), "byte": len(text.encode())}[unit]
    found = Evaluator(model, [task]).evaluate(weights(model), "test")["sounds"]
    assert isinstance(found, Answers)
    assert found.value == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found.low <= found.value <= found.high
    assert found.notes == ("1 longer than the context, scored in several windows",)


@pytest.mark.parametrize("rows", [1, 32])
def test_generation_is_that_of_transformers(model: Encoder, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "ROWS", rows)
    prompts = ["the", "the cat is about the dog .", "rain wet", "sun", "this is the question", "a leash the bone"]
    listed = [{"word": prompt, "answer": "x"} for prompt in prompts]
    task = load_task(causal_task(tmp_path, listed, prompt="{word}", max_new_tokens=9))
    found = generations(model, encode_causal(model, task, "test", max_length=64))
    network, words = hugging_face(model.folder)
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([words(prompt)["input_ids"]])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=2)
        said = out[0, ids.shape[1] :].tolist()
        assert one is not None
        assert one == (words.decode(said, skip_special_tokens=True), words.eos_token_id in said)


def test_stop_strings_the_context_and_what_nothing_ends(tmp_path: Path) -> None:
    encoder = load_encoder(talker(tmp_path / "m", seed=1))  # which talks on

    def said(name: str, **meta: Any) -> list[Any]:
        task = load_task(causal_task(tmp_path, name=name, **meta))
        return generations(encoder, encode_causal(encoder, task, "test", max_length=64))

    free = said("free", max_new_tokens=20)
    words = free[0][0].split()
    assert len(words) == 20
    assert [done for _, done in free] == [False] * 4
    place = next(number for number, word in enumerate(words) if word != words[0])
    text, finished = said("stopped", max_new_tokens=20, stop=[words[place]])[0]
    assert (text.split(), finished) == (words[:place], True)
    long = said("long", prompt="the {word} is " + "cat " * 50, max_new_tokens=60)
    assert [len(text.split()) for text, _ in long] == [64 - 53] * 4, "the context is full"
    assert not any(done for _, done in long)


def test_exact_match_counts_all_that_went_wrong(llama: Encoder, tmp_path: Path) -> None:
    task = load_task(causal_task(tmp_path, max_new_tokens=6))
    free = generations(llama, encode_causal(llama, task, "test", max_length=64))
    rows = [
        {"word": ROWS[0]["word"], "answer": free[0][0].upper() + " ."},  # type: ignore[index]
        {"word": ROWS[1]["word"], "answer": "meow"},
        {"word": "cat " * 64, "answer": "meow"},
    ]
    judged = load_task(causal_task(tmp_path, rows, "judged", max_new_tokens=6, normalise=["case", "punctuation"]))
    found = Evaluator(llama, [judged]).evaluate(weights(llama), "test")["judged"]
    assert isinstance(found, Answers)
    assert (found.correct, found.n, found.too_long) == (1, 3, 1)
    unread = load_task(causal_task(tmp_path, rows, "unread", max_new_tokens=6, extract="last_number"))
    found = Evaluator(llama, [unread]).evaluate(weights(llama), "test")["unread"]
    assert isinstance(found, Answers)
    assert (found.correct, found.unread, found.too_long) == (0, 2, 1)
    assert found.shown[0] == free[0][0]  # type: ignore[index]
    assert found.notes[0] == "1 longer than the context, counted as wrong"
    assert f"2 without an answer that could be extracted, counted as wrong: {free[0][0]!r}" in found.notes[-1]  # type: ignore[index]


def test_long_texts_are_looked_at_in_parts(llama: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(causal_task(tmp_path, CHOICES, kind="choices", prompt="{text}", choices="options"))
    inputs = encode_causal(llama, task, "test", max_length=64)
    whole = piece_likelihoods(llama, inputs)
    monkeypatch.setattr("thetau.models.causal._PART", 1)
    assert piece_likelihoods(llama, inputs) == whole


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", "--model", str(tmp_path / "nowhere"), "--task", str(causal_task(tmp_path))])
    assert isinstance(done.exception, CheckpointError)
    assert "nowhere': no such folder" in str(done.exception)


def test_a_gguf_file_alone_asks_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m\.gguf: a GGUF file is measured with .* of a folder\. Name it: --base FOLDER"):
        base_for(tmp_path / "m.gguf", BASE)
    assert base_for(tmp_path / "m.gguf", "folder") == "folder"


def test_end_tokens_are_all_that_the_model_names(tmp_path: Path) -> None:
    folder = talker(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert end_tokens(load_encoder(folder)) == {2, 5}


def test_results_are_kept(llama: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [
        load_task(causal_task(tmp_path, CHOICES, "choices", kind="choices", prompt="{text}", choices="options")),
        load_task(causal_task(tmp_path)),
    ]
    first = Evaluator(llama, tasks, cache=tmp_path / "cache").evaluate(weights(llama), "test")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(llama.module, "forward", never)
    monkeypatch.setattr(llama.backbone, "forward", never)
    seen: list[int] = []
    again = Evaluator(llama, tasks, cache=tmp_path / "cache", on_tokens=seen.append)
    assert again.evaluate(weights(llama), "test") == first
    assert sum(seen) == sum(again.size(task.name, "test") for task in tasks)


def test_a_result_is_not_kept_for_other_end_tokens(tmp_path: Path) -> None:
    folder = talker(tmp_path / "m", seed=1)  # which talks on
    task = load_task(causal_task(tmp_path, max_new_tokens=4))

    def unfinished() -> int:
        encoder = load_encoder(folder)
        found = Evaluator(encoder, [task], cache=tmp_path / "cache").evaluate(weights(encoder), "test")["sounds"]
        assert isinstance(found, Answers)
        return found.unfinished

    assert unfinished() == len(ROWS)
    encoder = load_encoder(folder)
    said = generations(encoder, encode_causal(encoder, task, "test", max_length=64))
    first = [encoder.tokenizer.convert_tokens_to_ids(text.split()[0]) for text, _ in said]  # type: ignore[index]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *first]}))
    assert unfinished() == 0


def test_weights_that_are_no_numbers_are_refused(llama: Encoder, tmp_path: Path) -> None:
    task = load_task(causal_task(tmp_path))
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in weights(llama).items()}
    evaluator = Evaluator(llama, [task])
    with pytest.raises(DataError, match="logits must be finite; these weights give NaN or Inf, so nothing can be generated"):
        evaluator.evaluate(broken, "test")
    evaluator.load_base()


def test_on_the_command_line(tmp_path: Path) -> None:
    folder = talker(tmp_path / "m")
    said = causal_task(tmp_path, max_new_tokens=4, extract="last_number")
    choices = causal_task(tmp_path, CHOICES, "choices", kind="choices", prompt="{text}", choices="options")
    texts = causal_task(tmp_path, [{"text": "the cat"}], "texts", kind="perplexity", prompt=None)
    arguments = ["evaluate", "--model", str(folder), *(part for one in (said, choices, texts) for part in ("--task", str(one)))]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "sounds: 4 without an answer that could be extracted, counted as wrong: " in done.output
    assert "head: the model's own" in " ".join(done.output.split()), "wherever a long path breaks the line"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["max_length"] == 64
    assert {name: one["metric"] for name, one in written["tasks"].items()} == {
        "sounds": "exact_match",
        "choices": "accuracy",
        "texts": "perplexity",
    }
    assert written["average"] == pytest.approx((written["tasks"]["sounds"]["value"] + written["tasks"]["choices"]["value"]) / 2)
    assert all(one["low"] <= one["value"] <= one["high"] and one["n"] for one in written["tasks"].values())
    alone = CliRunner().invoke(app, ["evaluate", "--model", str(folder), "--task", str(texts)], env={"COLUMNS": "200"})
    assert alone.exit_code == 0
    assert "average" not in alone.output


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base, other = talker(tmp_path / "base"), talker(tmp_path / "other", seed=1)
    task = causal_task(tmp_path)
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["new"])
    words.save_pretrained(other)
    done = CliRunner().invoke(app, ["evaluate", "--model", str(other), "--base", str(base), "--task", str(task)])
    assert isinstance(done.exception, DataError)
    assert "has another tokenizer than" in str(done.exception)
    assert "1 tokens have other numbers, such as 'new' (none and " in str(done.exception)
    with pytest.raises(DataError, match="has another tokenizer than"):
        Session.open([f"sounds={other}"], base=base, tasks=[task])


def test_perplexities_and_linear_forms_have_no_place_in_averages(llama: Encoder, tmp_path: Path) -> None:
    from thetau.evaluate.means import average, normalised

    texts = causal_task(tmp_path, [{"text": "the cat"}], "texts", kind="perplexity", prompt=None)
    session = Session.open([], base=llama.folder, tasks=[texts], reading=Reading())
    found = session.evaluator.evaluate(session.weights, "test")
    for mean in (average, lambda one: normalised(one, one)):
        with pytest.raises(DataError, match=r"a perplexity is lower where it is better.*Got texts"):
            mean(found)
    words = causal_task(tmp_path)
    both = Session.open([], base=llama.folder, tasks=[texts, words])
    space = both.space_of({"texts": both.weights, "sounds": both.weights})
    for target, control in (("sounds", "texts"), ("texts", "sounds")):
        with pytest.raises(DataError, match=r"no α is chosen by it\. Got texts"):
            negation(space, target, control, grid=(0.0, 1.0))
    with pytest.raises(DataError, match=r"no α is chosen by it\. Got texts"):
        on_one_task(space, {"sounds": 1.0}, "texts", (0.0, 1.0))
    with pytest.raises(DataError, match="a causal language model is measured as itself"):
        session.space_of({"x": session.weights}, tangent=True)
    with pytest.raises(DataError, match="has no features of one length"):
        session.evaluator.features(session.weights, "texts", "test")


def test_losses_are_of_the_answers_alone(model: Encoder, tmp_path: Path) -> None:
    task = load_task(causal_task(tmp_path))
    found = Evaluator(model, [task]).losses(weights(model), "test")["sounds"]
    network, words = hugging_face(model.folder)
    expected = 0.0
    for row in ROWS:
        prompt, answer = words(f"the {row['word']} is")["input_ids"], [*words(row["answer"])["input_ids"], words.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            expected += float(network(ids, labels=labels).loss) / len(ROWS)
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert found.n == len(ROWS)
