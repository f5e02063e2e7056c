"""`thetau finetune`: from a model and a task to a fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, packaged model (all-MiniLM-L6-v2) or hub id.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Name of a task, or its folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint; must be new.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")
    ] = None,
    paradigm: Annotated[str, typer.Option(help="How the model is trained.")] = "standard",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-5,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of matrices only.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")] = 1.0,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the order of examples and of dropout.")] = 0,
) -> None:
    """Fine-tune a model on one task. The head is frozen: it is made from the class names. The same run twice is done once.

    thetau finetune --model all-MiniLM-L6-v2 --task sms_spam -o models/sms_spam
    """
    from thetau.finetune import FinetuneConfig
    from thetau.finetune import finetune as run
    from thetau.finetune.progress import bar
    from thetau.models import load_encoder
    from thetau.tasks import load_task

    config = FinetuneConfig.of(
        {
            "paradigm": paradigm,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_length": max_length,
            "seed": seed,
        },
        "thetau finetune",
    )
    chosen = load_task(task, data)
    encoder = load_encoder(model)
    with bar(f"fine-tune {chosen.name}", steps, "steps") as progress:
        result = run(
            encoder,
            chosen,
            out,
            config,
            base=model,
            tick=lambda step, loss: progress.advance(1, f"fine-tune {chosen.name}, loss {loss:.3f}"),
        )
    if result.cached:
        typer.echo(f"{out}: already holds this run (same config, data and base); nothing done.")
    else:
        cut = f", {result.truncated} of them cut at {config.max_length} tokens" if result.truncated else ""
        typer.echo(f"{out}: {chosen.name}, {result.examples} examples{cut}, {steps} steps in {result.seconds:.0f} s")
    typer.echo(f"loss {result.first_loss:.3f} → {result.last_loss:.3f}")
