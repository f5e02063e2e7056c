"""`thetau export card`: the card of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    model: Annotated[Path, typer.Argument(help="An output of `thetau merge`.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--evaluation", help="What `thetau evaluate --json` or lm-evaluation-harness wrote. Repeat."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's title; that of its folder otherwise.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="The hub's word for the licence, where the parents' is not to stand.")
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print it; nothing is written.")] = False,
) -> None:
    """Write README.md into a merged model: recipe, parents, licences, evaluations, checksums.

    thetau export card merged --evaluation merged.json
    """
    from thetau.export import card_of, write_card

    made = card_of(model, evaluations=tuple(evaluation or ()), name=name, licence=licence)
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if show:
        typer.echo(made.text, nl=False)
    else:
        typer.echo(str(write_card(model, made)))
