"""`thetau compare`: two models, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json, LeftOut, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.diagnostics.comparison import Comparison

LARGEST = 10  # tensors that are printed


@with_options
def compare(
    a: Annotated[str, typer.Argument(help="A model, an adapter (with --base) or a saved task vector: folder, file or hub id.")],
    b: Annotated[str | None, typer.Argument(help="Another one. Left out with --against-recipe.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The model that both were made from: cosines are then of the changes to it."),
    ] = None,
    against_recipe: Annotated[
        Path | None, typer.Option("--against-recipe", help="Compare A with what this recipe gives, computed anew.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only those that differ most.")] = False,
    *,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Norms, distances, cosines, ranks, largest changes, tokens, configs and templates of two models.

    thetau compare merged sst2 --base base

    With --against-recipe it says whether a model is what a recipe gives, and exits with 1 where it is not:

    thetau compare merged --against-recipe recipe.yaml
    """
    from thetau.diagnostics.comparing import compare as look
    from thetau.diagnostics.comparing import compare_with
    from thetau.facade import from_recipe, open_base
    from thetau.facade import open as open_weights
    from thetau.recipes import load

    json.check()
    if (b is None) == (against_recipe is None):
        raise RecipeError(["Give two models, or one and --against-recipe RECIPE."], "options")
    engine = machine.engine()
    opened = None if base is None else open_base(base)
    mine = open_weights(a, base=opened)
    if against_recipe is not None:
        if left_out.exclude:
            raise RecipeError(["--exclude does not go with --against-recipe: the recipe says what it leaves out."], "options")
        recipe = load(against_recipe)
        if recipe.quantise:
            raise RecipeError(
                ["its output is written in fp8, of which only the bits can be compared: `thetau verify OUT --again` does."],
                str(against_recipe),
            )
        result = compare_with(
            mine,
            from_recipe(recipe, engine=engine),
            label=str(against_recipe),
            base=opened,
            engine=engine,
        )
    else:
        assert b is not None
        result = look(mine, open_weights(b, base=opened), base=opened, exclude=left_out.exclude, engine=engine)
    json.save(result)
    show(result, tensors=tensors)
    if result.recipe and not result.agrees:
        raise typer.Exit(1)


def show(result: Comparison, *, tensors: bool = False) -> None:
    """Print a comparison."""
    from rich.console import Console

    from thetau.cli.tables import show as print_table
    from thetau.cli.tables import table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    cosine = "cosine" if result.base is None else "cosine of the changes"
    for by, title in (("kind", "kind"), ("layer", "layer")):
        made = table("", title, "tensors", "‖A‖", "‖A − B‖", "relative", cosine, "entries that differ")
        for part in result.parts:
            if part.by == by:
                share = part.distance / part.norm_a if part.norm_a else None
                made.add_row(
                    part.name,
                    str(part.tensors),
                    f"{part.norm_a:.4g}",
                    f"{part.distance:.4g}",
                    number(share),
                    signed(part.cosine),
                    f"{part.changed:,} of {part.parameters:,}",
                )
        print_table(made)
    rows = list(result.tensors) if tensors else result.largest(LARGEST)
    if rows:
        caption = "" if tensors else "largest differences, relative to the tensor's length"
        made = table(caption, "tensor", "shape", "‖A‖", "‖A − B‖", "relative", cosine, "largest", "at", "effective rank of B − A")
        for row in rows:
            counted = row.directions.get("difference")
            rank = "–" if counted is None else f"{'' if counted.exact else '≤ '}{counted.effective_rank:.1f} of {counted.full}"
            made.add_row(
                row.name,
                "×".join(map(str, row.shape)) or "1",
                number(row.norm_a),
                number(row.distance),
                number(row.relative),
                signed(row.cosine),
                number(row.largest),
                ", ".join(map(str, row.at)),
                rank,
            )
        print_table(made)
    for row in result.tensors:
        if row.rows:
            moved = ", ".join(f"{one.token if one.token is not None else one.row!r} {one.distance:.3g}" for one in row.rows[:5])
            console.print(f"{row.name}: the rows that moved most: {moved}")
    for note in result.notes:
        console.print(f"· {note}")
    for sentence in result.verdict():
        console.print(sentence)


def number(value: float | None) -> str:
    """Four figures, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A cosine, or a dash."""
    return "–" if value is None else f"{value:+.3f}"
