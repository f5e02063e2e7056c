"""`thetau methods`: what can be merged with, what it needs, and with which fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.fields import Field

COSTS = """In each part what costs least comes first: passes over the inputs, and what is in memory of a tensor.
  rows     any block of rows: a few hundred megabytes for any model
  stream   one matrix, a task after the other
  whole    one matrix of all tasks
thetau methods NAME shows fields and paper; --for filters; docs/catalogue.md has all of them on the same models."""
_READS = {"block": "rows", "stream": "stream", "whole": "whole"}
PURPOSES = "lora, no-base, data, data-free, many, by-task, around, block, one-pass"


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's fields, ranges, defaults and paper.")] = None,
    purposes: Annotated[
        list[str] | None, typer.Option("--for", help=f"Only methods that fit, and all of them if repeated: {PURPOSES}.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the methods, those of installed packages too, or show one.

    The list is by what methods need, and by cost in each part.

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
        console.print(_listed(rows))
        console.print(COSTS, markup=False, highlight=False)
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


def _part(row: Mapping[str, Any]) -> int:
    """The part of the list that a method belongs to, by what it needs."""
    if row["problem"] or row["passes"] is None:
        return 5
    if row["evidence"]:
        return 3
    if not row["base"]:
        return 2
    return 4 if row["around"] else 0 if row["models"][1] is None else 1


_PARTS = (
    "over a base, any number of models, nothing else",
    "over a base, a fixed number of models",
    "models as they are, without a base",
    "with what is known of each task's data (thetau evidence)",
    "around another method (`then`)",
    "with fields that have no default, or of a package that cannot be had",
)


def _listed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The list by need, and by cost in each part."""
    from rich.table import Table
    from rich.text import Text

    order = list(_READS)
    table = Table("method", "what it does", "passes", "reads", "needs", box=None, pad_edge=False)
    for part, title in enumerate(_PARTS):
        members = [row for row in rows if _part(row) == part]
        members.sort(
            key=lambda row: (order.index(row["reads"]) if row["reads"] in order else len(order), row["passes"] or 0, row["name"])
        )
        if members:
            if table.row_count:
                table.add_row()
            table.add_row("", Text(f"{title}:", style="bold"))
        for row in members:
            told = row["summary"] + (f" ({row['package']})" if row["package"] else "")
            cells = (
                ("", "", "")
                if row["passes"] is None
                else (str(row["passes"]), _READS.get(row["reads"], row["reads"]), row["needs"])
            )
            table.add_row(row["name"], Text(row["problem"] or told), *cells)
    return table


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
        "around": False,
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
            "around": its.around,
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
