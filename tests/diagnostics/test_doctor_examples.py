"""The doctor with a few examples: losses, τJp and inputs against the rooms that measure them alone, in both spaces, of a talker, and bad inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import thetau
from commands import run
from reports import read_page, words
from thetau.diagnostics.doctor import Doctor, OnTask
from thetau.diagnostics.examine import examine
from thetau.diagnostics.examples import advise, open_examples, with_examples
from thetau.diagnostics.layers import FEATURES, layers
from thetau.diagnostics.results import load_result
from thetau.errors import DataError
from thetau.evaluate import Evaluator
from thetau.evaluate.options import Few, Reading, Sample
from thetau.evaluate.session import Session
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.studies.measures import tau_jp
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread
from tiny_causal import causal_task, talker

NAMES = ("animals", "weather")
READING = {"max_length": 32}


class Bench:
    def __init__(self, root: Path) -> None:
        self.root, self.base, self.data = root, make_model(root / "base"), root / "data"
        encoder = load_encoder(self.base)
        tasks = [load_task(make_task(self.data, name)) for name in NAMES]
        evaluator = Evaluator(encoder, tasks, max_length=32)
        for task in tasks:
            for paradigm in ("standard", "linear"):
                config = FinetuneConfig(steps=8, lr=5e-3, batch_size=16, max_length=32, paradigm=paradigm)
                finetune(encoder, task, root / paradigm / task.name, config, base=str(self.base), heads=evaluator.heads)
                evaluator.load_base()

    def doctor(self, models: dict[str, Path], tasks: list[str], **few: object) -> Doctor:
        base = thetau.open(str(self.base))
        opened = [thetau.open(str(path), base=base, name=name) for name, path in models.items()]
        reading = Reading(data=self.data, max_length=32)
        examples = open_examples(str(self.base), opened, tasks, few=Few(**few), reading=reading)  # type: ignore[arg-type]
        return with_examples(examine(base, opened), examples, base, opened)

    def of(self, paradigm: str) -> dict[str, Path]:
        return {f"my-{name}": self.root / paradigm / name for name in NAMES}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def found(bench: Bench) -> Doctor:
    return bench.doctor(bench.of("standard"), list(NAMES), examples=12)


def session(bench: Bench, paradigm: str = "standard") -> Session:
    models = [str(bench.root / paradigm / name) for name in NAMES]
    reading = Reading(data=bench.data, max_length=32)
    return Session.open(models, base=bench.base, limits={"validation": 12}, reading=reading, exact=True)


def test_losses_and_scores_are_those_of_the_models_themselves(bench: Bench, found: Doctor) -> None:
    encoder = load_encoder(bench.base)
    evaluator = Evaluator(encoder, [load_task(name, bench.data) for name in NAMES], max_length=32, limits={"validation": 12})
    base = encoder.weights(exact=True)
    assert found.compared == ("my-animals", "my-weather") and [one.task for one in found.tasks] == list(NAMES)
    for one in found.tasks:
        assert (one.own, one.split, one.n, one.metric) == (f"my-{one.task}", "validation", 12, "accuracy")
        assert one.base_loss == pytest.approx(evaluator.losses(base, "validation", [one.task])[one.task].value, rel=1e-6)
        assert one.base_score == evaluator.evaluate(base, "validation", [one.task])[one.task].value
        for place, name in enumerate(NAMES):
            weights = {**base, **read_weights(bench.root / "standard" / name)}
            assert one.loss[place] == pytest.approx(evaluator.losses(weights, "validation", [one.task])[one.task].value, rel=1e-5)
            assert one.score[place] == evaluator.evaluate(weights, "validation", [one.task])[one.task].value


def test_tau_jp_is_that_of_the_diagnostic(bench: Bench, found: Doctor) -> None:
    told = tau_jp(session(bench), Sample(split="validation", limit=12))
    for j, one in enumerate(found.tasks):
        assert one.unit == pytest.approx(told.unit[one.task], rel=1e-6)
        assert one.tau_jp == pytest.approx([told.products[i][j] for i in range(len(NAMES))], rel=1e-5)


def test_inputs_are_those_of_the_layers(bench: Bench, found: Doctor) -> None:
    given = session(bench)
    own = {task: given.plain.weights({task: 1.0}) for task in NAMES}
    told = layers(given.evaluator, given.weights, own, {}, split="validation", rows=64)
    for place, one in enumerate(found.tasks):
        rows = [row for row in told.of(one.task) if row.layer != FEATURES]
        turned = [row.direction for row in rows if row.direction is not None]
        stretched = [row.magnitude for row in rows if row.magnitude is not None]
        assert one.direction[place] == pytest.approx(sum(turned) / len(turned), rel=1e-5)
        assert one.magnitude[place] == pytest.approx(sum(stretched) / len(stretched), rel=1e-5, abs=1e-9)
        block = [row.direction for row in rows if row.block == 0 and row.direction is not None]
        assert one.layers["0"][place] == pytest.approx(sum(block) / len(block), rel=1e-5)


def test_models_of_the_tangent_space_are_measured_there(bench: Bench) -> None:
    told, given = bench.doctor(bench.of("linear"), list(NAMES), examples=12), session(bench, "linear")
    assert given.tangent
    for one in told.tasks:
        expected = [given.linear.losses({name: 1.0}, [one.task], "validation")[one.task].value for name in NAMES]
        assert one.loss == pytest.approx(expected, rel=1e-5)
        assert one.direction == (None, None) and one.layers == {}
    assert any("tangent space" in note for note in told.notes)


def test_whose_a_task_is(bench: Bench) -> None:
    models = bench.of("standard")
    swapped = bench.doctor({"weather": models["my-animals"], "other": models["my-weather"]}, ["weather"], examples=4)
    assert swapped.tasks[0].own == "other", "a record counts for more than a name"
    told = bench.doctor({"weather": models["my-animals"], "other": models["my-weather"]}, ["weather=weather"], examples=4)
    assert told.tasks[0].own == "weather", "what is said counts most"
    alone = bench.doctor({"x": models["my-animals"]}, ["weather"], examples=4)
    assert alone.tasks[0].own == "" and not [one for one in alone.advice if "On examples" in one.sentence]


def test_a_saved_vector_and_the_base_itself(bench: Bench, tmp_path: Path) -> None:
    base = thetau.open(str(bench.base))
    model = bench.root / "standard" / "animals"
    (thetau.open(str(model)) - base).save(tmp_path / "vector.safetensors")
    told = bench.doctor({"model": model, "vector": tmp_path / "vector.safetensors", "same": bench.base}, ["animals"], examples=8)
    (one,) = told.tasks
    assert told.compared == ("model", "vector", "same")
    assert one.loss[1] == pytest.approx(one.loss[0], rel=1e-5) and one.tau_jp[1] == pytest.approx(one.tau_jp[0], rel=1e-5)
    assert one.loss[2] == pytest.approx(one.base_loss, rel=1e-6) and one.tau_jp[2] == 0.0 and one.direction[2] == pytest.approx(0)


def test_a_model_whose_features_are_not_finite_is_a_note(bench: Bench, tmp_path: Path) -> None:
    model = bench.root / "standard" / "animals"
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.weight"))
    weights[name] = torch.full_like(weights[name], 1e38)
    save_file(weights, tmp_path / "huge.safetensors")
    told = bench.doctor({"good": model, "huge": tmp_path / "huge.safetensors"}, ["animals"], examples=4)
    assert told.tasks[0].loss[1] is None and told.tasks[0].loss[0] is not None
    assert any("huge on animals" in note for note in told.notes)


def test_a_base_that_cannot_be_scored_loses_nothing_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Evaluator.features

    def features(self: Evaluator, *given: Any, origin: str = "weights") -> torch.Tensor:
        if origin == "the base":
            raise DataError("not defined here")
        return real(self, *given, origin=origin)

    monkeypatch.setattr(Evaluator, "features", features)
    told = bench.doctor(bench.of("standard"), ["animals"], examples=4)
    (one,) = told.tasks
    assert one.base_loss is None and one.loss[0] is not None and one.direction == (None, None)
    assert "the base on animals: not defined here" in told.notes and told.advice


def test_a_causal_model_has_losses_and_scores_alone(tmp_path: Path) -> None:
    base = talker(tmp_path / "base")
    talker(tmp_path / "other", seed=1)
    causal_task(tmp_path / "data")
    opened = [thetau.open(str(tmp_path / "other"), name="other")]
    examples = open_examples(
        str(base), opened, ["sounds"], few=Few(split="test", examples=3), reading=Reading(data=tmp_path / "data")
    )
    start = thetau.open(str(base))
    (one,) = with_examples(examine(start, opened), examples, start, opened).tasks
    assert one.n >= 1 and one.base_loss is not None and one.loss[0] is not None and one.loss[0] != one.base_loss
    assert one.tau_jp == one.direction == (None,) and one.unit is None


def on_task(**changed: object) -> OnTask:
    given: dict[str, object] = {
        "task": "t",
        "own": "a",
        "split": "validation",
        "n": 9,
        "metric": "accuracy",
        "unit": 1.0,
        "base_loss": 1.0,
        "base_score": 0.5,
        "loss": (0.5, 1.0),
        "score": (0.9, 0.5),
        "tau_jp": (0.16, 0.04),
        "direction": (0.1, 0.1),
        "magnitude": (0.0, 0.0),
        "layers": {},
    }
    return OnTask(**(given | changed))  # type: ignore[arg-type]


def test_advice_of_examples() -> None:
    (loud,) = advise([on_task()], ("a", "b"), ("a", "b"))
    assert loud.sentence == "On examples, look first at: t by b (0.50)." and loud.models == ("a", "b")
    assert advise([on_task()], ("a", "b"), ("a",)) == (), "of what is left out nothing is said"
    assert advise([on_task(own="")], ("a", "b"), ("a", "b")) == ()
    assert advise([on_task(tau_jp=(0.0, 0.04))], ("a", "b"), ("a", "b")) == (), "what its own vector does not move has no share"
    unlearned, _ = advise([on_task(loss=(1.25, 1.0))], ("a", "b"), ("a", "b"))
    assert unlearned.topic == "check" and "no better than the base" in unlearned.sentence and "1.2500" in unlearned.evidence


def test_on_the_command_line_as_json_and_as_a_page(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    models = [f"{name}={bench.root / 'standard' / name}" for name in NAMES]
    data = ("--data", str(bench.data), "--max-length", "32")
    shared = ("--examples", "6", *data, "-q")
    page, file = tmp_path / "doctor.html", tmp_path / "doctor.json"
    code, text = run(
        capsys,
        "doctor",
        str(bench.base),
        *models,
        "-t",
        "animals",
        "-t",
        "weather",
        *shared,
        "-o",
        str(page),
        "--json",
        str(file),
    )
    assert code == 0, text
    assert "animals: 6 validation examples; trained on it: animals" in text and "√ over own's" in text and "1 − cos x" in text
    assert "On examples, look first at: " in text
    told = load_result(Doctor, file)
    assert [one.n for one in told.tasks] == [6, 6]
    said = words(read_page(page.read_text("utf-8")))
    assert "What examples say" in said and "Change of the loss against the base" in said and "Models on tasks" in said
    for wrong, message in (
        (("-t", "nothing", *shared), "nothing"),
        (("-t", "x=animals", *shared), "no model is called 'x'; they are called animals, weather"),
        (("-t", "animals", "-t", "weather=animals", *shared), "the task 'animals' is given twice"),
        (("-t", "animals", "--examples", "0", *data), "examples"),
        (("-t", "animals", "--split", "tset", *data), "tset"),
        (("-t", "animals", "--kind", "picture", *data), "picture"),
        (("--examples", "6"), "no task: say which with --task"),
        (data, "no task: say which with --task"),
    ):
        code, text = run(capsys, "doctor", str(bench.base), *models, *wrong)
        assert code != 0 and message in text and "Traceback" not in text, (wrong, text)
    code, text = run(capsys, "doctor", str(bench.base / "model.safetensors"), *models, "-t", "animals", *shared)
    assert code != 0 and "Traceback" not in text
