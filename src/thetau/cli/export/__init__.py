"""`thetau export`: a model handed on, as a file that llama.cpp runs, or to the hub with a card that says what it is."""

from __future__ import annotations

import typer

from thetau.cli.export.card import card
from thetau.cli.export.gguf import gguf
from thetau.cli.export.push import push

export_app = typer.Typer(
    help="Hand a model on: a GGUF file for llama.cpp, a card with parents and licences, the hub.", no_args_is_help=True
)
for verb in (gguf, card, push):
    export_app.command()(verb)
