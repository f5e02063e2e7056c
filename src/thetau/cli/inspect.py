"""`thetau inspect`: look before merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json, LeftOut, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.diagnostics import Inspection
    from thetau.diagnostics.roles import RoleTable


@with_options
def inspect(
    base: Annotated[str, typer.Argument(help="The base: folder, file or hub id.")],
    models: Annotated[list[str] | None, typer.Argument(help="Fine-tuned models, LoRA adapters or saved task vectors.")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option("--candidate", "-c", help="Another model that may be the true base; may be repeated. BASE is one of them."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor: shape, dtype, kind, norms.")] = False,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles", help="Instead, what each tensor of BASE is taken for, and how that is known. Reads headers only."
        ),
    ] = False,
    *,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Tensors, dtypes, norms, cosine matrix, what does not align, and whether BASE looks like the models' base.

    thetau inspect base sst2 mnli

    With --candidate it says which of several bases each model was fine-tuned from:

    thetau inspect base sst2 mnli --candidate other-base

    With --roles it says which tensors are attention, MLP, embeddings, norms, in which block, and what of it is a guess:

    thetau inspect base --roles
    """
    from thetau.diagnostics import inspect as look
    from thetau.facade import open as open_weights
    from thetau.facade import open_base

    json.check()
    opened = open_base(base)
    if roles:
        from thetau.diagnostics.roles import roles as take

        if models or candidate:
            raise RecipeError(["--roles looks at BASE alone. Leave out the models and candidates."], "options")
        told = take(opened.terms[0][1])
        json.write(told.to_json())
        show_roles(told)
        return
    result = look(
        opened,
        [open_weights(model, base=opened) for model in models or []],
        candidates=[open_base(other) for other in candidate or []],
        exclude=left_out.exclude,
        engine=machine.engine(),
    )
    json.write(result.to_json())
    show(result, tensors=tensors)


def show_roles(table: RoleTable) -> None:
    """Print what each tensor is taken for."""
    from rich.console import Console
    from rich.table import Table

    from thetau.diagnostics.roles import ranges

    width = 80 + max(len(row.pattern) for row in table.rows)  # names are not to be cut
    console = Console(soft_wrap=True, highlight=False, markup=False, width=width)
    shown = Table("tensor", "tensors", "kind", "layer", "from", box=None, pad_edge=False)
    for row in table.rows:
        shown.add_row(row.pattern, str(row.tensors), row.kind, ranges(row.layers), row.told)
    console.print(shown)
    for sentence in table.verdict():
        console.print(sentence)


def show(result: Inspection, *, tensors: bool = False) -> None:
    """Print an inspection; every tensor too where asked."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("", "tensors", "parameters", "dtypes", "norm", "‖τ‖/‖θ₀‖", "", box=None, pad_edge=False)
    for model in (result.base, *result.models):
        dtypes = ", ".join(f"{count} {name}" for name, count in model.dtypes.items())
        verdict = {True: "fits the base", False: "NOT its base?", None: "does not align" if model.problems else "base"}[
            model.fits_base
        ]
        norm = f"{model.norm:.4g}" if model.norm is not None else "–"
        shift = f"{model.shift:.4f}" if model.shift is not None else "–"
        table.add_row(model.name, str(model.tensors), f"{model.parameters:,}", dtypes, norm, shift, verdict)
    console.print(table)
    console.print()
    kinds = Table("kind", "tensors", "parameters", "‖θ₀‖", *result.compared, box=None, pad_edge=False)
    for part in result.parts:
        kinds.add_row(
            part.kind,
            str(part.tensors),
            f"{part.parameters:,}",
            f"{part.norm:.4g}",
            *(f"{part.shift[name]:.4f}" for name in result.compared),
        )
    console.print(kinds)
    if tensors:
        console.print()
        every = Table("tensor", "shape", "dtype", "kind", "‖θ₀‖", *result.compared, box=None, pad_edge=False)
        for row in result.tensors:
            norm = f"{row.norm:.4g}" if row.norm is not None else "–"
            shifts = (f"{row.shift[name]:.4f}" if name in row.shift else "–" for name in result.compared)
            every.add_row(row.name, str(list(row.shape)), row.dtype, row.kind, norm, *shifts)
        console.print(every)
    if len(result.compared) > 1:
        console.print("\ncosine of the task vectors")
        cosine = Table("", *result.compared, box=None, pad_edge=False)
        for name, values in zip(result.compared, result.cosine, strict=True):
            cosine.add_row(name, *(f"{value:+.3f}" for value in values))
        console.print(cosine)
    if result.candidates is not None:
        console.print("\n‖θ − θ₀‖ by candidate, and over ‖θ₀‖")
        away = Table("", *result.candidates.compared, box=None, pad_edge=False)
        for judged in result.candidates.models:
            away.add_row(judged.model, *(f"{far:.4g} ({judged.ratio[name]:.4f})" for name, far in judged.distance.items()))
        for name, others in zip(result.candidates.compared, result.candidates.apart, strict=True):
            away.add_row(f"candidate {name}", *(f"{far:.4g}" for far in others))
        known = {one.name: one.cosine for one in result.candidates.candidates}
        mean = ["–" if known[name] is None else f"{known[name]:+.3f}" for name in result.candidates.compared]
        away.add_row("mean cosine of the vectors", *mean)
        console.print(away)
        for one in result.candidates.candidates:
            for problem in one.problems:
                console.print(f"candidate {one.name}: {problem}")
    for model in (result.base, *result.models):
        for problem in model.problems:
            console.print(f"{model.name}: {problem}")
        for note in model.notes:
            console.print(f"· {note}")
    for sentence in result.verdict():
        console.print(sentence)
