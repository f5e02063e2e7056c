"""lm-evaluation-harness on local task files: its figures are ours on the same task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thetau.cli.app import app
from thetau.errors import DataError, RecipeError
from thetau.evaluate import Evaluator, harness
from thetau.evaluate.answers import Answers
from thetau.evaluate.harness import run_harness
from thetau.evaluate.requests import keep_answers
from thetau.export.card import read_evaluation
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.studies import Evaluate
from thetau.studies.harness import evaluate_harness
from thetau.tasks import load_task
from tiny import WORDS, make_model
from tiny import one_thread as one_thread
from tiny_causal import ROWS, causal_task, talker

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'thetau[harness]'")

CHOICES: list[dict[str, Any]] = [
    {"text": f"{word} is about the", "options": [f"{one} {other}", other, f"the {other} a {one} ."], "label": number % 3}
    for number, (word, one, other) in enumerate(zip(WORDS[:16], WORDS[4:20], WORDS[8:24], strict=True))
]
KINDS: dict[str, dict[str, Any]] = {
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "options",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of the harness' task files over one file of rows."""
    import yaml

    folder = tmp_path / "harness"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    for name, kind in KINDS.items():
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | {"test_split": "test"} | kind))
    return folder


def test_figures_are_those_of_our_own_tasks(tmp_path: Path, tasks: Path) -> None:
    encoder = load_encoder(talker(tmp_path / "m"))
    found = run_harness(encoder, list(KINDS), folder=tasks)
    shares = {one.metric: one for one in found["own_choices"]}
    for metric, length in (("acc", "none"), ("acc_norm", "characters")):
        task = load_task(
            causal_task(tmp_path, CHOICES, length, kind="choices", prompt="{text}", choices="options", length=length)
        )
        ours = Evaluator(encoder, [task]).evaluate(encoder.weights(exact=True), "test")[length]
        assert isinstance(ours, Answers)
        assert shares[metric].value == pytest.approx(ours.value)
        assert (shares[metric].n, shares[metric].low, shares[metric].high) == (
            len(CHOICES),
            pytest.approx(ours.low),
            pytest.approx(ours.high),
        )
    assert shares["acc"].value not in (0.0, 1.0), "the models of the two must have something to agree on"
    means = {one.metric: one.value for one in found["own_texts"]}
    for unit in ("word", "byte"):
        task = load_task(causal_task(tmp_path, CHOICES, unit, kind="perplexity", prompt=None, unit=unit))
        ours = Evaluator(encoder, [task]).evaluate(encoder.weights(exact=True), "test")[unit]
        assert means[f"{unit}_perplexity"] == pytest.approx(ours.value, rel=1e-5)


