"""`thetau diagnose single`: accuracy of single tasks in a comparison of paradigms."""

from __future__ import annotations

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Results, show_rows, write
from thetau.cli.options import with_options


@with_options
def single(results: Results, out: Charts, json: Json) -> None:
    """Single-task accuracy by paradigm.

    thetau diagnose single runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import single_chart
    from thetau.studies.by_paradigm import single_tasks
    from thetau.studies.paradigms import load_paradigm_results

    json.check()
    result = single_tasks(load_paradigm_results(results))
    write(result, single_chart, out, "single")
    json.save(result)
    rows = [
        [row.name, *(f"{100 * row.accuracy[task]:.1f}" for task in result.n), f"{100 * row.average:.1f}"] for row in result.rows
    ]
    show_rows("test, in percent, mean over seeds", rows, "paradigm", *result.n, "average")
