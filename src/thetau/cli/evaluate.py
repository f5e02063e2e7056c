"""`thetau evaluate`: a checkpoint measured on tasks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Space(StrEnum):
    """Where a checkpoint is evaluated."""

    auto = "auto"
    weights = "weights"
    tangent = "tangent"


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="The checkpoint: folder, file, packaged model or hub id.")],
    task: Annotated[list[str], typer.Option("--task", "-t", help="Name of a task, or its folder; may be given again.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")
    ] = None,
    base: Annotated[
        str, typer.Option("--base", "-b", help="The pre-trained model: gives architecture, tokenizer, heads.")
    ] = "all-MiniLM-L6-v2",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="At most so many examples a task, always the same ones.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.", min=3)] = 64,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side of an image; by default the model's own.", min=1)] = None,
    kind: Annotated[
        str | None, typer.Option(help="How the base is read: sentence, image, mask or text_to_text; by default as its files say.")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="A fine-tuned model's folder whose trained heads are used; by default the model's own.")
    ] = None,
    space: Annotated[
        Space, typer.Option(help="weights: run the model; tangent: its linear form; auto: as the checkpoint says.")
    ] = Space.auto,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")] = None,
) -> None:
    """Measure a checkpoint on tasks, with n and a 95 % interval, under heads made from the base, or trained with the model.

    thetau evaluate --model merged --task sms_spam --task qnli
    """
    from thetau.cli.common import check_file, write_json

    check_file(json)
    from dataclasses import asdict

    from thetau.checkpoint.locate import packaged_models
    from thetau.errors import DataError
    from thetau.evaluate import Evaluator, average
    from thetau.evaluate.tuned import difference, is_tangent, make_space
    from thetau.finetune.output import trained_heads
    from thetau.finetune.progress import bar
    from thetau.models import load_encoder, locate, read_weights
    from thetau.models.loading import kind_named
    from thetau.tasks import load_task

    tasks = [load_task(name, data) for name in task]
    encoder = load_encoder(base, kind_named(kind))
    where = locate(model) if model in packaged_models() else Path(model)
    tangent = space is Space.tangent or (space is Space.auto and where.exists() and is_tangent(where))
    weights = read_weights(where if where.exists() else model, base=encoder.folder)
    source = heads or where
    given = trained_heads(source) if source.is_dir() else {}
    if heads is not None and not given:
        raise DataError(f"{heads}: holds no trained heads. Give the folder of a model that was fine-tuned with train_head.")
    evaluator = Evaluator(encoder, tasks, limits={split: limit}, max_length=max_length, image_size=image_size, heads=given)
    total = sum(evaluator.size(name, split) for name in evaluator.tasks)
    with bar(f"evaluate on {split}", total, "tokens") as progress:
        evaluator.on_tokens = progress.advance
        if tangent:
            own = encoder.weights(exact=True)
            linear = make_space(evaluator, own, {"model": difference(weights, own)}, tangent=True)
            found = {name: linear.accuracy({"model": 1.0}, name, split) for name in evaluator.tasks}
        else:
            found = evaluator.evaluate(weights, split, origin=model)
    kinds = {name: evaluator.tasks[name].metric for name in found}
    if json is not None:
        facts = {"model": model, "base": base, "split": split, "max_length": max_length, "average": average(found)}
        facts |= {"space": "tangent" if tangent else "weights"}
        each = {name: {"metric": kinds[name], **asdict(one)} for name, one in found.items()}
        write_json(json, facts | {"tasks": each})
    from rich.console import Console
    from rich.table import Table

    form = ", in the linear form" if tangent else ""
    table = Table(caption=f"{model} on {split}{form}, heads from {base}; in percent", caption_justify="left")
    table.add_column("task", no_wrap=True)
    same = len(set(kinds.values())) == 1
    for column in ("n", next(iter(kinds.values())) if same else "value", "95 % interval"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        interval = f"{100 * one.low:.1f} – {100 * one.high:.1f}"
        table.add_row(name if same else f"{name} ({kinds[name]})", str(one.n), f"{100 * one.value:.1f}", interval)
    if len(found) > 1:
        table.add_section()
        table.add_row("average", "", f"{100 * average(found):.1f}", "")
    Console().print(table)
