"""`thetau verify`: is this output still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options


@with_options
def verify(
    out: Annotated[Path, typer.Argument(help="An output of `thetau merge`.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="The recipe that it must have been made with.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Make the merge again and compare every bit; the inputs must be there.")
    ] = False,
    *,
    json: Json,
    machine: Machine,
) -> None:
    """Check an output: every tensor there, with its shape, dtype and checksum, and finite.

    thetau verify merged --again

    exits with 1 and says what is wrong, tensor by tensor, if something is.
    """
    from dataclasses import asdict

    from thetau.engine.work import gigabytes
    from thetau.facade import verify as check
    from thetau.recipes import load

    json.check()
    wanted = load(recipe) if recipe is not None else None
    found = check(out, recipe=wanted, again=again, engine=machine.engine())
    json.write({**asdict(found), "path": str(found.path), "good": found.good})
    for problem in found.problems:
        typer.echo(problem, err=True)
    if not found.good:
        typer.echo(f"{out}: {len(found.problems)} problems in {found.tensors} tensors", err=True)
        raise typer.Exit(1)
    if not machine.quiet:
        against = ", ".join(found.against) or "itself alone (a single file keeps no record)"
        typer.echo(f"{out}: {found.tensors} tensors, {gigabytes(found.nbytes)}, good against {against}")
