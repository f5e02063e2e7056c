"""What fine-tuning and merges do at every layer: by hand through plain hooks, by laws, as a chart and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import run
from thetau.diagnostics.layers import (
    FEATURES,
    SHARES,
    Layers,
    activations,
    direction_change,
    layers,
    magnitude_change,
    matrix_of,
    outside,
    relative_error,
)
from thetau.diagnostics.results import load_result
from thetau.errors import DataError, RecipeError
from thetau.evaluate import Evaluator
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.plots.layers import layers_chart
from thetau.studies.measures import named_merges
from thetau.tasks import load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

NAMES = ("animals", "weather")
VALUE = "encoder.layer.0.attention.self.value.weight"


class Bench:
    def __init__(self, root: Path) -> None:
        self.root, self.base, self.data = root, make_model(root / "base"), root / "data"
        self.encoder = load_encoder(self.base)
        tasks = [load_task(make_task(self.data, name)) for name in NAMES]
        self.evaluator = Evaluator(self.encoder, tasks, max_length=32, limits={"test": 20})
        for task in tasks:
            config = FinetuneConfig(steps=8, lr=5e-3, batch_size=16, max_length=32)
            finetune(self.encoder, task, root / task.name, config, base=str(self.base), heads=self.evaluator.heads)
            self.evaluator.load_base()
        self.weights = self.encoder.weights(exact=True)
        self.models = {name: {**self.weights, **read_weights(root / name)} for name in NAMES}

    def at(self, scale: float) -> dict[str, Tensor]:
        """θ₀ + λ Σ τ."""
        return {
            key: value + scale * sum(one[key] - value for one in self.models.values()) if value.is_floating_point() else value
            for key, value in self.weights.items()
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def found(bench: Bench) -> Layers:
    merged = {"half": bench.at(0.5), "animals": bench.models["animals"], "base": bench.weights}
    return layers(bench.evaluator, bench.weights, bench.models, merged, rows=10_000)


def by_hand(bench: Bench, weights: Any, task: str, module: str) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of one module at all tokens, example after example, without padding."""
    inside, outside_, inputs = [], [], bench.evaluator.inputs(task, "test")
    layer = dict(bench.encoder.backbone.named_modules())[module]
    bench.encoder.load(weights, "weights")
    handle = layer.register_forward_hook(
        lambda _, given, output: (inside.append(given[0][0]), outside_.append(output[0]))[:0] or None
    )
    with torch.inference_mode():
        for i in range(len(inputs)):
            bench.encoder.module(**inputs.batch([i]))
    handle.remove()
    bench.evaluator.load_base()
    return torch.cat(inside).double(), torch.cat(outside_).double()


def test_every_figure_of_a_layer_by_hand(bench: Bench, found: Layers) -> None:
    row = next(one for one in found.of("animals") if one.layer == VALUE)
    module = VALUE.removesuffix(".weight")
    (x0, y0), (x1, y1), (_, half) = (
        by_hand(bench, weights, "animals", module) for weights in (bench.weights, bench.models["animals"], bench.at(0.5))
    )
    assert row.rows == len(x0)
    assert row.direction == pytest.approx(float((1 - torch.cosine_similarity(x1, x0)).mean()), abs=1e-6)
    assert row.magnitude == pytest.approx(float(((x1.norm(dim=1) - x0.norm(dim=1)) / x0.norm(dim=1)).mean()), abs=1e-6)
    assert row.moved == pytest.approx(float(((y1 - y0).norm(dim=1) / y0.norm(dim=1)).mean()), rel=1e-4)
    assert row.error["half"] == pytest.approx(float(((half - y1).norm(dim=1) / y1.norm(dim=1)).mean()), rel=1e-4)
    assert row.drift["half"] == pytest.approx(float(((half - y0).norm(dim=1) / y0.norm(dim=1)).mean()), rel=1e-4)
    tau = (bench.models["animals"][VALUE] - bench.weights[VALUE]).double()
    v = torch.linalg.svd(tau)[2]
    for share, missed in zip(SHARES, row.missed, strict=True):
        kept = v[: max(1, round(share * tau.shape[1]))]
        left = x1 - (x1 @ kept.T) @ kept
        assert missed == pytest.approx(float((left.square().sum(1) / x1.square().sum(1)).mean()), abs=1e-4)


def test_a_merge_that_is_the_own_model_has_no_error_and_the_base_no_drift(found: Layers) -> None:
    for row in found.of("animals"):
        assert row.error["animals"] == 0 and row.drift["base"] == 0
        assert row.error["base"] > 0 or row.moved == 0
        assert row.drift["animals"] == row.moved
    assert found.rows[0].error["half"] > 0


