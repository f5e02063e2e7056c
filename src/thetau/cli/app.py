"""The verbs, put together."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from thetau._version import __version__

VERBS = (
    *("merge", "convert", "verify", "inspect", "doctor", "compare", "report", "methods"),
    *("finetune", "evaluate", "tune", "sweep", "search"),
)
GROUPS = ("vector", "adapter", "export", "evidence", "basis", "suite", "diagnose")


class Verbs(TyperGroup):
    """The verbs and their groups, each of which is imported when it is called, or when all are listed: together they take long."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        names: dict[str, Any] = dict.fromkeys((*VERBS, *GROUPS))
        self.commands = names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A verb by its name; None where there is none."""
        if cmd_name in self.commands and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _verb(cmd_name)
        return self.commands.get(cmd_name)


def _verb(name: str) -> Any:
    alone = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    held = vars(import_module(f"thetau.cli.{name}"))
    if name in GROUPS:
        alone.add_typer(held[f"{name}_app"], name=name)
    else:
        alone.command()(held[name])
    return get_group(alone).commands[name]


app = typer.Typer(
    name="thetau",
    cls=Verbs,
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
