"""`thetau evidence fisher`: how much each parameter of a fine-tuned model matters to its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, final

import typer

from thetau.cli.common import File, Json, check_folder
from thetau.cli.evidence.common import BaseName, Opening, Quiet, TaskName, TunedModel, Workers, tell
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
    model: TunedModel,
    out: File,
    task: TaskName = None,
    data: DataFolder = None,
    base: BaseName = None,
    kind: Kind = None,
    quiet: Quiet = False,
    *,
    options: Collecting,
    workers: Workers,
    json: Json,
) -> None:
    """Collect the Fisher diagonal of a fine-tuned model: its squared gradients, example by example, averaged.

    A run that was cut off goes on where it was. Give the file to a merge as `evidence: {fisher: {sst2: sst2-fisher.safetensors}}`.

    thetau evidence fisher --model models/sst2 -o sst2-fisher.safetensors
    """
    from thetau.evidence import FisherConfig, collect_fisher
    from thetau.evidence.jobs import Jobs
    from thetau.finetune.progress import bar

    json.check()
    check_folder(out)
    config = FisherConfig.of(options.given(), "thetau evidence fisher")
    opening = Opening(model=model, task=task, base=base, data=data, kind=kind, purpose="a Fisher is collected")
    opened = opening()
    with bar(f"fisher {opened.task.name}", config.examples, "examples") as progress:
        result = collect_fisher(
            opened.encoder,
            opened.task,
            opened.weights,
            out,
            config,
            head=opened.head,
            origin=model,
            tick=progress.advance,
            jobs=Jobs(count=workers.jobs, open=opening),
            device=workers.device,
        )
        progress.finish(f"fisher {opened.task.name}")
    json.write(result.to_json())
    tell(
        f"{out}: {result.task}, {result.examples} examples, labels {result.labels}, {result.tensors} tensors",
        result.notes,
        cached=result.cached,
        quiet=quiet,
    )
    if not quiet:
        typer.echo(f"norm {result.norm:.4g}{', divided by it' if result.normalised else ''}")
