"""`thetau basis show`: what a bank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.basis.common import BankFolder, Given, Moved
from thetau.cli.basis.report import drift_table, table_of, told, write_state
from thetau.cli.options import with_options


@with_options
def show(
    bank: BankFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, and compare with what was written.")] = False,
    drift: Annotated[
        bool,
        typer.Option("--drift", help="Measure how far the bank is from one built offline; reads every original vector again."),
    ] = False,
    *,
    moved: Moved,
    given: Given,
    json: Annotated[Path | None, typer.Option("--json", help="Write what is known of the bank here too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw clusters and eigenvalues here (PNG).")] = None,
) -> None:
    """Bases, members, similarities, budget and history of a bank.

    thetau basis show bank --verify
    """
    from rich.console import Console

    from thetau.bases import drift_of
    from thetau.errors import BankError

    opened = moved.open(bank)
    table_of(opened)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for operation in opened.state.log:
        console.print(told(operation.kind, operation))
    if drift:
        found, _ = drift_of(opened, given.of(opened))
        drift_table(found)
    if json is not None:
        write_state(opened, json)
    if plot is not None:
        from thetau.plots.bases import clusters_chart

        clusters_chart(opened, plot)
    if verify:
        problems = opened.verify()
        if problems:
            raise BankError("\n".join(problems))
        console.print(f"All {len(opened.bases)} files hold what was written.")
