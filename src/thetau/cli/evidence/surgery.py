"""`thetau evidence surgery`: a small correction a task that brings a merged model's features to those of the task's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, final

import typer

from thetau.cli.common import Json, TunedModels
from thetau.cli.evidence.common import tell
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Correcting:
    """How corrections are learned; what is not given is as `SurgeryConfig` has it."""

    rank: Annotated[int | None, Option("Of a correction. Default 16.")] = None
    updates: Annotated[int | None, Option("Of Adam. Default 1000.")] = None
    examples: Annotated[int | None, Option("Unlabelled examples of each task. Default all of the split.")] = None
    split: Annotated[str | None, Option("Of which split; the authors' is test. Default validation.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as lr=0.01.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"rank": self.rank, "updates": self.updates, "examples": self.examples, "split": self.split}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def surgery(
    models: TunedModels,
    merged: Annotated[Path, typer.Option("--merged", help="Folder of the merged model; corrections go to its folder `surgery`.")],
    backbone: Backbone,
    options: Correcting,
    reading: Reading,
    json: Json,
) -> None:
    """Learn a correction of a merged model's features for each task, kept beside it and used by `thetau evaluate`.

    thetau evidence surgery runs/demo/finetuned/*/* --merged merged
    """
    from thetau.errors import DataError
    from thetau.evaluate.session import Session
    from thetau.evidence import SurgeryConfig, learn_surgery
    from thetau.evidence.surgery import surgery_file
    from thetau.finetune.progress import bar
    from thetau.models import read_weights

    json.check()
    sizes = {"max_length": reading.max_length, "image_size": reading.image_size}
    config = SurgeryConfig.of({**sizes, **options.given()}, "thetau evidence surgery")
    session = Session.open(models, base=backbone.base, reading=reading)
    if session.tangent:
        raise DataError("these models belong to the tangent space; corrections are learned for models of the model's own space.")
    weights = read_weights(merged, base=session.encoder.folder)
    found = []
    with bar("surgery", len(session.models), "tasks") as progress:
        for model in session.models:
            own = read_weights(model.path, base=session.encoder.folder)
            task = session.evaluator.tasks[model.task]
            out = surgery_file(merged, model.task)
            found.append(learn_surgery(session.encoder, task, weights, own, out, config, origin=str(merged)))
            progress.advance(1)
        progress.finish("surgery")
    json.write({"merged": str(merged), "tasks": {one.task: one.to_json() for one in found}})
    for one in found:
        tell(
            f"{one.path}: {one.examples} examples, mean difference of features {one.before:.4f} → {one.after:.4f}",
            one.notes,
            cached=one.cached,
        )
