"""`thetau evidence fisher`: how much each parameter of a fine-tuned model matters to its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, final

import typer

from thetau.cli.common import File, Json, check_folder
from thetau.cli.options import with_options
from thetau.evaluate.options import DataFolder, Kind
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How the Fisher is collected; what is not given is as `FisherConfig` has it."""

    examples: Annotated[int | None, Option("Training examples that are read. Default 256.")] = None
    labels: Annotated[
        str | None,
        Option("Whose gradients: true (every label as the model has it), sampled from those, or empirical. Default true."),
    ] = None
    normalise: Annotated[bool, Option("Divide by the norm over all tensors.", flags=("--normalise",))] = False
    batch: Annotated[int | None, Option("Examples whose gradients are held at once. Default 8.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as max_length=128.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"examples": self.examples, "labels": self.labels, "normalise": self.normalise or None, "batch": self.batch}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def fisher(
    model: Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model: folder, file, adapter or hub id.")],
    out: File,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Name of its task, or its folder; by default as its record says.")
    ] = None,
    data: DataFolder = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model that it was fine-tuned from; by default as its record says.")
    ] = None,
    kind: Kind = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    *,
    options: Collecting,
    json: Json,
) -> None:
    """Collect the Fisher diagonal of a fine-tuned model: its squared gradients, example by example, averaged.

    A run that was cut off goes on where it was. Give the file to a merge as `evidence: {fisher: {sst2: sst2-fisher.safetensors}}`.

    thetau evidence fisher --model models/sst2 -o sst2-fisher.safetensors
    """
    from thetau.cli.subject import open_subject
    from thetau.evidence import FisherConfig, collect_fisher
    from thetau.finetune.progress import bar
    from thetau.models import read_weights

    json.check()
    check_folder(out)
    config = FisherConfig.of(options.given(), "thetau evidence fisher")
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
    json.write(result.to_json())
    if quiet:
        return
    for note in result.notes:
        typer.echo(f"· {note}", err=True)
    kept = " (from before)" if result.cached else ""
    typer.echo(f"{out}: {result.task}, {result.examples} examples, labels {result.labels}, {result.tensors} tensors{kept}")
    typer.echo(f"norm {result.norm:.4g}{', divided by it' if result.normalised else ''}")
