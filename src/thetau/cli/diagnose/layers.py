"""`thetau diagnose layers`: what fine-tuning and merges do at every layer."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from thetau.cli.common import Charts, Json
from thetau.cli.diagnose.common import Merged, Methods, Models, built, session_of, show_rows, write
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.studies.options import LayerSample

if TYPE_CHECKING:
    from thetau.diagnostics.layers import LayerRow, Layers


@with_options
def layers(
    models: Models = None,
    merged: Merged = None,
    method: Methods = None,
    *,
    out: Charts,
    json: Json,
    backbone: Backbone,
    options: LayerSample,
    reading: Reading,
) -> None:
    """Layer by layer: how far inputs move, how few directions of a vector span them, how far a merge's outputs are off.

    thetau diagnose layers models/sst2 models/mnli --merged merged --method task_arithmetic,scale=0.4 -o diagnostics
    """
    from thetau.plots.layers import layers_chart
    from thetau.studies import measures

    json.check()
    named, methods = measures.named_merges(merged or []), built(method or [])
    session = session_of(models, backbone, options.sample.by_split(), reading)
    result = measures.layers(session, options, merged=named, methods=methods)
    write(result, layers_chart, out, "layers")
    json.save(result)
    _show(result)


def _show(result: Layers) -> None:
    blocks: dict[str, list[LayerRow]] = {}
    for row in result.rows:
        place = row.layer if row.kind == "features" else "outside" if row.block is None else f"block {row.block}"
        blocks.setdefault(place, []).append(row)
    sizes = ", ".join(f"{task} {count}" for task, count in result.n.items())
    shown = [
        [
            name,
            str(len({row.layer for row in rows})),
            *(_mean([getattr(row, what) for row in rows]) for what in ("direction", "magnitude", "moved")),
            _mean([row.missed[1] for row in rows if row.missed]),
            _mean([row.missed_by_others[1] for row in rows if row.missed_by_others]),
            *(_mean([row.error[word] for row in rows]) for word in result.merged),
        ]
        for name, rows in blocks.items()
    ]
    columns = ["", "layers", "1 − cos x", "Δ‖x‖/‖x‖", "Δy/y, own", f"x missed at {result.shares[1]:.3g}", "by others' vectors"]
    caption = f"means over layers and tasks; {result.split} examples: {sizes}. Merges: relative error of the outputs (Eq. 83)"
    show_rows(caption, shown, *columns, *result.merged)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.4f}" if known else "–"
