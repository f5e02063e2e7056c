"""The chart of a suite's run."""

from __future__ import annotations

from pathlib import Path

from thetau.plots.figure import INK, MUTED, figure, plain, save
from thetau.studies.suite_results import SuiteResults
from thetau.studies.tables import cells

_REFERENCE, _MERGED = "#b8bcc4", "#3566b0"


def suite_bars(results: SuiteResults, path: Path) -> None:
    """Draw a bar a row (average accuracy, percent), a dot for each task on it, and write the PNG to `path`. Raises
    `OutputError`.
    """
    rows = list(results.rows)
    chart = figure(9, 1.6 + 0.36 * len(rows))
    axes = chart.add_subplot()
    places = range(len(rows))
    axes.barh(
        places,
        [100 * row.absolute for row in rows],
        color=[_MERGED if row.role == "merged" else _REFERENCE for row in rows],
        height=0.68,
    )
    for place, row in enumerate(rows):
        values = [100 * row.accuracy[task.name].value for task in results.tasks]
        axes.plot(values, [place] * len(values), "o", markersize=4, color="white", markeredgecolor=INK, markeredgewidth=0.8)
        axes.text(101, place, f"{100 * row.absolute:.1f}", va="center", ha="left", color=INK, fontsize=9)
    axes.set_yticks(list(places), [_label(cells(row, results)) for row in rows])
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 20, 40, 60, 80, 100])
    axes.invert_yaxis()
    axes.set_xlabel(f"test accuracy, %: bar and number = average of {len(results.tasks)} tasks, dots = tasks", color=MUTED)
    axes.set_title(f"{results.suite}: one model from {len(results.tasks)} fine-tuned ones", loc="left", color=INK)
    plain(axes, "x")
    save(chart, path)


def _label(texts: list[str]) -> str:
    return f"{texts[0]}, λ = {texts[1]}" if texts[1] else texts[0]
