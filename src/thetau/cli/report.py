"""`thetau report`: a page to read and to hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.common import Machine
from thetau.cli.options import with_options


@with_options
def report(
    what: Annotated[
        Path,
        typer.Argument(
            help="An output of `thetau merge`, a run of `thetau suite run`, a bank, or JSON of `thetau doctor`, `compare` or `diagnose`.",
            metavar="RUN|MERGED|BANK|JSON",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page: a file, NAME.html.")] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", help="Of a merged model: what `thetau evaluate --json` or lm-evaluation-harness wrote. Repeat."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read no weights: no checks, nothing of the layers.")] = False,
    *,
    machine: Machine,
) -> None:
    """Write one HTML file: recipe, lineage, licences, layers and checks of a merge; values, costs and differences of a run; a bank; a diagnosis.

    thetau report merged -o merged.html

    The file needs no server and no network. It opens in any browser, on a phone too, and can be printed.
    """
    from thetau.checkpoint.disk import check_file
    from thetau.report import check, page_of, write
    from thetau.report.text import gigabytes

    check()
    check_file(out)
    page = page_of(what, evaluations=tuple(evaluation or ()), weights=not quick, engine=machine.engine())
    size = write(page, out)
    if not machine.quiet:
        typer.echo(f"{out}: {page.about}, {len(page.sections)} sections, {gigabytes(size)}")
