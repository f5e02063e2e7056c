"""`thetau diagnose tau-jp`: what one vector does to another task's inputs."""

from __future__ import annotations

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Models, session_of, show_rows, told, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading, Sample


@with_options
def tau_jp(models: Models = None, *, out: Charts, json: Json, backbone: Backbone, sample: Sample, reading: Reading) -> None:
    """τJp of every pair, beside cosine and the accuracy that addition keeps.

    thetau diagnose tau-jp models/* -o diagnostics
    """
    from thetau.plots.diagnose import interference_chart
    from thetau.studies import measures

    json.check()
    result = measures.tau_jp(session_of(models, backbone, sample.by_split(), reading), sample)
    write(result, interference_chart, out, "tau_jp")
    json.save(result)
    rows = [
        [f"{pair.a} · {pair.b}", f"{pair.tau_jp:.4g}", f"{pair.cosine:+.3f}", f"{100 * pair.normalised:.1f}"]
        for pair in sorted(result.pairs, key=lambda pair: -pair.tau_jp)
    ]
    sizes = f"{len(result.pairs)} pairs, at most {max(result.n.values())} examples a task"
    show_rows(f"{told(result.correlations)}; {sizes}", rows, "pair", "τJp", "cosine", "normalised accuracy")
