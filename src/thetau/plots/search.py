"""The chart of a search: the objective over trials, or the front of two objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save
from thetau.studies.searching.results import Searched, SearchTrial


def search_chart(result: Searched, path: Path) -> None:
    """One objective: every complete trial, and the best so far. Several: the first two against each other, the front in colour.

    Raises `OutputError`.
    """
    chart = figure(7.2, 4.4)
    axes = chart.add_subplot()
    done = [one for one in result.trials if one.state == "complete"]
    names = list(result.objectives)
    if len(names) == 1:
        _over_trials(axes, result, done, names[0])
    else:
        _against(axes, result, done, names[0], names[1])
    axes.legend(frameon=False, fontsize=8)
    plain(axes, "both")
    save(chart, path)


def _over_trials(axes: Any, result: Searched, done: list[SearchTrial], name: str) -> None:
    """Trials in the order in which they began."""
    better = min if result.objectives[name] == "smaller" else max
    values = [one.objectives[name] for one in done]
    so_far = [better(values[: place + 1]) for place in range(len(values))]
    numbers = [one.number for one in done]
    axes.plot(numbers, values, "o", color=PALETTE[5], markersize=4, label="trial")
    axes.step(numbers, so_far, where="post", color=PALETTE[0], label="best so far")
    _start(axes, result, [(one.number, one.objectives[name]) for one in done if one.number == result.start])
    axes.set_xlabel("trial", color=MUTED)
    axes.set_ylabel(f"{name}, validation", color=MUTED)
    axes.set_title(f"{result.sampler}: {len(done)} of {len(result.trials)} trials complete", loc="left", color=INK, fontsize=10)


def _against(axes: Any, result: Searched, done: list[SearchTrial], first: str, second: str) -> None:
    """One objective against the other."""
    points = {one.number: (one.objectives[first], one.objectives[second]) for one in done}
    axes.plot(*zip(*points.values(), strict=True), "o", color=PALETTE[5], markersize=4, label="trial")
    front = sorted(points[number] for number in result.best)
    axes.plot(*zip(*front, strict=True), "o-", color=PALETTE[0], markersize=6, label="front")
    _start(axes, result, [points[number] for number in points if number == result.start])
    axes.set_xlabel(f"{first}, validation", color=MUTED)
    axes.set_ylabel(f"{second}, validation", color=MUTED)
    axes.set_title(f"{result.sampler}: the trials that none is better than", loc="left", color=INK, fontsize=10)


def _start(axes: Any, result: Searched, points: list[tuple[float, float]]) -> None:
    for point in points:
        axes.plot(*point, "s", color=PALETTE[1], markersize=8, fillstyle="none", label="the recipe as it was")
