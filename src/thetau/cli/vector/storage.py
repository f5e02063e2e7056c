"""`thetau vector storage`: what a library of task vectors takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from thetau.cli.common import BaseOption, Json, LeftOut, Machine, check_folder
from thetau.cli.options import with_options
from thetau.cli.vector.common import Masks, Values, operands, size
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Stored:
    """How each vector is stored."""

    density: Annotated[float, Option("Share of the entries that each mask keeps; 1 for localised vectors.")] = 0.05
    dtype: Values = "float32"


@with_options
def storage(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models, adapters or task vectors.")],
    base: BaseOption,
    folder: Annotated[Path | None, typer.Option(help="A new folder for the files of every way, whose real size is told.")] = None,
    *,
    options: Stored,
    masks: Masks,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """What a bank of task vectors takes: dense, Localize-and-Stitch, and with --cluster Mask Sharing and Stitch Twice.

    thetau vector storage sst2 cr qnli --base base --cluster 0 --cluster 0 --cluster 1
    """
    from rich.console import Console
    from rich.table import Table

    from thetau.compression import storage as count

    json.check()
    _, vectors = operands(base, models)
    if folder is not None:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    result = count(
        vectors,
        density=options.density,
        clusters=masks.cluster or None,
        rounding=masks.rounding,
        dtype=options.dtype,
        exclude=left_out.exclude,
        engine=machine.engine(),
        folder=folder,
    )
    json.write(result.to_json())
    table = Table("", "models", "density", "models × density × size", "with masks", "files", box=None, pad_edge=False)
    for row in result.rows:
        files = size(row.on_disk) if row.on_disk is not None else "–"
        table.add_row(row.name, str(row.masks), f"{100 * row.density:.2f} %", size(row.values), size(row.nbytes), files)
    Console(soft_wrap=True, highlight=False).print(table)
