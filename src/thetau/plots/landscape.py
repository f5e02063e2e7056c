"""The chart of `thetau diagnose landscape`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thetau.diagnostics.landscape import Landscape, on_frame
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save


def landscape_chart(result: Landscape, path: Path) -> None:
    """The sum of the losses on the plane, the mean accuracy, and the losses along the three lines. Raises `OutputError`."""
    chart = figure(15, 4.6)
    left, middle, right = (chart.add_subplot(1, 3, place) for place in (1, 2, 3))
    accuracy = [[100 * value for value in row] for row in result.mean_accuracy]
    every = "both" if len(result.tasks) == 2 else "all"
    _plane(chart, left, result, result.joint, f"sum of {every} losses", "viridis_r")
    _plane(chart, middle, result, accuracy, "mean accuracy, %", "viridis")
    for place, line in enumerate(result.lines):
        whole = [sum(values) for values in zip(*line.loss.values(), strict=True)]
        label = f"{line.start} to {line.end}, barrier {line.joint:.3f}"
        right.plot(line.steps, whole, color=PALETTE[place], label=label, linewidth=1.6)
    right.set_title(f"sum of {every} losses along lines", loc="left", color=INK, fontsize=10)
    right.set_xlabel("share of the way", color=MUTED)
    right.legend(frameon=False, fontsize=8)
    plain(right, "both")
    save(chart, path)


def _plane(chart: Any, axes: Any, result: Landscape, values: Any, title: str, colours: str) -> None:
    """In α and β over the base; as it lies in the space of weights where it goes through three models."""
    true = result.through == "models" and result.frame is not None

    def spot(at: tuple[float, float]) -> tuple[float, float]:
        return on_frame(result.frame, at) if true and result.frame is not None else at

    grid = [[spot((x, y)) for y in result.grid] for x in result.grid]
    across, up = ([[point[side] for point in row] for row in grid] for side in (0, 1))
    picture = axes.contourf(across, up, values, levels=14, cmap=colours)
    if true:
        corners = [spot(at) for at in result.corners.values()]
        axes.plot(*zip(*corners, corners[0], strict=True), color="white", linewidth=0.8, alpha=0.7)
        axes.set_aspect("equal")
        axes.set_xlabel("length of weights", color=MUTED)
    else:
        axes.set_xlabel(f"α of {result.tasks[0]}", color=MUTED)
        axes.set_ylabel(f"β of {result.tasks[1]}", color=MUTED)
    for name, at in result.corners.items():
        _point(axes, name, spot(at), (5, 5), "o", "white", INK)
    for place, mark in enumerate(result.marks):
        if true:  # marks lie close beside each other within three models: a legend names them
            off = f", {mark.distance:.2f} off the plane" if mark.distance and mark.outside else ""
            colour = PALETTE[(place + 1) % len(PALETTE)]
            axes.plot(
                *spot(mark.at), "D", color=colour, markeredgecolor="white", markersize=6, label=f"{mark.name}{off}", linestyle=""
            )
        else:
            _point(axes, mark.name, spot(mark.at), (5, -9), "D", PALETTE[1], "white")
    if true and result.marks:
        named = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
        for text in named.get_texts():
            text.set_parse_math(False)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    chart.colorbar(picture, ax=axes, shrink=0.6 if true else 1.0)


def _point(axes: Any, name: str, at: tuple[float, float], beside: tuple[int, int], form: str, colour: str, edge: str) -> None:
    axes.plot([at[0]], [at[1]], form, color=colour, markeredgecolor=edge, markersize=6)
    axes.annotate(name, at, textcoords="offset points", xytext=beside, fontsize=8, color=INK, parse_math=False)
