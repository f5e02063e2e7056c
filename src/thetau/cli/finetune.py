"""`thetau finetune`: from a model and one or several tasks to a fine-tuned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer

from thetau.cli.options import with_options
from thetau.evaluate.options import DataFolder
from thetau.options import Option

NONE: Mapping[str, Any] = MappingProxyType({})


@with_options
def finetune(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, packaged model (all-MiniLM-L6-v2) or hub id.")],
    task: Annotated[list[str], typer.Option("--task", "-t", help="Name of a task, or its folder; several for paradigm mtl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint; must be new.")],
    data: DataFolder = None,
    paradigm: Annotated[
        str, typer.Option(help="standard, attention, linear, taujp, lora, mtl; joined by + (mtl+linear).")
    ] = "standard",
    preset: Annotated[str | None, typer.Option(help="Named settings that the options override: paper.")] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="What is trained: all, attention, attention+bias, attention+mlp, attention+mlp+bias, or patterns of names."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="taujp: a task, or a control task, whose inputs τ must not change; may be repeated."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="taujp: λ of the penalty.")] = None,
    penalty: Annotated[
        str | None, typer.Option(help="taujp: cyclic, strict, or incremental (tasks of --against before this one).")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="linear, taujp: a checkpoint of the tangent space, trained further.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default 200.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step. Default 16.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Parts that a batch is taken in. Default 1.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default 5e-5.")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which the learning rate rises. Default 0.1.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices only. Default 0.01.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradients are scaled down to this norm. Default 1.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example; longer ones are cut. Default 64.")] = None,
    rank: Annotated[int | None, typer.Option(help="lora: rank of the adapters. Default 8.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, by autocast.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU is taken where there is one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of examples and of dropout. Default 0.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between resumable states; 0 for none.")] = 100,
    kind: Annotated[
        str | None,
        typer.Option(help="How the model is read: sentence, image, mask, text_to_text or causal; by default as its files say."),
    ] = None,
    features: Annotated[
        Literal["unit", "raw"],
        typer.Option(
            help="unit: features of unit length; raw: linearised and penalised first, normalised by the head, as in the papers' code."
        ),
    ] = "unit",
    settings: Annotated[Mapping[str, Any], Option("Any other field of the config, as penalty_batch=4.", flags=("--set",))] = NONE,
) -> None:
    """Fine-tune a model on one task, or jointly on several. The head is frozen. The same run twice is done once; an interrupted one goes on.

    thetau finetune --model all-MiniLM-L6-v2 --task sms_spam --paradigm attention -o models/sms_spam

    Several GPUs, or with --cpu processes, share each batch: accelerate launch --num_processes 2 -m thetau finetune ...
    """
    from thetau.finetune import FinetuneConfig
    from thetau.finetune import finetune as run
    from thetau.finetune.progress import bar, is_first
    from thetau.models import load_encoder
    from thetau.models.loading import kind_named
    from thetau.tasks import load_task

    given: dict[str, Any] = {
        "preset": preset,
        "scope": scope,
        "strength": strength,
        "penalty": penalty,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "max_length": max_length,
        "rank": rank,
        "precision": precision,
        "device": device,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None} | dict(settings)
    config = FinetuneConfig.of({"paradigm": paradigm, "save_every": save_every, **options}, "thetau finetune")
    tasks = [load_task(name, data) for name in task]
    others = [load_task(name, data) for name in against or []]
    encoder = load_encoder(model, kind_named(kind), raw=features == "raw")
    name = "+".join(one.name for one in tasks)
    with bar(f"fine-tune {name}", config.steps, "steps") as progress:
        result = run(
            encoder,
            tasks,
            out,
            config,
            base=model,
            against=others,
            start=start,
            tick=lambda step, loss: progress.advance(1, f"fine-tune {name}, loss {loss:.3f}"),
        )
    if not is_first():
        return
    if result.cached:
        typer.echo(f"{out}: already holds this run (same config, data and base); nothing done.")
    else:
        cut = f", {result.truncated} of them cut at {config.max_length} tokens" if result.truncated else ""
        typer.echo(f"{out}: {name}, {result.examples} examples{cut}, {config.steps} steps in {result.seconds:.0f} s")
    typer.echo(f"loss {result.first_loss:.3f} → {result.last_loss:.3f}")
    if result.tangent:
        typer.echo("its task vector belongs to the tangent space: evaluate and add it there (thetau evaluate and suite do)")
