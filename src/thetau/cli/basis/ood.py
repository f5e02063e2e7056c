"""`thetau basis ood`: a task that the bank does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.basis.common import BankFolder, Moved, Output
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import Limits, Reading
from thetau.studies.options import ServeTask


@with_options
def ood(
    bank: BankFolder,
    options: ServeTask,
    output: Output,
    moved: Moved,
    reading: Reading,
    limits: Limits,
    json: Json,
    machine: Machine,
    store: Annotated[
        bool,
        typer.Option("--store", help="Where no basis is similar, insert the vector of --vector as a new one; needs --threshold."),
    ] = False,
) -> None:
    """Serve a task that the bank does not know by the bases that are similar to it; where none is, say so, or store its vector.

    thetau basis ood bank --task rte --steps 1 --threshold 0.05 --data tasks
    """
    from thetau.bases import insert
    from thetau.cli.basis.tables import served_table
    from thetau.cli.tables import show
    from thetau.evaluate.session import Session
    from thetau.studies.banks import own_vector, refuse_known, serve_task
    from thetau.tasks import load_task

    vector = options.finding.vector
    output.check(json)
    engine = machine.engine()
    if store and (vector is None or options.threshold is None):
        raise RecipeError(
            [
                "--store keeps a converged vector where no basis is similar enough: give --vector and --threshold. "
                "A vector of few steps says what a task is like, but is not worth keeping."
            ],
            "options",
        )
    opened = moved.open(bank)
    opened.base()
    task = load_task(options.task, reading.data).name
    refuse_known(opened, task)
    session = Session.of_bank(
        opened,
        [options.task],
        base=moved.base,
        models={} if vector is None else {options.task: Path(vector)},
        limits=limits.by_split(),
        reading=reading,
        say=lambda line: typer.echo(line, err=True),
    )
    found = serve_task(opened, session, options, engine=machine.engine(bar=False))
    json.save(found)
    show(served_table(found.result, options.outer.outer))
    if found.result.store and store and vector is not None:
        done = insert(opened, own_vector(opened, vector, task), task, to="new", engine=engine)
        typer.echo(f"{bank}: the vector of {task} is stored as the basis {done.basis_of(task)}")
    elif found.result.store:
        typer.echo(
            f"no basis has a cosine of at least {options.threshold:g}: {task} is like nothing in the bank. Store its vector as a new "
            f"basis: thetau basis insert {bank} {task}={vector or 'MODEL'} --to new, or --store here."
        )
    output.write(opened, found.coefficients, options.outer, engine=engine, machine=machine)
