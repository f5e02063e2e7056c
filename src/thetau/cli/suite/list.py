"""`thetau suite list`: the suites that come with thetau."""

from __future__ import annotations

import typer

from thetau.cli.common import Json
from thetau.cli.options import with_options


@with_options
def list_suites(json: Json) -> None:
    """The suites that come with thetau.

    thetau suite list
    """
    from thetau.tasks import load_suite
    from thetau.tasks.suite import shipped_suites

    json.check()
    suites = [load_suite(name) for name in shipped_suites()]
    json.write(
        {
            suite.name: {
                "description": suite.description,
                "backbone": suite.backbone,
                "tasks": list(suite.tasks),
                "methods": [choice.name for choice in suite.methods],
            }
            for suite in suites
        }
    )
    for suite in suites:
        typer.echo(f"{suite.name}: {suite.description}\n  {suite.backbone}; {len(suite.tasks)} tasks: {', '.join(suite.tasks)}")
