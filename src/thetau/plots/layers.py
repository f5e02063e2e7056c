"""The chart of `thetau diagnose layers`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from thetau.diagnostics.layers import LayerRow, Layers, ordered
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save


def layers_chart(result: Layers, path: Path) -> None:
    """Four lines over depth: inputs that turn and grow, inputs that vectors miss, outputs' errors under each merge, and their drift from the
    base. Raises `OutputError`.
    """
    chart = figure(13, 7.4)
    names = ordered(result.rows)
    by_layer = {name: [row for row in result.rows if row.layer == name] for name in names}
    axes = [chart.add_subplot(2, 2, place) for place in (1, 2, 3, 4)]
    _line(axes[0], by_layer, "1 − cos", lambda row: row.direction, 0)
    _line(axes[0], by_layer, "|Δ‖x‖|/‖x‖", lambda row: None if row.magnitude is None else abs(row.magnitude), 1)
    _title(axes[0], "inputs, own model against base (Eqs. 7, 8)")
    for place, share in enumerate(result.shares):
        label = f"{share:.3g} of the directions"
        _line(axes[1], by_layer, label, lambda row, place=place: row.missed[place] if row.missed else None, place)
        axes[1].axhline(1 - share, color=PALETTE[place % len(PALETTE)], linewidth=0.8, linestyle=":")
    _title(axes[1], "share of ‖x‖² that the task's vector misses (Eq. 13); dotted: chance")
    for place, name in enumerate(result.merged):
        _line(axes[2], by_layer, name, lambda row, name=name: row.error[name], place)
        _line(axes[3], by_layer, name, lambda row, name=name: row.drift[name], place)
    _line(axes[3], by_layer, "own model", lambda row: row.moved, len(result.merged))
    _title(axes[2], "outputs, merge against own model (Eq. 83)")
    _title(axes[3], "outputs, against the base")
    save(chart, path)


def _line(axes: Any, by_layer: dict[str, list[LayerRow]], label: str, value: Any, colour: int) -> None:
    points = []
    for place, rows in enumerate(by_layer.values()):
        known = [found for row in rows if (found := value(row)) is not None]
        if known:
            points.append((place, mean(known)))
    if points:
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=PALETTE[colour % len(PALETTE)], label=label, linewidth=1.4
        )


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("layer, in the order in which they run", color=MUTED)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    plain(axes, "both")
