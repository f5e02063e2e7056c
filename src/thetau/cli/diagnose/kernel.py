"""`thetau diagnose kernel`: is fine-tuning linear?"""

from __future__ import annotations

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Models, session_of, show_rows, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading, Sample


@with_options
def kernel(models: Models = None, *, out: Charts, json: Json, backbone: Backbone, sample: Sample, reading: Reading) -> None:
    """Each fine-tuned model against its own linearisation: accuracy and relative error.

    thetau diagnose kernel models/* -o diagnostics
    """
    from thetau.plots.diagnose import kernel_chart
    from thetau.studies import measures

    json.check()
    result = measures.kernel(session_of(models, backbone, sample.by_split(), reading), sample)
    write(result, kernel_chart, out, "kernel")
    json.save(result)
    rows = [
        [
            row.task,
            *(f"{100 * one.value:.1f}" for one in (row.pretrained, row.nonlinear, row.linearised)),
            f"{row.error:.3f}",
            str(row.n),
        ]
        for row in result.rows
    ]
    caption = f"{sample.split}, in percent; error: ‖f − f₀ − Jτ‖ / ‖f − f₀‖"
    show_rows(caption, rows, "task", "pre-trained", "model", "linear", "error", "n")
