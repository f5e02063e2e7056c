"""`thetau methods`: what can be merged with, and with which fields."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(name: Annotated[str | None, typer.Argument(help="Show this method's fields, defaults and paper.")] = None) -> None:
    """List the methods, or show one.

    thetau methods wudi
    """
    from inspect import getmodule

    from rich.console import Console
    from rich.table import Table

    from thetau.methods import registry

    console = Console(soft_wrap=False)
    if name is None:
        table = Table("method", "what it does", "paper", box=None, pad_edge=False)
        for known in registry.names():
            module = getmodule(registry.get(known))
            first = (module.__doc__ or "").strip().splitlines()[0] if module else ""
            table.add_row(known, first, registry.paper(known))
        console.print(table)
        return
    cls = registry.get(name)
    module = getmodule(cls)
    console.print((module.__doc__ or "").strip() if module else "", markup=False, highlight=False)
    table = Table("field", "default", "meaning", box=None, pad_edge=False, title="", title_justify="left")
    for field in registry.describe(name):
        table.add_row(field.name, str(field.default), field.meaning)
    console.print(table)
    console.print(f"paper: {registry.paper(name)}", markup=False, highlight=False)
