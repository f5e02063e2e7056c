"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau._version import __version__
from thetau.cli.adapter import adapter_app
from thetau.cli.basis import basis_app
from thetau.cli.compare import compare
from thetau.cli.convert import convert
from thetau.cli.diagnose import diagnose_app
from thetau.cli.doctor import doctor
from thetau.cli.evaluate import evaluate
from thetau.cli.evidence import evidence_app
from thetau.cli.export import export_app
from thetau.cli.finetune import finetune
from thetau.cli.inspect import inspect
from thetau.cli.merge import merge
from thetau.cli.methods import methods
from thetau.cli.report import report
from thetau.cli.search import search
from thetau.cli.suite import suite_app
from thetau.cli.sweep import sweep
from thetau.cli.tune import tune
from thetau.cli.vector import vector_app
from thetau.cli.verify import verify

app = typer.Typer(
    name="thetau",
    help="Task arithmetic on real checkpoints: create, refine, merge, negate and diagnose task vectors.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"thetau {__version__}")
        raise typer.Exit


FIRST = """thetau merges models that were fine-tuned from one base. What to do first:

  thetau doctor BASE MODEL MODEL       are they of that base, will they get on?
  thetau merge -b BASE -m MODEL -m MODEL --method ties -o merged
  thetau report merged -o merged.html  look at it, and hand it on

Models are folders, files or names on the hub; LoRA adapters too.
Nothing is written over.

  thetau methods                       what to merge with, by need and cost
  thetau merge recipe.yaml -o merged   a recipe, mergekit's too; or --dry-run
  thetau suite run demo -o runs/demo   all of it, on small models
  thetau --help                        every command, each with an example"""


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Task arithmetic on real checkpoints."""
    if context.invoked_subcommand is None:
        typer.echo(FIRST)


app.command()(merge)
app.command()(convert)
app.command()(verify)
app.command()(inspect)
app.command()(doctor)
app.command()(compare)
app.command()(report)
app.command()(methods)
app.add_typer(vector_app, name="vector")
app.add_typer(adapter_app, name="adapter")
app.add_typer(export_app, name="export")
app.command()(finetune)
app.command()(evaluate)
app.command()(tune)
app.command()(sweep)
app.command()(search)
app.add_typer(evidence_app, name="evidence")
app.add_typer(basis_app, name="basis")
app.add_typer(suite_app, name="suite")
app.add_typer(diagnose_app, name="diagnose")
