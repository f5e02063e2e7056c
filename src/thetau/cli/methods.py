"""`thetau methods`: what can be merged with, what it needs, and with which fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from thetau.fields import Field

PURPOSES = "lora, no-base, data, data-free, many, by-task, around, block, one-pass"


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's fields, ranges, defaults and paper.")] = None,
    purposes: Annotated[
        list[str] | None, typer.Option("--for", help=f"Only methods that fit, and all of them if repeated: {PURPOSES}.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the methods, those of installed packages too, or show one.

    `reads` says what is in memory of a tensor: any block of rows, a stream of one task after the other, or the whole of all tasks.

    thetau methods --for lora --for data-free
    """
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from thetau.errors import RecipeError
    from thetau.methods import registry
    from thetau.methods.traits import suited, traits

    console = Console(soft_wrap=False)
    if name is not None and purposes:
        raise RecipeError([f"`--for` filters the list, and {name!r} is one method. Leave one of them out."], "--for")
    if name is None:
        rows = [_row(known) for known in registry.names()]
        if purposes:
            kept = suited(purposes, [row["name"] for row in rows if not row["problem"]])
            rows = [row for row in rows if row["name"] in kept]
        if json:
            typer.echo(dumps(rows, indent=2, ensure_ascii=False))
            return
        table = Table("method", "what it does", "passes", "reads", "needs", box=None, pad_edge=False)
        for row in rows:
            told = row["summary"] + (f" ({row['package']})" if row["package"] else "")
            cells = ("", "", "") if row["passes"] is None else (str(row["passes"]), row["reads"], row["needs"])
            table.add_row(row["name"], row["problem"] or told, *cells)
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
    its = traits(name)
    if its is not None:
        needs = f"base: {'yes' if its.needs_base else 'no'}; models: {its.models}; data: {', '.join(its.evidence) or 'none'}"
        told = f"{needs}; passes over the inputs: {its.passes}; reads: {its.access}"
        console.print(told, markup=False, highlight=False)
    console.print(f"paper: {registry.paper(name)}", markup=False, highlight=False)


def _text(name: str) -> str:
    """What the method's file says first; its own docstring where the file says nothing."""
    from inspect import getdoc, getmodule

    from thetau.methods import registry
    from thetau.methods.traits import use

    cls = registry.get(name)
    module = getmodule(cls)
    text = ((module.__doc__ if module else None) or getdoc(cls) or "").strip()
    when = use(name)  # a class's own, where a file has several methods
    return text if when is None or when in text else f"{text}\n\n{when}"


def _row(name: str) -> dict[str, Any]:
    """A method in one line; `problem` says why there is no more, where its package cannot be had."""
    from thetau.errors import RecipeError
    from thetau.methods import registry
    from thetau.methods.traits import traits

    unknown: dict[str, Any] = {
        "passes": None,
        "reads": None,
        "needs": None,
        "models": None,
        "base": None,
        "evidence": [],
        "suits": [],
    }
    try:
        cls = registry.get(name)
    except RecipeError as error:
        return {"name": name, "summary": "", **unknown, "paper": "", "package": None, "problem": " ".join(error.problems)}
    its = traits(name)
    known = (
        {
            "passes": its.passes,
            "reads": its.access,
            "needs": its.needs,
            "models": list(its.takes),
            "base": its.needs_base,
            "evidence": list(its.evidence),
            "suits": list(its.suits),
        }
        if its is not None
        else unknown
    )
    summary = (_text(name).splitlines() or [""])[0]
    return {
        "name": name,
        "summary": summary,
        **known,
        "paper": registry.paper(name),
        "package": registry.package_of(cls),
        "problem": None,
    }


def _field(field: Field) -> dict[str, Any]:
    from thetau.methods import registry

    return {
        "name": field.name,
        "range": field.range,
        "default": registry.plain_value(field.default),
        "required": field.required,
        "meaning": field.meaning,
    }