def test_a_request_is_asked_once(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one model; the figures are those of a run without a cache, and a run that died at a line asks for what is lacking alone."""
    import yaml

    generated = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{options[0]}}"}
    how = {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    source = yaml.safe_load((tasks / "own_choices.yaml").read_text())
    kept = {key: source[key] for key in ("dataset_path", "dataset_kwargs", "test_split")}
    (tasks / "own_answers.yaml").write_text(yaml.safe_dump({"task": "own_answers"} | kept | generated | how))
    names, cache, encoder = [*KINDS, "own_answers"], tmp_path / "new" / "cache", load_encoder(talker(tmp_path / "m"))
    asked: list[int] = []
    library = harness._library()

    of_its_own: Any = library["HFLM"]

    class Counting(of_its_own):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, **more: Any) -> Any:
            asked.append(len(requests))
            return super().loglikelihood(requests, **more)

        def loglikelihood_rolling(self, requests: Any, **more: Any) -> Any:
            asked.append(len(requests))
            return super().loglikelihood_rolling(requests, **more)

        def generate_until(self, requests: Any, **more: Any) -> Any:
            asked.append(len(requests))
            return super().generate_until(requests, **more)

    monkeypatch.setattr(harness, "_library", lambda: library | {"HFLM": Counting})

    def run(folder: Path | None = cache, **more: Any) -> tuple[Any, int]:
        asked.clear()
        return run_harness(encoder, names, folder=tasks, cache=folder, **more), sum(asked)

    choices = sum(len(row["options"]) for row in CHOICES)
    plain, count = run(None)
    assert count == choices + 2 * len(CHOICES)
    assert not cache.exists()
    first, _ = run(limit=5)
    assert {one.n for scores in first.values() for one in scores} == {5}
    assert run() == (plain, count - 5 * (3 + 2)), "the first five of each were there"
    assert run() == (plain, 0)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rstrip(b"\n").rfind(b"\n") + 8])  # it died at the last line
    assert run() == (plain, 1)
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    encoder.load({name: weight + 0.01 for name, weight in encoder.weights(exact=True).items()}, "another")
    assert run()[1] == count, "another model is asked"


def test_what_is_sampled_is_not_kept(tmp_path: Path) -> None:
    class Model:
        def loglikelihood(self, requests: Any, **_: Any) -> list[Any]:
            return []

        loglikelihood_rolling = loglikelihood

        def generate_until(self, requests: Any, **_: Any) -> list[Any]:
            return [f"said {one.args[0]}" for one in requests]

    class Request:
        def __init__(self, text: str, **how: Any) -> None:
            self.args = (text, how)

    model: Any = Model()
    keep_answers(model, tmp_path / "kept.jsonl")
    assert model.generate_until([Request("a", do_sample=True), Request("long", do_sample=False)]) == ["said a", "said long"]
    (line,) = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert json.loads(line)[1] == "said long"


def test_on_the_command_line_with_an_adapter(tmp_path: Path, tasks: Path) -> None:
    encoder = load_encoder(talker(tmp_path / "m"))
    taught = load_task(causal_task(tmp_path, ROWS))
    finetune(encoder, taught, tmp_path / "adapter", FinetuneConfig(paradigm="lora", steps=3), base=str(tmp_path / "m"))
    arguments = [
        "evaluate",
        "--model",
        str(tmp_path / "adapter"),
        "--harness",
        "own_choices",
        "--harness-tasks",
        str(tasks),
        "--limit",
        "5",
        "--cache",
        str(tmp_path / "kept"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.exception
    assert "acc_norm" in done.stdout
    assert len(list((tmp_path / "kept").glob("harness-*.jsonl"))) == 1
    assert "bylm-evaluation-harness0." in "".join(done.stdout.split())  # a long path breaks the line anywhere
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["base"] == str(tmp_path / "m")
    assert [one["n"] for one in written["tasks"]["own_choices"]] == [5, 5]
    card = read_evaluation(tmp_path / "out.json")
    assert [(one.task, one.metric, one.by) for one in card] == [
        ("own_choices", metric, "lm-evaluation-harness") for metric in ("acc", "acc_norm")
    ]
    assert card[0].known.endswith("n = 5")


def test_what_is_not_there_is_said(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(talker(tmp_path / "m"))
    library = harness._library()
    of_its_own = library["TaskManager"]

    def only_ours(include_path: str | None, include_defaults: bool) -> Any:  # the index of the harness takes long to read
        return of_its_own(include_path=str(tasks), include_defaults=False)

    monkeypatch.setattr(harness, "_library", lambda: library | {"TaskManager": only_ours})
    with pytest.raises(
        DataError, match=r"has no task 'own_choice', nor in .*harness\. Did you mean 'own_choices'\?.*--harness-tasks names"
    ):
        run_harness(encoder, ["own_choice"], folder=tasks)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot run own_choices \(.*Its data come from the hub, unless"):
        run_harness(encoder, ["own_choices"], folder=tasks)
    with pytest.raises(DataError, match="must be a folder of task files"):
        run_harness(encoder, ["own_choices"], folder=tmp_path / "none")
    with pytest.raises(DataError, match="runs causal language models; this is read as sentence"):
        run_harness(load_encoder(make_model(tmp_path / "bert")), ["own_choices"], folder=tasks)


def test_one_thing_is_measured(tmp_path: Path) -> None:
    for more in ([], ["--task", "sms_spam", "--harness", "x"]):
        done = CliRunner().invoke(app, ["evaluate", "--model", "m", *more])
        assert isinstance(done.exception, RecipeError)
        assert "--task, or --harness, one of the two" in str(done.exception)
    folder = talker(tmp_path / "m")
    for more, message in (
        (["--harness", "x", "--split", "train"], "name their split themselves. Got --split train"),
        (["--harness", "x", "--head", "names", "--no-surgery"], "in which these have no part: head, surgery. Leave them out"),
        (
            ["--harness", "x", "--max-length", "32"],
            "say how they are read: leave --data, --max-length, --kind and their like out",
        ),
        (["--task", "sms_spam", "--harness-tasks", str(tmp_path)], "--harness-tasks is for --harness"),
    ):
        done = CliRunner().invoke(app, ["evaluate", "--model", str(folder), *more])
        assert isinstance(done.exception, RecipeError)
        assert message in str(done.exception)


def test_a_model_of_the_tangent_space_is_not_run_as_itself(tmp_path: Path, tasks: Path) -> None:
    """As it is not on tasks of ours: its weights were never trained to be run."""
    encoder = load_encoder(talker(tmp_path / "m"))
    taught = load_task(causal_task(tmp_path, ROWS))
    finetune(encoder, taught, tmp_path / "linear", FinetuneConfig(paradigm="linear", steps=1), base=str(tmp_path / "m"))
    with pytest.raises(DataError, match="a causal language model is measured as itself"):
        evaluate_harness(tmp_path / "linear", ["own_choices"], folder=tasks)
    asked = evaluate_harness(tmp_path / "linear", ["own_choices"], Evaluate(space="weights"), folder=tasks)
    assert asked.tasks["own_choices"][0].n == len(CHOICES)


def test_without_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"needs lm-evaluation-harness \(.*Install it: pip install 'thetau\[harness\]'"):
        run_harness(load_encoder(talker(tmp_path / "m")), ["x"])
