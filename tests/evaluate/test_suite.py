"""A whole suite on a tiny model: the run, its resumption, its tables and chart."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from thetau.cli.suite.tables import rich_table
from thetau.errors import DataError, OutputError, RecipeError
from thetau.evaluate import average, normalised
from thetau.studies import SuiteResults, load_results, markdown_table
from thetau.studies import suite as module
from thetau.studies.suite import quick_form, run_suite
from thetau.tasks import Suite, load_suite
from tiny import make_model, make_task
from tiny import one_thread as one_thread

# A random model moves far: warned of, and rightly.
pytestmark = pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.facade.ThetauWarning")

TEXT = """
description: A tiny suite.
backbone: {model}
tasks: [animals, weather]
finetune: {{steps: 25, batch_size: 16, lr: 2.0e-3, max_length: 32}}
finetune_of: {{weather: {{steps: 20}}}}
evaluation: {{validation: 16, test: 30, max_length: 32}}
methods:
  - {{method: average}}
  - {{method: task_arithmetic, scales: [0.3, 0.6, 0.9]}}
  - {{name: awd + ties, method: awd, fields: {{then: {{name: ties, density: 0.5}}, tensors: all, elsewhere: sum}}, scales: [0.5, 1.0]}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    model = make_model(tmp_path / "base")
    make_task(tmp_path / "data", "animals")
    make_task(tmp_path / "data", "weather")
    (tmp_path / "tiny.yaml").write_text(TEXT.format(model=model), encoding="utf-8")
    return load_suite(tmp_path / "tiny.yaml")


def run(suite: Suite, tmp_path: Path, **more: Any) -> tuple[SuiteResults, str]:
    console = Console(file=io.StringIO(), width=200)
    results = run_suite(suite, tmp_path / "run", data=tmp_path / "data", console=console, **more)
    return results, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_suite_runs_end_to_end(suite: Suite, tmp_path: Path) -> None:
    results, said = run(suite, tmp_path)
    assert [row.name for row in results.rows] == ["pre-trained", "individual", "average", "task_arithmetic", "awd + ties"]
    pretrained, individual, plain, arithmetic, _ = results.rows
    assert individual.absolute > pretrained.absolute + 0.2
    assert individual.normalised == 1
    for row in results.rows:
        assert {accuracy.n for accuracy in row.accuracy.values()} == {30}
        assert row.absolute == pytest.approx(average(row.accuracy))
        assert row.normalised == pytest.approx(normalised(row.accuracy, individual.accuracy))
    assert plain.trials == ()
    assert [trial.scale for trial in arithmetic.trials][:3] == [0.3, 0.6, 0.9], "the grid, and then what it is widened by"
    best = max(trial.normalised for trial in arithmetic.trials)
    assert arithmetic.scale == min(trial.scale for trial in arithmetic.trials if trial.normalised == best)
    assert "scale=1.0" in str(arithmetic.method)
    assert "density=0.5" in str(results.rows[-1].method)
    assert [(task.config["steps"], task.train, task.validation, task.test) for task in results.tasks] == [
        (25, 64, 16, 30),
        (20, 64, 16, 30),
    ]
    assert "fine-tuned weather" in said
    assert load_results(tmp_path / "run" / "results.json") == results
    assert (tmp_path / "run" / "results.md").read_text(encoding="utf-8") == markdown_table(results)


def test_a_merge_through_the_suite_is_the_merge_of_its_checkpoints(suite: Suite, tmp_path: Path) -> None:
    import thetau
    from thetau.evaluate import Evaluator
    from thetau.models import load_encoder
    from thetau.tasks import load_task

    results, _ = run(suite, tmp_path, methods=["task_arithmetic"])
    row = results.rows[-1]
    base = thetau.open(suite.backbone)
    models = [next((tmp_path / "run" / "finetuned" / task).iterdir()) for task in suite.tasks]
    assert row.scale is not None
    method = thetau.methods.TaskArithmetic(scale=row.scale)
    weights = (base + thetau.merge([thetau.open(model) - base for model in models], method)).state_dict()
    tasks = [load_task(name, tmp_path / "data") for name in suite.tasks]
    evaluator = Evaluator(load_encoder(suite.backbone), tasks, limits={"test": 30}, max_length=32)
    assert evaluator.evaluate(weights, "test") == row.accuracy


def test_a_finished_run_does_nothing_again(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(suite, tmp_path)

    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("this was done before")

    monkeypatch.setattr("thetau.finetune.run.train", never)
    monkeypatch.setattr(module, "merged_vector", never)
    monkeypatch.setattr("thetau.evaluate.evaluator.measure", never)
    again, said = run(suite, tmp_path)
    assert again.rows == first.rows
    assert "kept from before" in said


def test_an_interrupted_run_goes_on_where_it_was(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(suite, tmp_path)
    trained: list[str] = []
    merged: list[str] = []
    original = module.merged_vector

    def counted(base: Path, models: Any, names: Any, method: Any) -> Any:
        merged.append(type(method).__name__)
        if len(merged) == 2:
            raise KeyboardInterrupt
        return original(base, models, names, method)

    def tune(encoder: Any, task: Any, *args: Any, original: Any = module.finetune, **more: Any) -> Any:
        result = original(encoder, task, *args, **more)
        if not result.cached:
            trained.append(task.name)
        return result

    monkeypatch.setattr(module, "merged_vector", counted)
    monkeypatch.setattr(module, "finetune", tune)
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, other, data=tmp_path / "data", console=Console(file=io.StringIO()))
    assert not (other / "results.json").exists()
    assert (trained, merged) == (["animals", "weather"], ["Average", "TaskArithmetic"])
    resumed = run_suite(suite, other, data=tmp_path / "data", console=Console(file=io.StringIO()))
    assert trained == ["animals", "weather"], "nothing was trained twice"
    assert merged == ["Average", "TaskArithmetic", "TaskArithmetic", "Awd"], "the finished row was kept"

    def figures(results: SuiteResults) -> list[Any]:
        return [(row.name, row.scale, row.trials, row.accuracy) for row in results.rows]

    assert figures(resumed) == figures(whole), "and the figures are those of a run in one go"


def test_other_settings_find_room_beside_the_old_ones(suite: Suite, tmp_path: Path) -> None:
    run(suite, tmp_path, methods=["average"])
    results, _ = run(replace(suite, finetune={**suite.finetune, "seed": 1}), tmp_path, methods=["average"])
    assert [task.config["seed"] for task in results.tasks] == [1, 1]
    assert len(list((tmp_path / "run" / "finetuned" / "animals").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"finetune": {"step": 1}}, RecipeError, "unknown key 'step'. Did you mean 'steps'"),
        ({"tasks": ("animals", "wether")}, DataError, "no task 'wether'.*Did you mean 'weather'"),
    ],
)
def test_a_wrong_suite_fails_before_any_work(
    suite: Suite, tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(replace(suite, **change), tmp_path)
    assert not (tmp_path / "run").exists()


def test_wrong_methods_fail_before_any_work(suite: Suite, tmp_path: Path) -> None:
    choice = suite.methods[1]
    with pytest.raises(RecipeError, match=r"method 'task_arithmetic' of the suite.*\n.*unknown field 'density'"):
        run(replace(suite, methods=(replace(choice, fields={"density": 0.5}),)), tmp_path)
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        run(replace(suite, methods=(replace(choice, method="tis"),)), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_runs_place_is_an_error(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OutputError, match="the run's folder is a file"):
        run(suite, tmp_path)


def test_the_quick_form_is_smaller(suite: Suite) -> None:
    demo = quick_form(load_suite("demo"))
    assert demo.finetune["steps"] == 20
    assert (demo.limits.validation, demo.limits.test) == (40, 80)
    assert all(len(choice.scales) <= 2 for choice in demo.methods)
    assert "steps" not in quick_form(suite).finetune_of["weather"]


def test_tables_and_chart_show_every_figure(suite: Suite, tmp_path: Path) -> None:
    from thetau.plots import suite_bars

    results, _ = run(suite, tmp_path)
    lines = markdown_table(results).splitlines()
    assert lines[0] == "| method | λ | animals | weather | average | normalised | loss |"
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(results.rows)
    arithmetic = results.rows[3]
    cells = [cell.strip(" *") for cell in lines[5].strip("|").split("|")]
    assert cells == [
        "task_arithmetic",
        f"{arithmetic.scale:g}{'!' * arithmetic.at_end}",
        *(f"{100 * accuracy.value:.1f}" for accuracy in arithmetic.accuracy.values()),
        f"{100 * arithmetic.absolute:.1f}",
        f"{100 * arithmetic.normalised:.1f}",
        f"{sum(one.value for one in arithmetic.loss.values()) / 2:.3f}",
    ]
    assert "n = 30 a task" in lines[-1]
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_table(results))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert all(row.name in shown for row in results.rows)
    suite_bars(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"suite": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as the results of a suite"):
        load_results(tmp_path / "results.json")


# Command line


def test_the_commands_list_and_run(suite: Suite, tmp_path: Path) -> None:
    from thetau.cli.suite import suite_app

    listed = CliRunner().invoke(suite_app, ["list"])
    assert "demo: " in listed.output
    out = tmp_path / "run"
    arguments = ["run", str(tmp_path / "tiny.yaml"), "--out", str(out), "--data", str(tmp_path / "data"), "--quick"]
    result = CliRunner().invoke(suite_app, [*arguments, "--methods", "average,task_arithmetic"])
    assert result.exit_code == 0, result.output
    assert "task_arithmetic" in result.output
    assert {path.name for path in out.iterdir()} == {
        "cache",
        "finetuned",
        "plan.json",
        "results.json",
        "results.md",
        "results.png",
    }
    facts = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert facts["quick"] is True
    assert [len(row["trials"]) for row in facts["rows"]] == [0, 0, 0, 1]
