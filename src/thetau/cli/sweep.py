"""`thetau sweep`: a method over its fields, λ and sets of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import Json, TunedModels
from thetau.cli.options import with_options
from thetau.cli.tables import percent, show, table
from thetau.evaluate.options import Backbone, Limits, Reading
from thetau.studies.options import Sweep

if TYPE_CHECKING:
    from rich.table import Table

    from thetau.studies.arithmetic import OutOfDistribution
    from thetau.studies.sweeps import Alone, Subsets, SweepRow


@with_options
def sweep(
    models: TunedModels,
    backbone: Backbone,
    options: Sweep,
    reading: Reading,
    limits: Limits,
    json: Json,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curves over λ, and the subsets, into this file.")] = None,
) -> None:
    """Measure a method over any of its fields × λ, on subsets of the tasks, without each of them, and each task alone.

    thetau sweep runs/demo/finetuned/*/* --method ties --over 'density=[0.1, 0.2, 0.5]' --alphas 0.5,1,1.5 --json ties.json --plot ties.png
    """
    from thetau.evaluate.session import Session
    from thetau.studies import sweeps

    json.check()
    session = Session.open(models, base=backbone.base, limits=limits.by_split(), reading=reading)
    found = sweeps.sweep(session, options, say=lambda line: typer.echo(line, err=True))
    json.save(found)
    if plot is not None:
        from thetau.plots.sweep import sweep_chart

        sweep_chart(found, plot)
    show(_rows(found.rows))
    if found.subsets:
        show(_subsets(found.subsets))
    if found.left_out:
        show(_left_out(found.left_out))
    if found.alone:
        show(_alone(found.alone))


def _rows(rows: Sequence[SweepRow]) -> Table:
    made = table(
        "on test, in percent, at the λ of best validation; !: λ at the end of what was tried",
        *("setting", "λ", "average", "normalised", "loss", *rows[0].best.accuracy),
    )
    for row in rows:
        best = row.best
        setting = ", ".join(f"{name}={value}" for name, value in row.fields.items()) or row.method.partition("(")[0]
        values = [percent(one.value) for one in best.accuracy.values()]
        loss = sum(one.value for one in best.loss.values()) / len(best.loss)
        made.add_row(
            setting, f"{row.chosen:g}{'!' * row.at_end}", percent(best.absolute), percent(best.normalised), f"{loss:.3f}", *values
        )
    return made


def _subsets(found: Sequence[Subsets]) -> Table:
    made = table("subsets of the tasks: mean normalised value, in percent", "tasks", "subsets", "mean", "95 % interval")
    for one in found:
        interval = f"{percent(one.low)} – {percent(one.high)}" if len(one.values) > 1 else "–"
        made.add_row(str(one.size), f"{len(one.values)}{' (all)' * one.every}", percent(one.mean), interval)
    return made


def _left_out(found: Sequence[OutOfDistribution]) -> Table:
    made = table(
        "the merge of the others, on the task left out, on test, in percent", "task left out", "λ", "pre-trained", "merged"
    )
    for one in found:
        made.add_row(one.task, f"{one.alpha:g}{'!' * one.at_end}", percent(one.base.value), percent(one.merged.value))
    return made


def _alone(found: Sequence[Alone]) -> Table:
    made = table("each task's vector alone, on test, in percent", "task", "λ = 1", "best λ", "there")
    for one in found:
        made.add_row(one.task, percent(one.one.value), f"{one.scale:g}{'!' * one.at_end}", percent(one.best.value))
    return made
