"""`thetau suite run`: a backbone's tasks end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.common import Json
from thetau.cli.options import with_options
from thetau.cli.tables import show
from thetau.evaluate.options import DataFolder


@with_options
def run(
    name: Annotated[str, typer.Argument(help="Name of a suite, or its YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an interrupted run goes on in it.")],
    data: DataFolder = None,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", help="Only these, separated by commas or given again.")
    ] = None,
    paradigm: Annotated[
        list[str] | None,
        typer.Option(
            "--paradigm",
            help="Compare paradigms of fine-tuning: names of the suite's rows, all of them (all), or standard, attention, linear, …; "
            "with --methods, each paradigm's vectors are merged by these too.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="With --paradigm: seeds 0..n−1.", min=1)] = 1,
    backbone: Annotated[
        str | None, typer.Option(help="Another model than the suite's: folder, packaged model or hub id.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Make each merge in a process of its own too, for its seconds and peak memory.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small run: few steps, few examples, at most two λ.")] = False,
    *,
    json: Json,
) -> None:
    """Fine-tune every task, merge with every method, choose λ on validation, report on test. Writes results.json, .md and .png.

    thetau suite run demo --out runs/demo
    """
    from dataclasses import replace

    from thetau.cli.suite.tables import rich_table
    from thetau.plots import suite_bars
    from thetau.studies.suite import run_suite
    from thetau.tasks import load_suite

    json.check()
    suite = load_suite(name)
    suite = replace(suite, backbone=backbone) if backbone else suite
    rows, chosen = _listed(paradigm), _listed(methods)
    if rows or not suite.methods:
        from thetau.cli.suite.tables import paradigm_table
        from thetau.studies.paradigms import run_paradigms

        wanted = None if not rows or rows == ["all"] else rows
        compared = run_paradigms(
            suite, out, seeds=range(seeds), paradigms=wanted, methods=chosen, data=data, quick=quick, say=typer.echo
        )
        json.copy(out / "paradigms.json")
        show(paradigm_table(compared))
        typer.echo(f"{out}: paradigms.json")
        return
    results = run_suite(suite, out, data=data, methods=chosen or None, quick=quick, memory=memory)
    suite_bars(results, out / "results.png")
    json.copy(out / "results.json")
    show(rich_table(results))
    typer.echo(f"{out}: results.json, results.md, results.png ({results.seconds:.0f} s)")


def _listed(given: list[str] | None) -> list[str]:
    return [part.strip() for one in given or [] for part in one.split(",") if part.strip()]
