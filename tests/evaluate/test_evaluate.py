"""Accuracy, normalised accuracy, the search for λ, and the evaluation of weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.evaluate import Accuracy, Evaluator, average, choose_scale, normalised
from thetau.evaluate.accuracy import wilson
from thetau.evaluate.cache import Cache
from thetau.evaluate.means import worthless
from thetau.evaluate.merging import at_scale
from thetau.models import Encoder, load_encoder
from thetau.tasks import load_task, tokenise, zero_shot_head
from thetau.tasks.encoding import features
from thetau.tasks.metrics import Score
from tiny import make_model, make_task
from tiny import one_thread as one_thread

# A random model moves far: warned of, and rightly.
pytestmark = pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.facade.ThetauWarning")


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return load_encoder(make_model(tmp_path / "base"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_task(tmp_path / "data", "animals")
    make_task(tmp_path / "data", "weather")
    return tmp_path / "data"


def evaluator_of(encoder: Encoder, data: Path, **more: Any) -> Evaluator:
    return Evaluator(encoder, [load_task("animals", data), load_task("weather", data)], **more)


@pytest.mark.parametrize("n", [1, 7, 500])
def test_wilson_solves_its_own_equation(n: int) -> None:
    """The bounds p are where the score test is at its limit: |p̂ − p| = z √(p(1−p)/n)."""
    for correct in {0, 1, n // 2, n - 1, n}:
        low, high = wilson(correct, n)
        for bound, edge in ((low, 0.0), (high, 1.0)):
            if bound != edge:
                assert abs(correct / n - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / n))
        assert 0 <= low <= correct / n <= high <= 1
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_counts_that_are_none_are_refused() -> None:
    for correct, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError, match=rf"Got correct={correct}, n={n}"):
            Accuracy.of(correct, n)


def test_normalised_accuracy_is_the_mean_of_ratios() -> None:
    merged = {"a": Accuracy.of(40, 100), "b": Accuracy.of(90, 100)}
    own = {"a": Accuracy.of(80, 100), "b": Accuracy.of(90, 100)}
    assert average(merged) == pytest.approx(0.65)
    assert normalised(merged, own) == pytest.approx(0.75)
    with pytest.raises(DataError, match="Lacking: b"):
        normalised(merged, {"a": own["a"]})


def test_a_task_whose_own_model_is_worth_nothing_has_no_share() -> None:
    """GLUE's CoLA and STS-B may score 0 or less after few steps: the comparison goes on, and says which."""
    merged = {"cola": Score(name="Matthews", value=0.1, n=50, low=0.0, high=0.2), "sst2": Accuracy.of(40, 100)}
    own = {"cola": Score(name="Matthews", value=-0.05, n=50, low=-0.2, high=0.1), "sst2": Accuracy.of(80, 100)}
    assert normalised(merged, own) == pytest.approx(0.5)
    assert worthless(own) == ("cola",)
    assert normalised({"cola": merged["cola"]}, own) == pytest.approx(0.1), "nothing is left to be relative to: the value itself"
    search = choose_scale(
        [0.5, 1.0, 1.5], lambda scale: {**merged, "sst2": Accuracy.of(40 + int(20 * min(scale, 2 - scale)), 100)}, own
    )
    assert search.scale == 1.0


def test_the_search_takes_the_best_validation_and_the_smaller_of_equals() -> None:
    curve = {0.1: 50, 0.3: 70, 0.5: 70, 0.7: 60}
    seen: list[float] = []

    def evaluate(scale: float) -> dict[str, Accuracy]:
        seen.append(scale)
        return {"a": Accuracy.of(curve[scale], 100)}

    search = choose_scale([0.7, 0.5, 0.3, 0.1], evaluate, {"a": Accuracy.of(80, 100)})
    assert search.scale == 0.3
    assert seen == [0.7, 0.5, 0.3, 0.1]
    assert [trial.normalised for trial in search.trials] == pytest.approx([0.75, 0.875, 0.875, 0.625])
    with pytest.raises(DataError, match="at least one value"):
        choose_scale([], evaluate, {})


def test_accuracy_counts_what_a_direct_reading_counts(encoder: Encoder, data: Path) -> None:
    task = load_task("animals", data)
    split = task.split("test")
    tokens = tokenise(encoder, split, 64)
    scores = features(encoder, tokens) @ zero_shot_head(encoder, task).classes.T
    correct = sum(int(row.argmax()) == label for row, label in zip(scores, split.labels, strict=True))
    found = evaluator_of(encoder, data).evaluate(encoder.weights(), "test")["animals"]
    assert (found.correct, found.n) == (correct, 40)


def test_the_heads_stay_the_bases_while_weights_change(encoder: Encoder, data: Path) -> None:
    evaluator = evaluator_of(encoder, data)
    heads = {name: head.hash() for name, head in evaluator.heads.items()}
    before = evaluator.evaluate(encoder.weights(), "test")
    base = encoder.weights()
    generator = torch.Generator().manual_seed(0)
    noisy = {n: t + torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in base.items()}
    other = evaluator.evaluate(noisy, "test")
    assert other != before
    assert {name: head.hash() for name, head in evaluator.heads.items()} == heads
    assert evaluator.evaluate(base, "test") == before, "and the base's weights give the base's figures again"


