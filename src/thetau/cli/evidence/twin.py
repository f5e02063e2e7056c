"""`thetau evidence twin`: a router that tells which task an input is of, for what lies beside a merged model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, final

import typer

from thetau.cli.common import Json
from thetau.cli.evidence.common import tell
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class TellingApart:
    """How the router is learned; what is not given is as `TwinConfig` has it."""

    mode: Annotated[
        Literal["soft", "top"] | None,
        Option("soft mixes the tasks' parts by their probabilities, top takes the likeliest task's alone. Default soft."),
    ] = None
    epochs: Annotated[int | None, Option("Over the tasks' examples. Default 50.", least=0)] = None
    examples: Annotated[int | None, Option("Examples of each task, without their labels. Default at most 500.", least=1)] = None
    split: Annotated[str | None, Option("Of which split. Default validation.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as lr=0.01.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"mode": self.mode, "epochs": self.epochs, "examples": self.examples, "split": self.split}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def twin(
    merged: Annotated[
        Path, typer.Option("--merged", help="Folder of a model merged with --tasks; the router goes to its folder `twin`.")
    ],
    backbone: Backbone,
    options: TellingApart,
    reading: Reading,
    json: Json,
) -> None:
    """Learn which task an input is of, so that `thetau evaluate` uses what lies beside a merged model without being told the task.

    thetau evidence twin --merged merged
    """
    from thetau.compression import parts_beside
    from thetau.errors import DataError
    from thetau.evaluate.session import Session
    from thetau.evidence import TwinConfig, learn_router
    from thetau.evidence.twin import router_file
    from thetau.facade import open_base
    from thetau.models import read_weights
    from thetau.studies.checkpoints import base_for

    json.check()
    sizes = {"max_length": reading.max_length, "image_size": reading.image_size}
    config = TwinConfig.of({**sizes, **options.given()}, "thetau evidence twin")
    base = base_for(str(merged), backbone.base)
    parts = parts_beside(merged, open_base(base)) if merged.is_dir() else {}
    if not parts:
        raise DataError(
            f"{merged}: nothing lies beside this model for single tasks. Merge with twin, emr or tall_masks and `--tasks` into a folder first."
        )
    session = Session.open(base=base, tasks=sorted(parts), reading=reading)
    weights = read_weights(merged, base=session.encoder.folder)
    found = learn_router(session.encoder, session.evaluator.tasks, weights, router_file(merged), config, origin=str(merged))
    json.write(found.to_json())
    held = "" if math.isnan(found.held) else f", {100 * found.held:.1f} % of those held back"
    tell(
        f"{found.path}: tells {len(found.tasks)} tasks apart, right for {100 * found.learned:.1f} % of the examples that it learned from{held}",
        found.notes,
        cached=found.cached,
    )
