"""`thetau suite list`: the suites that come with thetau."""

from __future__ import annotations

import typer


def list_suites() -> None:
    """The suites that come with thetau.

    thetau suite list
    """
    from thetau.tasks import load_suite
    from thetau.tasks.suite import shipped_suites

    for name in shipped_suites():
        suite = load_suite(name)
        typer.echo(f"{name}: {suite.description}\n  {suite.backbone}; {len(suite.tasks)} tasks: {', '.join(suite.tasks)}")
