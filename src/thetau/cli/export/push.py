"""`thetau export push`: a model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    model: Annotated[Path, typer.Argument(help="A model's folder, with its card.")],
    repository: Annotated[str, typer.Argument(help="A repository of the hub: org/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="The message of the commit.")] = "Upload a merged model",
) -> None:
    """Check a merged model and upload its folder to the hub as one commit.

    thetau export push merged org/merged --private
    """
    from thetau.export import push as upload
    from thetau.facade import verify

    if (model / "thetau.json").is_file():
        found = verify(model)
        for problem in found.problems:
            typer.echo(problem, err=True)
        if not found.good:
            typer.echo(f"{model}: is no longer what was written, so it is not uploaded", err=True)
            raise typer.Exit(1)
    typer.echo(upload(model, repository, private=private, message=message))