def test_the_features_come_last_and_layers_in_the_order_in_which_they_run(found: Layers) -> None:
    names = [row.layer for row in found.of("weather")]
    assert names[-1] == FEATURES and names.index("encoder.layer.0.intermediate.dense.weight") < names.index(
        "encoder.layer.0.output.dense.weight"
    )
    assert {row.block for row in found.rows if "layer.0" in row.layer} == {0}
    last = found.of("weather")[-1]
    assert last.direction is None and last.missed == () and last.kind == FEATURES and last.rows == found.n["weather"] == 20


def test_few_rows_are_evenly_taken_and_the_same_under_all_weights(bench: Bench) -> None:
    inputs = bench.evaluator.inputs("animals", "test")
    few = activations(bench.encoder, bench.weights, inputs, 6, "base")
    again = activations(bench.encoder, bench.weights, inputs, 6, "base")
    bench.evaluator.load_base()
    for name, one in few.items():
        assert torch.equal(one.y, again[name].y)
        assert name == FEATURES or len(one.y) == 6


def test_the_base_is_there_afterwards_even_where_it_fails(bench: Bench) -> None:
    broken = {name: torch.full_like(value, float("nan")) if name == VALUE else value for name, value in bench.weights.items()}
    with pytest.raises(DataError, match="bad: gives NaN or Inf on this task"):
        layers(bench.evaluator, bench.weights, bench.models, {"bad": broken})
    after = bench.encoder.weights(exact=True)
    assert all(torch.equal(after[name], value) for name, value in bench.weights.items())
    with pytest.raises(DataError, match="at least one model"):
        layers(bench.evaluator, bench.weights, {}, {})


def test_directions_span_what_lies_in_them_and_nothing_else() -> None:
    vector = torch.zeros(6, 32)
    vector[0, :8] = 1.0
    along, across = torch.zeros(1, 32, dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64)
    along[0, :8], across[0, 8:] = 3.0, 1.0
    assert outside(along, vector, "w")[0] == pytest.approx(0, abs=1e-6)
    assert outside(across, vector, "w")[0] == pytest.approx(1)
    assert outside(along, torch.zeros(6, 32), "w") == ()
    falling = outside(torch.randn(50, 32, dtype=torch.float64), torch.randn(40, 32), "w")
    assert list(falling) == sorted(falling, reverse=True)


def test_the_papers_formulas_on_small_numbers() -> None:
    base, own = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, -3.0], [1.0, 0.0]])
    assert direction_change(own[:1], base[:1]) == pytest.approx(1)
    assert magnitude_change(2 * base, base) == pytest.approx(1), "rows that are zero in the base do not count"
    assert relative_error(own, base) == pytest.approx(50**0.5 / 5)
    assert relative_error(own, torch.zeros(2, 2)) == 0


def test_weights_are_turned_as_their_layers_read() -> None:
    assert matrix_of(torch.zeros(3, 2, 2, 2), 8).shape == (3, 8)
    assert matrix_of(torch.zeros(8, 24), 8).shape == (24, 8)


def test_as_json_and_chart(found: Layers, tmp_path: Path) -> None:
    found.save(tmp_path / "layers.json")
    assert load_result(Layers, tmp_path / "layers.json") == found
    layers_chart(found, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_on_the_command_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    models = [str(bench.root / name) for name in NAMES]
    shared = (
        "--base",
        str(bench.base),
        "--data",
        str(bench.data),
        "--limit",
        "10",
        "--max-length",
        "32",
        "-o",
        str(tmp_path / "out"),
    )
    code, text = run(
        capsys, "diagnose", "layers", *models, "-m", f"mine={models[0]}", "--method", "task_arithmetic,scale=0.5", *shared
    )
    assert code == 0, text
    assert "task_arithmetic,scale=0.5" in text and "block 0" in text and "features" in text
    told = load_result(Layers, tmp_path / "out" / "layers.json")
    assert told.merged == ("mine", "task_arithmetic,scale=0.5") and told.n == {"animals": 10, "weather": 10}
    for wrong, message in (
        (("--method", "nothing"), "unknown method"),
        (("--method", "ties,densty=1"), "densty"),
        (("-m", "nowhere"), "nowhere"),
        (("-m", f"x={models[0]}", "-m", f"x={models[1]}"), "two merges are called 'x'"),
        (("--rows", "0"), "rows"),
    ):
        code, text = run(capsys, "diagnose", "layers", *models, *wrong, *shared)
        assert code != 0 and message in text and "Traceback" not in text, wrong
    code, text = run(capsys, "diagnose", "layers", models[0], "--method", "average", *shared)
    assert code != 0 and "at least two" in text


def test_names_of_merges(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert named_merges(["x/y", "n=p/q", str(tmp_path / "a=b")]) == {"y": "x/y", "n": "p/q", "a=b": str(tmp_path / "a=b")}
    with pytest.raises(RecipeError, match="two merges"):
        named_merges(["x/y", "z/y"])
