"""What all charts share: a figure without a screen, colours that the colour-blind tell apart, quiet axes, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from thetau.checkpoint.disk import replacing

INK, MUTED = "#22252b", "#6b7079"
GROUND = "white"
PALETTE = ("#3566b0", "#d9822b", "#3f9b72", "#b0457a", "#7d62b8", "#8c8c8c", "#b59b00")


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=150, facecolor=GROUND)  # dark ink, so never a clear ground
    FigureCanvasAgg(made)
    return made


def plain(axes: Any, grid: Literal["x", "y", "both"]) -> None:
    """Axes without a frame, and a quiet grid."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.tick_params(axis="x", colors=MUTED)
    axes.grid(axis=grid, color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def save(made: Any, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises `OutputError`."""
    with replacing(path) as file:
        made.savefig(file, format="png")
