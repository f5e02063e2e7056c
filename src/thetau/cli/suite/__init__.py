"""`thetau suite`: run a backbone's tasks end to end."""

from __future__ import annotations

import typer

from thetau.cli.suite.list import list_suites
from thetau.cli.suite.run import run

suite_app = typer.Typer(help="Fine-tune, merge and evaluate a whole suite of tasks.", no_args_is_help=True)
suite_app.command("list")(list_suites)
suite_app.command("run")(run)
