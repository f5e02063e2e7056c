"""`thetau diagnose alpha`: accuracy over α in a comparison of paradigms."""

from __future__ import annotations

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Results, show_rows, write
from thetau.cli.options import with_options


@with_options
def alpha(results: Results, out: Charts, json: Json) -> None:
    """Accuracy over α by paradigm.

    thetau diagnose alpha runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import alpha_chart
    from thetau.studies.by_paradigm import alpha_curves
    from thetau.studies.paradigms import load_paradigm_results

    json.check()
    result = alpha_curves(load_paradigm_results(results))
    write(result, alpha_chart, out, "alpha")
    json.save(result)
    rows = []
    for curve in result.curves:
        best = max(range(len(curve.alphas)), key=lambda i: curve.normalised[i])
        rows.append([curve.name, f"{curve.alphas[best]:g}", *(f"{100 * curve.normalised[i]:.1f}" for i in (best, -1))])
    show_rows("normalised validation accuracy, mean over tasks and seeds", rows, "paradigm", "best α", "there", "at the last α")
