"""`thetau convert`: a recipe of mergekit's as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.errors import OutputError, RecipeError


def convert(
    recipe: Annotated[Path, typer.Argument(help="A recipe in mergekit's format.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where ours goes; printed otherwise.")] = None,
) -> None:
    """Turn a recipe of mergekit's into one of ours, which gives the same model. Only headers and configs are read.

    thetau convert ties.yml -o ours.yaml
    """
    import yaml

    from thetau.checkpoint.disk import write_bytes
    from thetau.facade import from_recipe
    from thetau.recipes import MergekitRecipe, from_mapping, load
    from thetau.recipes.mergekit.convert import convert as converted

    loaded = load(recipe)
    if not isinstance(loaded, MergekitRecipe):
        raise RecipeError(["is one of ours already."], str(recipe))
    content = converted(loaded)
    from_recipe(from_mapping(content, f"{recipe}, converted"))  # told here, not by the first run
    text = f"# Converted from {recipe.name}; gives the same model.\n" + yaml.safe_dump(
        content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise OutputError(f"{out}: exists. Give a new name, or remove it first.")
    write_bytes(out, text.encode())
