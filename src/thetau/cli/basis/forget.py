"""`thetau basis forget`: a task leaves the bank."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.basis.common import BankFolder, Changing, Given, Moved
from thetau.cli.basis.report import report, write_state
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options


@with_options
def forget(
    bank: BankFolder,
    task: Annotated[str, typer.Argument(help="The task whose contribution is to go.")],
    given: Given,
    drop_basis: Annotated[
        bool, typer.Option("--drop-basis", help="Where nothing else can be done, remove the whole basis, with its other tasks.")
    ] = False,
    *,
    moved: Moved,
    change: Changing,
    json: Json,
    machine: Machine,
) -> None:
    """Take a task out of the bank, and say how exact that is.

    thetau basis forget bank agnews
    """
    from thetau.bases import forget as drop

    json.check()
    opened = moved.open(bank)
    done = drop(
        opened,
        task,
        vectors=given.of(opened),
        drop_basis=drop_basis,
        drift=change.drift,
        wait=change.wait,
        engine=machine.engine(),
    )
    report(done, quiet=machine.quiet)
    if json.json is not None:
        write_state(done, json.json)
