"""`thetau diagnose disentanglement`: does each vector act on its own task alone?"""

from __future__ import annotations

from collections.abc import Sequence

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Models, session_of, show_rows, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import DisentanglementGrid


@with_options
def disentanglement(
    models: Models = None, *, out: Charts, json: Json, backbone: Backbone, options: DisentanglementGrid, reading: Reading
) -> None:
    """The disentanglement error of two vectors, or of each two of several, over a grid of coefficients.

    thetau diagnose disentanglement models/sms_spam models/qnli -o diagnostics

    At the classifier (disagreement of labels) or at the representation (--distance kl); --features raw takes features as the papers' code does.
    """
    from thetau.plots.diagnose import disentanglement_chart
    from thetau.studies import measures
    from thetau.studies.paradigms import named_models

    json.check()
    given = named_models(models or [])
    measures.require_several(given)
    found = measures.disentanglements(session_of(given, backbone, options.sample.by_split(), reading), options)
    for result in found:
        a, b = result.tasks
        raw = "-raw" if result.features == "raw" else ""
        write(result, disentanglement_chart, out, f"disentanglement-{a}-{b}-{result.distance}{raw}")
    if len(found) == 1:
        json.save(found[0])
    else:
        json.write({"pairs": found})
    rows = [[" and ".join(result.tasks), *_told(result.cells), *_told(result.inside)] for result in found]
    sizes = ", ".join(f"{task} {n}" for task, n in {task: n for result in found for task, n in result.n.items()}.items())
    first = found[0]
    show_rows(
        f"{first.distance} of {first.features} features; averaged over {sizes} examples",
        rows,
        "",
        "mean",
        "largest",
        "mean, α in 0..1",
        "largest there",
    )


def _told(values: Sequence[float]) -> list[str]:
    return [f"{sum(values) / len(values):.4f}", f"{max(values):.4f}"] if values else ["–", "–"]
