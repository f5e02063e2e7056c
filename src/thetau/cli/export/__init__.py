"""`thetau export`: a model handed on, as a file that llama.cpp runs or with the card that says what it is."""

from __future__ import annotations

import typer

from thetau.cli.export.gguf import gguf

export_app = typer.Typer(help="Hand a model on: a GGUF file for llama.cpp.", no_args_is_help=True)
for verb in (gguf,):
    export_app.command()(verb)
