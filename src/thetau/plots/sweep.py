"""The chart of a sweep: curves over λ, and values over the number of tasks."""

from __future__ import annotations

from pathlib import Path

from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save
from thetau.studies.sweeps import Swept


def sweep_chart(result: Swept, path: Path) -> None:
    """Average test value over λ, a curve a setting, with the chosen λ marked; beside it, the mean over subsets with its interval.

    Raises `OutputError`.
    """
    parts = 2 if result.subsets else 1
    chart = figure(6.2 * parts, 4.4)
    axes = chart.add_subplot(1, parts, 1)
    for place, row in enumerate(result.rows):
        colour = PALETTE[place % len(PALETTE)]
        label = ", ".join(f"{name}={value}" for name, value in row.fields.items()) or row.method.partition("(")[0]
        axes.plot(
            [p.scale for p in row.points], [100 * p.absolute for p in row.points], "o-", color=colour, markersize=3, label=label
        )
        axes.plot([row.chosen], [100 * row.best.absolute], "s", color=colour, markersize=8, fillstyle="none")
    axes.set_xlabel("λ", color=MUTED)
    axes.set_ylabel("average on test, %", color=MUTED)
    axes.set_title("squares: λ of best validation", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    plain(axes, "both")
    if result.subsets:
        right = chart.add_subplot(1, parts, 2)
        sizes = [one.size for one in result.subsets]
        bars = [
            [100 * (one.mean - one.low) if len(one.values) > 1 else 0.0 for one in result.subsets],
            [100 * (one.high - one.mean) if len(one.values) > 1 else 0.0 for one in result.subsets],
        ]
        right.errorbar(sizes, [100 * one.mean for one in result.subsets], yerr=bars, fmt="o-", color=PALETTE[0], capsize=3)
        right.set_xlabel("tasks merged", color=MUTED)
        right.set_ylabel("normalised, %", color=MUTED)
        right.set_title("mean over subsets, 95 % interval", loc="left", color=INK, fontsize=10)
        right.set_xticks(sizes)
        plain(right, "both")
    save(chart, path)
