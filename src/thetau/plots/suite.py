"""The chart of a suite's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thetau.errors import OutputError
from thetau.evaluate.results import SuiteResults
from thetau.evaluate.tables import cells

_REFERENCE, _MERGED, _INK, _MUTED = "#b8bcc4", "#3566b0", "#22252b", "#6b7079"


def suite_bars(results: SuiteResults, path: Path) -> None:
    """Draw a bar a row (average accuracy, percent), a dot for each task on it, and write the PNG to `path`. Raises
    `OutputError`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(results.rows)
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(
        places,
        [100 * row.absolute for row in rows],
        color=[_MERGED if row.role == "merged" else _REFERENCE for row in rows],
        height=0.68,
    )
    for place, row in enumerate(rows):
        values = [100 * row.accuracy[task.name].value for task in results.tasks]
        axes.plot(values, [place] * len(values), "o", markersize=4, color="white", markeredgecolor=_INK, markeredgewidth=0.8)
        axes.text(101, place, f"{100 * row.absolute:.1f}", va="center", ha="left", color=_INK, fontsize=9)
    axes.set_yticks(list(places), [_label(cells(row, results)) for row in rows])
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 20, 40, 60, 80, 100])
    axes.invert_yaxis()
    axes.set_xlabel(f"test accuracy, %: bar and number = average of {len(results.tasks)} tasks, dots = tasks", color=_MUTED)
    axes.set_title(f"{results.suite}: one model from {len(results.tasks)} fine-tuned ones", loc="left", color=_INK)
    _plain(axes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error}).") from error


def _label(texts: list[str]) -> str:
    return f"{texts[0]}, λ = {texts[1]}" if texts[1] else texts[0]


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, colors=_INK)
    axes.tick_params(axis="x", colors=_MUTED)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
