"""`thetau evaluate`: the accuracy of a checkpoint on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")] = None,
) -> None:
    """Measure a checkpoint's accuracy on tasks, with n and a 95 % interval, under heads made from the base and the class names.

    thetau evaluate --model merged --task sms_spam --task qnli
    """
    import json as serialiser

    from thetau.cli.common import check_folder

    check_folder(json)
    from dataclasses import asdict

    from thetau.evaluate import Evaluator, average
    from thetau.finetune.progress import bar
    from thetau.models import load_encoder, locate, read_weights
    from thetau.models.locate import packaged_models
    from thetau.tasks import load_task

    tasks = [load_task(name, data) for name in task]
    encoder = load_encoder(base)
    weights = read_weights(locate(model) if model in packaged_models() else model, base=encoder.folder)
    evaluator = Evaluator(encoder, tasks, limits={split: limit}, max_length=max_length)
    total = sum(evaluator.size(name, split) for name in evaluator.tasks)
    with bar(f"evaluate on {split}", total, "tokens") as progress:
        evaluator.on_tokens = progress.advance
        found = evaluator.evaluate(weights, split, origin=model)
    if json is not None:
        facts = {"model": model, "base": base, "split": split, "max_length": max_length, "average": average(found)}
        json.write_text(serialiser.dumps(facts | {"tasks": {name: asdict(one) for name, one in found.items()}}, indent=2) + "\n")
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"{model} on {split}, heads from {base}; accuracy in percent", caption_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("n", "accuracy", "95 % interval"):
        table.add_column(column, justify="right")
    for name, accuracy in found.items():
        interval = f"{100 * accuracy.low:.1f} – {100 * accuracy.high:.1f}"
        table.add_row(name, str(accuracy.n), f"{100 * accuracy.value:.1f}", interval)
    if len(found) > 1:
        table.add_section()
        table.add_row("average", "", f"{100 * average(found):.1f}", "")
    Console().print(table)
