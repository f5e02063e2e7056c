"""`thetau methods`: what can be merged with, and with which fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from thetau.fields import Field


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's fields, ranges, defaults and paper.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the methods, those of installed packages too, or show one.

    thetau methods wudi
    """
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from thetau.methods import registry

    console = Console(soft_wrap=False)
    if name is None:
        rows = [_row(known) for known in registry.names()]
        if json:
            typer.echo(dumps(rows, indent=2, ensure_ascii=False))
            return
        table = Table("method", "what it does", "paper", box=None, pad_edge=False)
        for row in rows:
            told = row["summary"] + (f" ({row['package']})" if row["package"] else "")
            table.add_row(row["name"], row["problem"] or told, row["paper"])
        console.print(table)
        return
    fields = registry.describe(name)
    if json:
        typer.echo(dumps({**_row(name), "fields": [_field(field) for field in fields]}, indent=2, ensure_ascii=False))
        return
    console.print(_text(name), markup=False, highlight=False)
    table = Table("field", "range", "default", "meaning", box=None, pad_edge=False, title="", title_justify="left")
    for field in fields:
        table.add_row(field.name, field.range, "—" if field.required else str(field.default), field.meaning)
    console.print(table)
    console.print(f"paper: {registry.paper(name)}", markup=False, highlight=False)


def _text(name: str) -> str:
    """What the method's file says first; its own docstring where the file says nothing."""
    from inspect import getdoc, getmodule

    from thetau.methods import registry

    cls = registry.get(name)
    module = getmodule(cls)
    return ((module.__doc__ if module else None) or getdoc(cls) or "").strip()


def _row(name: str) -> dict[str, Any]:
    """A method in one line; `problem` says why there is no more, where its package cannot be had."""
    from thetau.errors import RecipeError
    from thetau.methods import registry

    try:
        cls = registry.get(name)
    except RecipeError as error:
        return {"name": name, "summary": "", "paper": "", "package": None, "problem": " ".join(error.problems)}
    summary = (_text(name).splitlines() or [""])[0]
    return {"name": name, "summary": summary, "paper": registry.paper(name), "package": registry.package_of(cls), "problem": None}


def _field(field: Field) -> dict[str, Any]:
    from thetau.methods import registry

    return {
        "name": field.name,
        "range": field.range,
        "default": registry.plain_value(field.default),
        "required": field.required,
        "meaning": field.meaning,
    }