def test_limits_and_choice_of_tasks(encoder: Encoder, data: Path) -> None:
    evaluator = evaluator_of(encoder, data, limits={"test": 10})
    found = evaluator.evaluate(encoder.weights(), "test", ["weather"])
    assert {name: accuracy.n for name, accuracy in found.items()} == {"weather": 10}
    assert evaluator.evaluate(encoder.weights(), "validation")["animals"].n == 20
    with pytest.raises(DataError, match=r"split must be one of train, validation, test. Got 'dev'"):
        evaluator.evaluate(encoder.weights(), "dev")


def test_weights_that_give_no_numbers_are_refused(encoder: Encoder, data: Path) -> None:
    evaluator = evaluator_of(encoder, data)
    broken = {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in encoder.weights().items()}
    with pytest.raises(DataError, match="must be finite"):
        evaluator.evaluate(broken, "test")
    with pytest.raises(AlignmentError, match="merged: does not fit the base model"):
        evaluator.evaluate({}, "test", origin="merged")


def test_two_tasks_of_one_name_are_refused(encoder: Encoder, data: Path) -> None:
    task = load_task("animals", data)
    with pytest.raises(DataError, match="different names"):
        Evaluator(encoder, [task, task])


def test_accuracies_are_cached_by_content(encoder: Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(
        Encoder, "load", lambda self, weights, origin, load=Encoder.load: (runs.append(origin), load(self, weights, origin))
    )
    done: list[int] = []
    first = evaluator_of(encoder, data, cache=tmp_path / "cache", on_tokens=done.append)
    weights = encoder.weights()
    found = first.evaluate(weights, "test", origin="one")
    total = sum(done)
    assert total == first.size("animals", "test") + first.size("weather", "test")
    again = evaluator_of(encoder, data, cache=tmp_path / "cache", on_tokens=done.append)
    assert again.evaluate({name: tensor.clone() for name, tensor in weights.items()}, "test", origin="two") == found
    assert runs == ["one"], "the second time nothing was loaded or run"
    assert sum(done) == 2 * total, "the bar moves by what the cache gave, too"
    weights["embeddings.LayerNorm.bias"] = weights["embeddings.LayerNorm.bias"] + 1e-3
    again.evaluate(weights, "test", origin="three")
    again.evaluate(weights, "validation", origin="four")
    assert runs == ["one", "three", "four"]


def test_a_damaged_cache_file_counts_as_absent(tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path)
    cache.put(Accuracy.of(1, 2), ["key"])
    assert cache.get(Accuracy, ["key"]) == Accuracy.of(1, 2)
    assert cache.get(Accuracy, ["other"]) is None
    (only,) = tmp_path.iterdir()
    only.write_text('{"correct": 1', encoding="utf-8")
    assert cache.get(Accuracy, ["key"]) is None
    assert Cache().get(Accuracy, ["key"]) is None


def test_weights_at_a_scale_are_those_of_the_expression(encoder: Encoder) -> None:
    import thetau

    base = encoder.weights()
    model = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    start = thetau.open(base)
    merged = thetau.merge([thetau.open(model, name="a") - start], thetau.methods.TaskArithmetic(scale=1.0), names=["a"])
    expected = (start + 0.3 * merged).state_dict()
    found = at_scale(base, merged.state_dict(), 0.3)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["embeddings.position_ids"], base["embeddings.position_ids"])


# Command line


def invoke(arguments: list[str]) -> Any:
    import typer

    from thetau.cli.evaluate import evaluate

    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, arguments)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, encoder: Encoder, data: Path) -> None:
    model = str(encoder.folder)
    arguments = [
        "--model",
        model,
        "--base",
        model,
        "--task",
        "animals",
        "--task",
        "weather",
        "--data",
        str(data),
        "--limit",
        "30",
    ]
    table = invoke(arguments)
    assert table.exit_code == 0, table.output
    for part in ("animals", "weather", "average", "95 % interval"):
        assert part in table.output
    assert invoke([*arguments, "--json", str(tmp_path / "facts.json")]).exit_code == 0
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert facts["tasks"]["animals"]["n"] == 30
    assert facts["average"] == pytest.approx(sum(task["value"] for task in facts["tasks"].values()) / 2)
    assert facts["split"] == "test"


def test_the_command_names_a_model_that_does_not_fit(tmp_path: Path, encoder: Encoder, data: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    arguments = [
        "--model",
        str(tmp_path / "other.safetensors"),
        "--base",
        str(encoder.folder),
        "--task",
        "animals",
        "--data",
        str(data),
    ]
    result = invoke(arguments)
    assert isinstance(result.exception, AlignmentError)
    assert "other.safetensors: does not fit the base model" in str(result.exception)


def test_a_task_vector_is_not_run_as_a_model(tmp_path: Path, encoder: Encoder, data: Path) -> None:
    import thetau

    model = make_model(tmp_path / "other", seed=1)
    (thetau.open(model) - thetau.open(encoder.folder)).save(tmp_path / "vector.safetensors")
    arguments = [
        "--model",
        str(tmp_path / "vector.safetensors"),
        "--base",
        str(encoder.folder),
        "--task",
        "animals",
        "--data",
        str(data),
    ]
    result = invoke(arguments)
    assert isinstance(result.exception, CheckpointError)
    assert "this is a task vector. Add it to its base first: thetau vector apply" in str(result.exception)
