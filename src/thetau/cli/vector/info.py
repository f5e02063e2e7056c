"""`thetau vector info`: what a saved task vector holds."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError


@with_options
def info(vector: Annotated[str, typer.Argument(help="A saved task vector.")], *, json: Json, machine: Machine) -> None:
    """Tensors, parameters, norm, form and provenance of a saved task vector.

    thetau vector info sst2-vector.safetensors
    """
    from thetau.checkpoint.compressed import CompressedSource
    from thetau.facade import open as open_weights

    json.check()
    opened = open_weights(vector)
    if not opened.is_vector:
        raise RecipeError(
            [f"{vector} is a model. Make its task vector first: `thetau vector extract --base BASE --model {vector} -o OUT`."],
            "vector",
        )
    specs = opened.specs()
    metadata = opened.terms[0][1].metadata
    typer.echo(f"{vector}: task vector of {len(specs)} tensors, {sum(s.elements for s in specs.values()):,} parameters")
    norm = opened.norm(engine=machine.engine())
    typer.echo(f"norm {norm:.6g}")
    told = {
        "tensors": len(specs),
        "parameters": sum(spec.elements for spec in specs.values()),
        "norm": norm,
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "form": "dense",
        "stored": {},
        "metadata": dict(metadata),
    }
    if isinstance(source := opened.terms[0][1], CompressedSource):
        held = sum(spec.nbytes for spec in source.stored.specs.values())
        dense = sum(spec.nbytes for spec in specs.values())
        stored = {kind: len(names) for kind, names in source.by_kind().items()}
        told |= {"form": source.form, "bytes": held, "dense_bytes": dense, "stored": stored}
        share = f" ({100 * held / dense:.1f} %)" if dense else ""
        typer.echo(
            f"form {source.form.replace('_', ' ')}, format {metadata['thetau.format']}: {held:,} of {dense:,} bytes{share}"
        )
        for kind, names in source.by_kind().items():
            typer.echo(f"stored {kind.replace('_', ' ')}: {len(names)} tensors")
    for key in ("thetau.version", "thetau.base", "thetau.density", "thetau.compression", "thetau.recipe"):
        if key in metadata:
            typer.echo(f"{key.removeprefix('thetau.')}: {metadata[key]}")
    json.write(told)
