"""The chart of the bounds: loss gap over cosine, over L, and bound beside gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thetau.diagnostics.bounds import Bounds
from thetau.diagnostics.results import Correlation
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save

_FLOOR = 1e-4  # a gap of 0 or below has no place on a logarithmic axis


def bounds_chart(result: Bounds, path: Path) -> None:
    """Three panels; those with L only where it was found. Raises `OutputError`."""
    whole = all(half.smoothness is not None for half in result.halves)
    chart = figure(15 if whole else 6.4, 4.6)
    panels = [chart.add_subplot(1, 3 if whole else 1, place) for place in ((1, 2, 3) if whole else (1,))]
    _scatter(panels[0], result, "cosine", "cosine of the two vectors", result.correlations[0])
    panels[0].legend(frameon=False, fontsize=7, title="loss gap of", title_fontsize=8)
    if whole:
        _scatter(panels[1], result, "smoothness", "L of the task that is measured", result.correlations[1])
        _beside(panels[2], result)
    save(chart, path)


def _scatter(axes: Any, result: Bounds, field: str, label: str, found: Correlation) -> None:
    for place, task in enumerate(result.tasks):
        mine = [half for half in result.halves if half.task == task]
        marker = "os^Dv"[place // len(PALETTE) % 5]
        values = [getattr(half, field) for half in mine]
        axes.plot(values, [half.gap for half in mine], marker, color=PALETTE[place % len(PALETTE)], markersize=5, label=task)
    axes.set_xlabel(label, color=MUTED)
    axes.set_ylabel("loss gap at θ₀ + ½τ + ½τ'", color=MUTED)
    known = "not defined" if found.spearman is None else f"{found.spearman:+.2f}"
    axes.set_title(f"Spearman {known}, {found.n} pairs", loc="left", color=INK, fontsize=10)
    plain(axes, "both")


def _beside(axes: Any, result: Bounds) -> None:
    """Filled: inside the theorem's conditions; hollow: outside."""
    ends = [_FLOOR]
    for place, theorem in enumerate(("addition", "negation", "out of distribution")):
        for inside in (True, False):
            mine = [row for row in result.comparisons if row.theorem == theorem and row.inside == inside]
            if not mine:
                continue
            across = [max(row.bound or 0.0, _FLOOR) for row in mine]
            up = [max(row.gap, _FLOOR) for row in mine]
            ends += across + up
            colour = PALETTE[place]
            face = colour if inside else "none"
            label = f"{theorem}{'' if inside else ', outside the conditions'}"
            axes.plot(across, up, "o", color=colour, markerfacecolor=face, markersize=5, label=label)
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#c8ccd2", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bound", color=MUTED)
    axes.set_ylabel(f"measured loss gap (at most {_FLOOR:g}: drawn there)", color=MUTED)
    held = sum(bool(row.holds) for row in result.comparisons)
    axes.set_title(f"gap at or below the bound: {held} of {len(result.comparisons)}", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=7)
    plain(axes, "both")
