"""`thetau evidence gram` and `gradients`: second moments of every linear layer of a fine-tuned model on its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from thetau.cli.common import File, Json, check_folder
from thetau.cli.evidence.common import BaseName, Opening, Quiet, TaskName, TunedModel, Workers, tell
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import DataFolder, Kind
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.evidence.moments import Moment


@final
@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How second moments are collected; what is not given is as `MomentConfig` has it."""

    examples: Annotated[int | None, Option("Training examples that are read. Default 256.")] = None
    batch: Annotated[int | None, Option("Examples that run at once. Default 32.")] = None
    max_memory: Annotated[
        str | None,
        Option("Memory that the sums may take, such as 2GB; layers beyond it are measured in another run. Default 4GB."),
    ] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as max_length=128.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given. Raises `RecipeError`: the memory is no size."""
        from thetau.recipes.schema import parse_size

        try:
            memory = None if self.max_memory is None else parse_size(self.max_memory)
        except ValueError as error:
            raise RecipeError([str(error)], "--max-memory") from error
        own = {"examples": self.examples, "batch": self.batch, "memory": memory}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def gram(
    model: TunedModel,
    out: File,
    task: TaskName = None,
    data: DataFolder = None,
    base: BaseName = None,
    kind: Kind = None,
    quiet: Quiet = False,
    *,
    options: Measuring,
    workers: Workers,
    json: Json,
) -> None:
    """Collect the Gram matrix of every linear layer's inputs, which RegMean merges with. No label is looked at.

    A run that was cut off goes on where it was. Give the file to a merge as `evidence: {gram: {sst2: sst2-gram.safetensors}}`.

    thetau evidence gram --model models/sst2 -o sst2-gram.safetensors
    """
    opening = Opening(model=model, task=task, base=base, data=data, kind=kind, purpose="second moments are collected")
    _collect("gram", opening, out, quiet, options, workers, json)


@with_options
def gradients(
    model: TunedModel,
    out: File,
    task: TaskName = None,
    data: DataFolder = None,
    base: BaseName = None,
    kind: Kind = None,
    quiet: Quiet = False,
    *,
    options: Measuring,
    workers: Workers,
    json: Json,
) -> None:
    """Collect the second moments of every linear layer's output gradients: beside `gram` the other factor of K-FAC.

    Labels are as the model has them (`--set labels=empirical` takes the data's). A run that was cut off goes on where it was.

    thetau evidence gradients --model models/sst2 -o sst2-gradients.safetensors
    """
    opening = Opening(model=model, task=task, base=base, data=data, kind=kind, purpose="second moments are collected")
    _collect("gradients", opening, out, quiet, options, workers, json)


def _collect(moment: Moment, opening: Opening, out: Path, quiet: bool, options: Measuring, workers: Workers, json: Json) -> None:
    from thetau.evidence import MomentConfig, collect_second_moments
    from thetau.evidence.jobs import Jobs
    from thetau.finetune.progress import bar

    json.check()
    check_folder(out)
    config = MomentConfig.of(options.given(), f"thetau evidence {moment}")
    opened = opening()
    with bar(f"{moment} {opened.task.name}", config.examples, "examples") as progress:
        result = collect_second_moments(
            opened.encoder,
            opened.task,
            opened.weights,
            out,
            moment,
            config,
            head=opened.head,
            origin=opening.model,
            tick=progress.advance,
            jobs=Jobs(count=workers.jobs, open=opening),
            device=workers.device,
        )
        progress.finish(f"{moment} {opened.task.name}")
    json.write(result.to_json())
    labels = "" if moment == "gram" else f", labels {result.labels}"
    tell(
        f"{out}: {result.task}, {result.examples} examples{labels}, {result.tensors} layers",
        result.notes,
        cached=result.cached,
        quiet=quiet,
    )
