"""`thetau evidence fisher`: how much each parameter of a fine-tuned model matters to its task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.common import Quiet, check_folder


def fisher(
    model: Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model: folder, file, adapter or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, ending in .safetensors.")],
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Name of its task, or its folder; by default as its record says.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model that it was fine-tuned from; by default as its record says.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Training examples that are read. Default 256.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Whose gradients: true (every label as the model has it), sampled from those, or empirical. Default true."
        ),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="Divide by the norm over all tensors.")] = False,
    batch: Annotated[int | None, typer.Option(help="Examples whose gradients are held at once. Default 8.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="How the base is read: sentence, image, mask or text_to_text; by default as its files say.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other field of the config, as max_length=128.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")] = None,
    quiet: Quiet = False,
) -> None:
    """Collect the Fisher diagonal of a fine-tuned model: its squared gradients, example by example, averaged.

    A run that was cut off goes on where it was. Give the file to a merge as `evidence: {fisher: {sst2: sst2-fisher.safetensors}}`.

    thetau evidence fisher --model models/sst2 -o sst2-fisher.safetensors
    """
    import json as serialiser

    from thetau.cli.common import parse_fields
    from thetau.cli.subject import open_subject
    from thetau.evidence import FisherConfig, collect_fisher
    from thetau.finetune.progress import bar
    from thetau.models import read_weights

    check_folder(json)
    check_folder(out)
    given = {"examples": examples, "labels": labels, "normalise": normalise or None, "batch": batch}
    config = FisherConfig.of(
        {name: value for name, value in given.items() if value is not None} | parse_fields(set_ or []), "thetau evidence fisher"
    )
    subject = open_subject(model, task, base, data, kind, purpose="a Fisher is collected")
    weights = read_weights(model, base=subject.encoder.folder)
    with bar(f"fisher {subject.task.name}", config.examples, "examples") as progress:
        result = collect_fisher(
            subject.encoder,
            subject.task,
            weights,
            out,
            config,
            head=subject.head,
            origin=model,
            tick=progress.advance,
        )
        progress.finish(f"fisher {subject.task.name}")
    if json is not None:
        json.write_text(serialiser.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if quiet:
        return
    for note in result.notes:
        typer.echo(f"· {note}", err=True)
    kept = " (from before)" if result.cached else ""
    typer.echo(f"{out}: {result.task}, {result.examples} examples, labels {result.labels}, {result.tensors} tensors{kept}")
    typer.echo(f"norm {result.norm:.4g}{', divided by it' if result.normalised else ''}")
