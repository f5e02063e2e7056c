"""`thetau adapter`: LoRA adapters, taken out of models, added and merged into one adapter again."""

from __future__ import annotations

import typer

from thetau.cli.adapter.add import add
from thetau.cli.adapter.convert import convert
from thetau.cli.adapter.extract import extract
from thetau.cli.adapter.merge import merge

adapter_app = typer.Typer(
    help="LoRA adapters as they are: extract one from a model, add, merge into one again, convert.", no_args_is_help=True
)
for verb in (extract, add, merge, convert):
    adapter_app.command()(verb)
