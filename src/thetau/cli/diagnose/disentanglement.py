"""`thetau diagnose disentanglement`: does each vector act on its own task alone?"""

from __future__ import annotations

from collections.abc import Sequence

from thetau.cli.common import Charts
from thetau.cli.diagnose.common import Models, session_of, show_rows, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import DisentanglementGrid


@with_options
def disentanglement(
    models: Models = None, *, out: Charts, backbone: Backbone, options: DisentanglementGrid, reading: Reading
) -> None:
    """The disentanglement error of two vectors over a grid of coefficients.

    thetau diagnose disentanglement models/sms_spam models/qnli -o diagnostics
    """
    from thetau.plots.diagnose import disentanglement_chart
    from thetau.studies import measures
    from thetau.studies.paradigms import named_models

    given = named_models(models or [])
    measures.require_two(given)
    result = measures.disentanglement(session_of(given, backbone, options.sample.by_split(), reading), options)
    a, b = result.tasks
    write(result, disentanglement_chart, out, f"disentanglement-{a}-{b}-{result.distance}")
    cells = [value for row in result.error for value in row]
    inside = [
        result.error[i][j] for i, x in enumerate(result.grid) for j, y in enumerate(result.grid) if 0 <= x <= 1 and 0 <= y <= 1
    ]
    rows = [["all of the grid", _mean(cells), f"{max(cells):.4f}"], ["α in 0..1", _mean(inside), f"{max(inside, default=0):.4f}"]]
    sizes = ", ".join(f"{task} {n}" for task, n in result.n.items())
    show_rows(f"{a} and {b}, {result.distance}; averaged over {sizes} examples", rows, "", "mean", "largest")


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "–"
