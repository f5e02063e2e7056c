"""`thetau vector disentangle`: task vectors that are more, or less, orthogonal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from thetau.cli.common import BaseOption, Json, Machine, Out, Writing, save
from thetau.cli.options import with_options
from thetau.cli.tables import show, table
from thetau.errors import RecipeError


@with_options
def disentangle(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models, adapters or saved vectors, as PATH or NAME=PATH.")],
    base: BaseOption,
    out: Out,
    alpha: Annotated[
        str | None,
        typer.Option("--alpha", help="Weight of ‖δ‖: a number, or auto for a rule. Default 0.001, and 0.5 with --reverse."),
    ] = None,
    scope: Annotated[
        Literal["vector", "tensor", "row"], typer.Option(help="One δ for the whole vector, or one for each tensor or output row.")
    ] = "vector",
    reverse: Annotated[bool, typer.Option("--reverse", help="Make them less orthogonal (the paper's Tables 6 and 7).")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the cosines before and after into this file.")] = None,
    *,
    json: Json,
    writing: Writing,
    machine: Machine,
) -> None:
    """Write each task vector without what all share (AWD), as files of a new folder; base + NAME.safetensors is the reconstructed model.

    thetau vector disentangle runs/demo/finetuned/*/* --base all-MiniLM-L6-v2 -o disentangled --plot cosines.png
    """
    from thetau.checkpoint.disk import new_folder
    from thetau.diagnostics.separation import separation
    from thetau.evaluate.tuned import task_vectors
    from thetau.facade import open_base, transform
    from thetau.methods import Awd

    json.check()
    given = _alpha(alpha)
    opened = open_base(base)
    names, vectors = task_vectors(models, opened)
    engine, exclude = machine.engine(bar=False), writing.left_out.exclude
    found = separation(dict(zip(names, vectors, strict=True)), alpha=given, reverse=reverse, exclude=exclude, engine=engine)
    made = transform(vectors, Awd(alpha=found.alpha, scope=scope, reverse=reverse), names=names, exclude=exclude, engine=engine)
    with new_folder(out) as folder:
        for name, vector in zip(names, made, strict=True):
            save(vector, folder / f"{name}.safetensors", quiet=True, dtype=writing.dtype, exclude=exclude, engine=engine)
    json.save(found)
    if plot is not None:
        from thetau.plots.separation import separation_chart

        separation_chart(found, plot)
    if machine.quiet:
        return
    way = "reversed" if reverse else "disentangled"
    shown = table(
        f"{way} at α = {found.alpha:g}: mean |cos| {found.mean_before:.3f} → {found.mean_after:.3f} on the linear weights, one δ for all, "
        f"‖δ‖ = {found.length:.3g}. "
        "A sum of these vectors with λ is the sum of the old ones with λ · factor.",
        *("task", "c", "factor"),
    )
    for name in found.tasks:
        shown.add_row(name, f"{found.coefficients[name]:.4f}", f"{found.factors[name]:.3f}")
    show(shown)


def _alpha(text: str | None) -> float | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError as error:
        raise RecipeError([f"--alpha must be a number of at least 0, or auto. Got {text!r}."], "options") from error
    if not 0 <= value < float("inf"):
        raise RecipeError([f"--alpha must be a number of at least 0, or auto. Got {text!r}."], "options")
    return value
