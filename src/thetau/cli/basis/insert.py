"""`thetau basis insert`: a new task vector under the bank's budget."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.basis.common import AllowFar, BankFolder, Changing, Evidence, Moved
from thetau.cli.basis.report import report, write_state
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options


@with_options
def insert(
    bank: BankFolder,
    vector: Annotated[str, typer.Argument(help="A fine-tuned model, adapter or saved task vector; NAME=PATH names its task.")],
    to: Annotated[str | None, typer.Option("--to", help="The basis that it joins, or new for one of its own.")] = None,
    *,
    moved: Moved,
    allow_far: AllowFar = False,
    evidence: Evidence,
    change: Changing,
    json: Json,
    machine: Machine,
) -> None:
    """Add a task vector under the bank's budget: it joins a basis, opens one, or two others make room.

    thetau basis insert bank agnews
    """
    from thetau.bases import insert as put
    from thetau.evaluate.tuned import task_vectors

    json.check()
    opened = moved.open(bank)
    names, vectors = task_vectors([vector], opened.base())
    done = put(
        opened,
        vectors[0],
        names[0],
        to=to,
        evidence=evidence.by_kind(),
        allow_far=allow_far,
        drift=change.drift,
        wait=change.wait,
        engine=machine.engine(),
    )
    report(done, quiet=machine.quiet)
    if json.json is not None:
        write_state(done, json.json)
