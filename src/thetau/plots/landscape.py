"""The chart of `thetau diagnose landscape`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thetau.diagnostics.landscape import Landscape
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save


def landscape_chart(result: Landscape, path: Path) -> None:
    """The sum of the losses on the plane, the mean accuracy, and the losses along the three lines. Raises `OutputError`."""
    chart = figure(15, 4.6)
    left, middle, right = (chart.add_subplot(1, 3, place) for place in (1, 2, 3))
    a, b = result.tasks
    accuracy = [
        [50 * (x + y) for x, y in zip(one, other, strict=True)]
        for one, other in zip(result.accuracy[a], result.accuracy[b], strict=True)
    ]
    _plane(chart, left, result, result.joint, "sum of both losses", "viridis_r")
    _plane(chart, middle, result, accuracy, "mean accuracy, %", "viridis")
    for place, line in enumerate(result.lines):
        whole = [sum(values) for values in zip(*line.loss.values(), strict=True)]
        label = f"{line.start} to {line.end}, barrier {line.joint:.3f}"
        right.plot(line.steps, whole, color=PALETTE[place], label=label, linewidth=1.6)
    right.set_title("sum of both losses along lines", loc="left", color=INK, fontsize=10)
    right.set_xlabel("share of the way", color=MUTED)
    right.legend(frameon=False, fontsize=8)
    plain(right, "both")
    save(chart, path)


def _plane(chart: Any, axes: Any, result: Landscape, values: Any, title: str, colours: str) -> None:
    a, b = result.tasks
    picture = axes.contourf(result.grid, result.grid, [list(row) for row in zip(*values, strict=True)], levels=14, cmap=colours)
    for name, (x, y) in (("base", (0.0, 0.0)), (a, (1.0, 0.0)), (b, (0.0, 1.0))):
        axes.plot([x], [y], "o", color="white", markeredgecolor=INK, markersize=6)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=INK)
    for mark in result.marks:
        axes.plot([mark.at[0]], [mark.at[1]], "D", color=PALETTE[1], markeredgecolor="white", markersize=6)
        axes.annotate(mark.name, mark.at, textcoords="offset points", xytext=(5, -9), fontsize=8, color=INK)
    axes.set_xlabel(f"α of {a}", color=MUTED)
    axes.set_ylabel(f"β of {b}", color=MUTED)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    chart.colorbar(picture, ax=axes)
