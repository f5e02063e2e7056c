"""`thetau evidence wemoe`: routers that mix the tasks' MLPs for each input of a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from thetau.cli.common import Json, TunedModels
from thetau.cli.evidence.common import tell
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.evidence import Mixed


@final
@dataclass(frozen=True, kw_only=True)
class Routing:
    """How routers are learned; what is not given is as `MixtureConfig` has it."""

    depth: Annotated[
        int | None, Option("Linear layers of a router; 0 is a number a task and block. Default 2.", least=0, most=2)
    ] = None
    steps: Annotated[int | None, Option("Of Adam. Default 1000.", least=0)] = None
    examples: Annotated[int | None, Option("Unlabelled examples of each task. Default all of the split.")] = None
    split: Annotated[str | None, Option("Of which split; the authors' is test. Default validation.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as lr=0.01.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"depth": self.depth, "steps": self.steps, "examples": self.examples, "split": self.split}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def wemoe(
    models: TunedModels,
    merged: Annotated[Path, typer.Option("--merged", help="Folder of the merged model; the mixture goes to its folder `wemoe`.")],
    backbone: Backbone,
    options: Routing,
    reading: Reading,
    json: Json,
) -> None:
    """Learn WEMoE's routers, which mix the tasks' MLPs for each input, kept beside a merged model and used by `thetau evaluate`.

    A run that was cut off goes on where it was.

    thetau evidence wemoe runs/demo/finetuned/*/* --merged merged
    """
    from thetau.errors import DataError
    from thetau.evaluate.session import Session
    from thetau.evidence import MixtureConfig, learn_mixture
    from thetau.evidence.wemoe import mixture_file
    from thetau.finetune.progress import bar
    from thetau.models import read_weights

    json.check()
    if not merged.is_dir():
        raise DataError(
            f"{merged}: must be the folder of a merged model, in which the mixture is kept. Merge into a folder first."
        )
    sizes = {"max_length": reading.max_length, "image_size": reading.image_size}
    config = MixtureConfig.of({**sizes, **options.given()}, "thetau evidence wemoe")
    session = Session.open(models, base=backbone.base, reading=reading)
    if session.tangent:
        raise DataError("these models belong to the tangent space; routers mix vectors of the model's own space.")
    with bar("wemoe", config.steps, "steps") as progress:
        result = learn_mixture(
            session.encoder,
            session.evaluator.tasks,
            session.expressions(),
            read_weights(merged, base=session.encoder.folder),
            mixture_file(merged),
            config,
            heads=session.evaluator.heads,
            origin=str(merged),
            tick=lambda step, entropy: progress.advance(1),
        )
        progress.finish("wemoe")
    json.write(result.to_json())
    _show(result)


def _show(result: Mixed) -> None:
    from thetau.cli.tables import show, table

    made = table(
        f"{result.steps} steps, {result.seconds:.2f} s each, {result.blocks} blocks; entropy in nats, then how much of each task's vector",
        *("task", "examples", "at first", "at last", *result.tasks),
    )
    for task in result.tasks:
        first, last = result.entropy[task]
        given = [f"{result.shares[task][name]:.2f}" for name in result.tasks]
        made.add_row(task, str(result.examples[task]), f"{first:.3f}", f"{last:.3f}", *given)
    show(made)
    tell(
        f"{result.path}: {result.nbytes / 1e6:.1f} MB, {result.numbers:,} numbers in routers", result.notes, cached=result.cached
    )
