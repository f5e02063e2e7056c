"""`thetau diagnose cosine`: how alike the vectors of a paradigm are."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import show_rows, write
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.evaluate.options import Backbone


@with_options
def cosine(
    group: Annotated[
        list[str], typer.Option("--group", "-g", help="NAME=MODEL,MODEL,…: the models of one paradigm; may be given again.")
    ],
    out: Charts,
    backbone: Backbone,
    json: Json,
) -> None:
    """Cosine similarity of task vectors, group by group.

    thetau diagnose cosine -g standard=a,b,c -g attention=d,e,f -o diagnostics
    """
    from thetau.plots.diagnose import cosines_chart
    from thetau.studies.measures import cosines
    from thetau.studies.paradigms import named_models

    json.check()
    groups: dict[str, list[str]] = {}
    for entry in group:
        name, equals, listed = entry.partition("=")
        if not equals or not listed or name in groups:
            raise RecipeError([f"`--group` must be NAME=MODEL,MODEL,…, each name once. Got {entry!r}."], "options")
        groups[name] = named_models(listed.split(","))
    result = cosines(groups, base=backbone.base)
    write(result, cosines_chart, out, "cosine")
    json.save(result)
    rows = [
        [one.name, str(len(one.tasks)), "–" if one.mean_absolute is None else f"{one.mean_absolute:.4f}"] for one in result.groups
    ]
    show_rows("", rows, "group", "vectors", "mean |cos|")
