"""`thetau basis add`: the sum of a bank's bases, or a merge of them."""

from __future__ import annotations

import typer

from thetau.cli.basis.common import BankFolder, Known, Moved, Output
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options
from thetau.evaluate.options import Limits, Reading
from thetau.studies.options import AddBases


@with_options
def add(
    bank: BankFolder,
    options: AddBases,
    known: Known,
    output: Output,
    moved: Moved,
    reading: Reading,
    limits: Limits,
    json: Json,
    machine: Machine,
) -> None:
    """Add all bases: θ₀ + λ merge(bases), λ chosen on the tasks' validation, or given by --scale, for a bank of any size.

    thetau basis add bank --data tasks -o merged
    """
    from thetau.cli.basis.tables import added_table
    from thetau.cli.tables import show
    from thetau.evaluate.session import Session
    from thetau.studies.banks import add_bases

    output.check(json)
    engine = machine.engine()
    opened = moved.open(bank)
    opened.base()
    scale = known.check(output, json, options.alphas, options.task)
    if scale is not None:
        output.write(opened, dict.fromkeys(opened.bases, scale), options.outer, engine=engine, machine=machine)
        return
    session = Session.of_bank(
        opened,
        options.task,
        base=moved.base,
        models=options.model,
        limits=limits.by_split(),
        reading=reading,
        say=lambda line: typer.echo(line, err=True),
    )
    found = add_bases(opened, session, options, engine=machine.engine(bar=False))
    json.save(found)
    show(added_table(found.result, options.outer.outer))
    for name, reason in found.no_individuals.items():
        typer.echo(f"accuracy is not normalised, for want of the model of {name}: {reason}")
    output.write(opened, found.coefficients, options.outer, engine=engine, machine=machine)
