"""`thetau diagnose cost`: what the paradigms of a comparison cost."""

from __future__ import annotations

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Results, show_rows, write
from thetau.cli.options import with_options


@with_options
def cost(results: Results, out: Charts, json: Json) -> None:
    """What each paradigm costs: parameters, time, memory.

    thetau diagnose cost runs/arithmetic/paradigms.json -o diagnostics
    """
    from thetau.plots.diagnose import costs_chart
    from thetau.studies.by_paradigm import costs
    from thetau.studies.paradigms import load_paradigm_results

    json.check()
    result = costs(load_paradigm_results(results))
    write(result, costs_chart, out, "cost")
    json.save(result)
    rows = [
        [
            row.name,
            f"{row.trained:,}",
            f"{row.seconds_a_step:.3f}",
            f"{row.relative:.2f}",
            f"{row.peak_gigabytes:.2f}" if row.own_process and row.peak_gigabytes is not None else "–",
        ]
        for row in result.rows
    ]
    show_rows("", rows, "paradigm", "trained", "s a step", "relative", "peak GB")
