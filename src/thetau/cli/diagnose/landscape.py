"""`thetau diagnose landscape`: loss and accuracy on the plane of two task vectors, or of three models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Merged, Methods, Models, built, session_of, show_rows, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import Plane

if TYPE_CHECKING:
    from thetau.diagnostics.landscape import Landscape


@with_options
def landscape(
    models: Models = None,
    merged: Merged = None,
    method: Methods = None,
    *,
    out: Charts,
    json: Json,
    backbone: Backbone,
    options: Plane,
    reading: Reading,
) -> None:
    """Loss and accuracy on the plane of the base and two models, or of three models, barriers along the lines between them, and where merges lie.

    thetau diagnose landscape models/sst2 models/mnli --method bilateral -o diagnostics
    """
    from thetau.plots.landscape import landscape_chart
    from thetau.studies import measures
    from thetau.studies.paradigms import named_models

    json.check()
    given = named_models(models or [])
    measures.require_plane(given)
    named, methods = measures.named_merges(merged or []), built(method or [])
    session = session_of(given, backbone, options.sample.by_split(), reading)
    result = measures.landscape(session, options, merged=named, methods=methods)
    write(result, landscape_chart, out, f"landscape-{'-'.join(result.tasks)}")
    json.save(result)
    _show(result)


def _show(result: Landscape) -> None:
    places = {value: place for place, value in enumerate(result.grid)}
    ends = {name: (line, end) for line in result.lines for name, end in ((line.start, 0), (line.end, -1))}
    spots = [*result.corners.items(), *([("both", (1.0, 1.0))] if result.through == "base" else [])]
    rows = []
    for name, (x, y) in (*spots, ("least on the grid", result.least)):
        shares = ["–"] * len(result.tasks)  # what the lines do not tell
        if x in places and y in places:
            i, j = places[x], places[y]
            values = [result.loss[task][i][j] for task in result.tasks]
            shares = [f"{100 * result.accuracy[task][i][j]:.1f}" for task in result.tasks]
        elif name in ends:
            line, place = ends[name]
            values = [line.loss[task][place] for task in result.tasks]
        else:
            continue
        rows.append([name, f"{x:.2f}", f"{y:.2f}", "–", *(f"{one:.4f}" for one in (*values, sum(values))), *shares])
    for mark in result.marks:
        values = [mark.loss[task] for task in result.tasks]
        off = f"{100 * mark.outside:.0f} %"
        if result.through == "models" and mark.distance is not None:
            off = f"{mark.distance:.3g} ({off})"
        rows.append(
            [
                mark.name,
                f"{mark.at[0]:.2f}",
                f"{mark.at[1]:.2f}",
                off,
                *(f"{one:.4f}" for one in (*values, sum(values))),
                *(f"{100 * mark.accuracy[task]:.1f}" for task in result.tasks),
            ]
        )
    sizes = ", ".join(f"{task} {count}" for task, count in result.n.items())
    show_rows(
        f"{result.split} examples: {sizes}; in the {'linear form' if result.space == 'tangent' else 'model itself'}",
        rows,
        "",
        "α",
        "β",
        "off the plane",
        *(f"loss, {task}" for task in result.tasks),
        "sum",
        *(f"accuracy, {task}" for task in result.tasks),
    )
    if result.through == "models":
        told = ", ".join(f"{a} and {b} {length:.3g}" for (a, b), length in result.sides.items())
        typer.echo(f"apart, in the length of weights: {told}")
    for line in result.lines:
        told = ", ".join(f"{task} {value:.4f}" for task, value in line.barrier.items())
        typer.echo(f"from {line.start} to {line.end}: barrier {line.joint:.4f} of the sum ({told})")
