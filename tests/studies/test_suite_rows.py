"""Rows of a suite beside its merges: joint training, vectors after a transform, losses, seconds and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thetau
from thetau.errors import RecipeError
from thetau.evaluate import Evaluator
from thetau.evaluate.merging import at_scale
from thetau.evidence import MixtureConfig, learn_mixture
from thetau.evidence.wemoe import read_mixture
from thetau.facade import transform
from thetau.methods import Awd, Emr, Ties, Twin
from thetau.models import load_encoder, read_weights
from thetau.models.mixture import mixing
from thetau.studies.suite import run_suite
from thetau.studies.suite_results import SuiteResults, load_results
from thetau.studies.tables import markdown_table
from thetau.tasks import load_task
from thetau.tasks.suite import parse_suite
from tiny import make_model, make_task
from tiny import one_thread as one_thread

NAMES = ("animals", "weather")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SuiteResults]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("rows")
    for name in NAMES:
        make_task(root / "data", name)
    content = {
        "backbone": str(make_model(root / "model")),
        "tasks": list(NAMES),
        "finetune": {"steps": 8, "batch_size": 8, "lr": 1e-3, "max_length": 24},
        "evaluation": {"validation": 20, "test": 30, "max_length": 24},
        "joint": True,
        "methods": [
            {"method": "task_arithmetic", "scales": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]},
            {"name": "awd individuals", "method": "awd", "each": True},
            {"method": "emr", "each": True},
            {"method": "twin", "fields": {"density": 0.5}, "each": True},
            {"name": "WEMoE", "method": "ties", "wemoe": {"steps": 3, "depth": 1}},
        ],
    }
    results = run_suite(parse_suite(content, "rows", "rows.yaml"), root / "run", data=root / "data", memory=True)
    assert load_results(root / "run/results.json") == results
    return root, results


def evaluator(root: Path) -> Evaluator:
    limits = {"validation": 20, "test": 30}
    return Evaluator(
        load_encoder(root / "model"), [load_task(name, root / "data") for name in NAMES], limits=limits, max_length=24
    )


def test_every_row_has_its_role_and_its_loss(ran: tuple[Path, SuiteResults]) -> None:
    root, results = ran
    assert [row.role for row in results.rows] == ["pretrained", "individual", "joint", "merged", "each", "each", "each", "merged"]
    assert len(results.rows[3].trials) >= 7, "more than six λ"
    measured = evaluator(root)
    expected = measured.losses(measured.encoder.weights(), "test")
    for name in NAMES:
        assert results.rows[0].loss[name].value == pytest.approx(expected[name].value, rel=1e-5)
        assert results.rows[0].loss[name].n == 30
    assert all(set(row.loss) == set(NAMES) for row in results.rows)


def test_joint_training_is_one_model_of_all_steps(ran: tuple[Path, SuiteResults]) -> None:
    root, results = ran
    (folder,) = (root / "run/finetuned/joint").iterdir()
    assert results.rows[2].accuracy == evaluator(root).evaluate(read_weights(folder), "test")
    from thetau.finetune.output import read_record

    record = read_record(folder)
    assert record is not None
    assert record["config"]["steps"] == 16
    assert record["tasks"] == list(NAMES)


def test_individuals_after_awd_are_the_base_and_their_vectors(ran: tuple[Path, SuiteResults]) -> None:
    root, results = ran
    measured = evaluator(root)
    start = measured.encoder.weights()
    base = thetau.open(root / "model")
    models = [next((root / "run/finetuned" / name).iterdir()) for name in NAMES]
    made = transform([thetau.open(path) - base for path in models], Awd(), names=list(NAMES))
    for name, vector in zip(NAMES, made, strict=True):
        weights = at_scale(start, vector.state_dict(), 1.0)
        assert results.rows[4].accuracy[name] == measured.evaluate(weights, "test", [name])[name]


@pytest.mark.parametrize(("place", "method"), [(5, Emr()), (6, Twin(density=0.5))], ids=["emr", "twin"])
def test_each_task_has_what_the_method_makes_for_it(ran: tuple[Path, SuiteResults], place: int, method: Emr | Twin) -> None:
    root, results = ran
    measured = evaluator(root)
    start = measured.encoder.weights()
    base = thetau.open(root / "model")
    models = [next((root / "run/finetuned" / name).iterdir()) for name in NAMES]
    made = thetau.outputs([thetau.open(path) - base for path in models], method, names=list(NAMES))
    for name in NAMES:
        weights = at_scale(start, made[name].state_dict(), 1.0)
        assert results.rows[place].accuracy[name] == measured.evaluate(weights, "test", [name])[name]
        assert results.rows[place].loss[name] == measured.losses(weights, "test", [name])[name]


def test_a_mixture_by_input_stands_over_the_merge(ran: tuple[Path, SuiteResults]) -> None:
    root, results = ran
    measured, base = evaluator(root), thetau.open(root / "model")
    models = {name: next((root / "run/finetuned" / name).iterdir()) for name in NAMES}
    vectors = {name: thetau.open(path) - base for name, path in models.items()}
    start = measured.encoder.weights()
    weights = at_scale(start, thetau.merge(list(vectors.values()), Ties(), names=list(NAMES)).state_dict(), 1.0)
    config = MixtureConfig(steps=3, depth=1, examples=20, max_length=24)
    made = learn_mixture(
        measured.encoder, measured.tasks, vectors, weights, root / "again.safetensors", config, heads=measured.heads
    )
    mixture = read_mixture(made.path, weights, measured.encoder.base_hash)
    with mixing(measured.encoder, mixture, start) as (encoder, _), measured.through(encoder):
        assert results.rows[7].accuracy == measured.evaluate(weights, "test")
        assert results.rows[7].loss == measured.losses(weights, "test")
    assert results.rows[7].scale is None
    assert results.rows[7].method is not None
    assert "depth=1" in results.rows[7].method


def test_seconds_and_memory_are_of_a_process_of_its_own(ran: tuple[Path, SuiteResults]) -> None:
    row = ran[1].rows[3]
    assert row.peak_gigabytes is not None
    assert 0.1 < row.peak_gigabytes < 4, "torch and a model of a few thousand weights"
    assert row.merge_seconds is not None
    text = markdown_table(ran[1])
    assert "| loss | seconds | peak GB |" in text
    assert f"{row.peak_gigabytes:.2f}" in text


def test_a_row_of_individuals_has_no_lambda() -> None:
    content = {"backbone": "b", "tasks": ["a"], "methods": [{"method": "awd", "each": True, "scales": [1.0]}]}
    with pytest.raises(RecipeError, match=r"`methods\[0\]\.each` must be true or false, and true only without `scales`"):
        parse_suite(content, "s", "s.yaml")


@pytest.mark.parametrize("more", [{"wemoe": True}, {"wemoe": {}, "scales": [1.0]}, {"wemoe": {}, "each": True}])
def test_a_mixture_stands_alone(more: dict[str, Any]) -> None:
    content = {"backbone": "b", "tasks": ["a"], "methods": [{"method": "ties", **more}]}
    with pytest.raises(RecipeError, match=r"`methods\[0\]\.wemoe` must be a mapping"):
        parse_suite(content, "s", "s.yaml")


def test_a_mixtures_fields_are_checked_before_the_run(tmp_path: Path) -> None:
    content = {"backbone": "b", "tasks": ["a"], "methods": [{"method": "ties", "wemoe": {"stepps": 3}}]}
    with pytest.raises(RecipeError, match=r"(?s)method 'ties', wemoe: .*unknown key 'stepps'"):
        run_suite(parse_suite(content, "s", "s.yaml"), tmp_path)


def test_a_mixture_of_other_models_finds_room(ran: tuple[Path, SuiteResults], tmp_path: Path) -> None:
    """A run goes on in its folder with other settings of fine-tuning, as without a mixture."""
    root, _ = ran
    for steps in (2, 3):
        content = {
            "backbone": str(root / "model"),
            "tasks": list(NAMES),
            "finetune": {"steps": steps, "batch_size": 8, "lr": 1e-3, "max_length": 24},
            "evaluation": {"validation": 8, "test": 8, "max_length": 24},
            "methods": [{"name": "WEMoE", "method": "ties", "wemoe": {"steps": 1, "depth": 0}}],
        }
        run_suite(parse_suite(content, "rows", "rows.yaml"), tmp_path / "run", data=root / "data")
    assert len(list((tmp_path / "run/wemoe").glob("*.safetensors"))) == 2
