"""What the verbs of `thetau diagnose` share: models, charts, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thetau.evaluate.options import Backbone, Reading

if TYPE_CHECKING:
    from thetau.diagnostics.results import Correlation
    from thetau.evaluate.session import Session
    from thetau.parts import Method

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fine-tuned models, whose records name their tasks, or TASK=MODEL; folders or files. "
        "RUN:ROW takes those of a row of a comparison of paradigms, RUN:ROW:1 those of its seed 1, RUN:ROW:0:A,B those of tasks A and B."
    ),
]
Merged = Annotated[list[str] | None, typer.Option("--merged", "-m", help="A merged model, PATH or NAME=PATH; may be repeated.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Merge the models by this method, as wudi or wudi,solver=gradient_flow; may be repeated."),
]
Results = Annotated[Path, typer.Argument(help="The paradigms.json of `thetau suite run --paradigm`.")]


def session_of(models: Sequence[str] | None, backbone: Backbone, limits: dict[str, int | None], reading: Reading) -> Session:
    """The models that were named, in float32, over their base. Raises `RecipeError`: none was."""
    from thetau.evaluate.session import Session
    from thetau.studies.paradigms import named_models

    return Session.open(named_models(models or []), base=backbone.base, limits=limits, reading=reading, exact=True)


def built(given: Sequence[str]) -> dict[str, Method]:
    """Methods by what was said: a name, or a name and its fields, with commas. Raises `RecipeError`."""
    from thetau.cli.options import parse_fields
    from thetau.methods import build

    found = {}
    for said in given:
        name, _, fields = said.partition(",")
        found[said] = build(name, parse_fields(fields.split(","), "--method") if fields else {})
    return found


def write(result: Any, chart: Callable[[Any, Path], None], out: Path, name: str) -> None:
    """The JSON and the chart. Raises `OutputError`."""
    result.save(out / f"{name}.json")
    chart(result, out / f"{name}.png")


def show_rows(caption: str, rows: Sequence[Sequence[str]], *columns: str) -> None:
    """A table on stdout."""
    from thetau.cli.tables import show, table

    made = table(caption, *columns)
    for row in rows:
        made.add_row(*row)
    show(made)


def told(found: Sequence[Correlation]) -> str:
    """Correlations in a line."""
    return "; ".join(
        f"{one.x} and {one.y}: Spearman {'–' if one.spearman is None else format(one.spearman, '+.2f')}" for one in found
    )
