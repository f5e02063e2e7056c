"""`thetau evaluate`: a checkpoint measured on tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import Evaluate

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.studies.checkpoints import CheckpointMeasured


@with_options
def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="The checkpoint: folder, file, packaged model or hub id.")],
    backbone: Backbone,
    options: Evaluate,
    reading: Reading,
    json: Json,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Name of a task, or its folder; may be given again.")
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, for causal language models, by its rules; may be given again."),
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option(help="--harness: folder of task files (YAML) of your own, looked at first.")
    ] = None,
) -> None:
    """Measure a checkpoint on tasks, with n and a 95 % interval, by its own classifier, or heads trained with it, or made from the base.

    thetau evaluate --model merged --task sms_spam --task qnli
    """
    json.check()
    if bool(task) == bool(harness):
        raise RecipeError(["what is measured must be named: --task, or --harness, one of the two."], "thetau evaluate")
    if harness and replace(reading, cache=None) != Reading():
        raise RecipeError(
            ["the tasks of the harness say how they are read: leave --data, --max-length, --kind and their like out."],
            "thetau evaluate",
        )
    if harness_tasks is not None and not harness:
        raise RecipeError(["--harness-tasks is for --harness: name the task, or leave it out."], "thetau evaluate")
    if harness:
        _harness(model, harness, harness_tasks, backbone, options, reading.cache, json)
    else:
        _tasks(model, task or [], backbone, options, reading, json)


def _harness(
    model: str, names: list[str], folder: Path | None, backbone: Backbone, options: Evaluate, cache: Path | None, json: Json
) -> None:
    from thetau.cli.tables import show, table
    from thetau.studies.harness import evaluate_harness

    found = evaluate_harness(model, names, options, base=backbone.base, folder=folder, cache=cache)
    json.save(found)
    made = table(f"{found.model} by lm-evaluation-harness {found.version}", "task", "metric", "n", "value", "95 % interval")
    for name, scores in found.tasks.items():
        for one in scores:
            interval = "" if one.low is None or one.high is None else f"{one.low:.3f} – {one.high:.3f}"
            made.add_row(
                name,
                one.metric if one.filter == "none" else f"{one.metric} ({one.filter})",
                str(one.n),
                f"{one.value:.3f}",
                interval,
            )
    show(made)


def _tasks(model: str, task: list[str], backbone: Backbone, options: Evaluate, reading: Reading, json: Json) -> None:
    from rich.console import Console

    from thetau.evaluate.session import Session
    from thetau.finetune.progress import bar
    from thetau.studies.checkpoints import base_for, evaluate_checkpoint, evaluate_classifier, has_classifier, heads_of

    if has_classifier(model, options):
        measured = evaluate_classifier(model, task, options, reading)
        json.write(measured.to_json())
        Console(markup=False, emoji=False).print(_table(measured))
        return
    heads = heads_of(model, options)
    session = Session.open(
        base=base_for(model, backbone.base), tasks=task, limits=options.by_split(), reading=reading, heads=heads
    )
    total = sum(session.evaluator.size(name, options.split) for name in session.tasks)
    with bar(f"evaluate on {options.split}", total, "tokens") as progress:
        found = evaluate_checkpoint(model, session, options, on_tokens=progress.advance)
    json.write(found.to_json())
    Console(markup=False, emoji=False).print(_table(found))
    for line in found.notes:
        Console(soft_wrap=True).print(line, markup=False, highlight=False)


def _table(found: CheckpointMeasured) -> Table:
    from rich.table import Table

    form = ", in the linear form" if found.space == "tangent" else ""
    form += ", features corrected" if found.corrected else ""
    form += ", MLPs mixed by input" if found.mixed else ""
    form += ", with what was made for the tasks, chosen by the router" if found.routed else ""
    form += f", with what was made for {len(found.own)} of the tasks" if found.own else ""
    made = Table(caption=f"{found.model} on {found.split}{form}, head: {found.head}; in percent", caption_justify="left")
    made.add_column("task", no_wrap=True)
    kinds = set(found.metrics.values())
    same = len(kinds) == 1
    for column in ("n", next(iter(kinds)) if same else "value", "95 % interval"):
        made.add_column(column, justify="right")
    for name, one in found.tasks.items():
        unit = 1 if found.metrics[name] == "perplexity" else 100
        interval = f"{unit * one.low:.1f} – {unit * one.high:.1f}"
        shown = name if same else f"{name} ({found.metrics[name]})"
        made.add_row(shown, str(one.n), f"{unit * one.value:.1f}", interval)
    if len(found.tasks) > 1 and found.average is not None:
        made.add_section()
        made.add_row("average", "", f"{100 * found.average:.1f}", "")
    return made
