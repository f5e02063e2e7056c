"""`thetau basis negate`: forget a task by the basis that stands for it."""

from __future__ import annotations

from pathlib import Path

import typer

from thetau.cli.basis.common import BankFolder, Known, Moved, Output
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import Limits, Reading
from thetau.studies.options import NegateBasis


@with_options
def negate(
    bank: BankFolder,
    options: NegateBasis,
    known: Known,
    output: Output,
    moved: Moved,
    reading: Reading,
    limits: Limits,
    json: Json,
    machine: Machine,
) -> None:
    """Subtract the basis of a task: its own cluster's, the most similar one (--vector, --steps, --epochs), or --basis by hand.

    thetau basis negate bank --task sms_spam --control qnli --data tasks
    """
    from thetau.cli.basis.tables import negated_table
    from thetau.cli.tables import show
    from thetau.evaluate.session import Session
    from thetau.studies.banks import basis_to_negate, negate_basis

    output.check(json)
    engine = machine.engine()
    finding = options.finding
    if known.scale is None and options.control is None:
        raise RecipeError(["--control TASK is missing, the task that negation must keep; or give --scale."], "options")
    if known.scale is not None and (options.control is not None or finding.steps is not None or finding.epochs is not None):
        raise RecipeError(["--scale takes no data, so leave --control, --steps and --epochs out."], "options")
    opened = moved.open(bank)
    opened.base()
    scale = known.check(output, json, options.alphas)
    if scale is not None:
        output.write(opened, {basis_to_negate(opened, options.task, finding): -scale}, None, engine=engine, machine=machine)
        return
    session = Session.of_bank(
        opened,
        [options.task, options.control or ""],
        base=moved.base,
        models={} if finding.vector is None else {options.task: Path(finding.vector)},
        limits=limits.by_split(),
        reading=reading,
        say=lambda line: typer.echo(line, err=True),
    )
    found = negate_basis(opened, session, options, engine=machine.engine(bar=False))
    json.save(found)
    show(negated_table(found.result, options.keep))
    output.write(opened, found.coefficients, None, engine=engine, machine=machine)
