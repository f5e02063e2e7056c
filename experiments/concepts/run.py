"""The pictures of docs/concepts.md, each drawn from a formula that the page states: `python -m experiments.concepts.run`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import IMAGES

GREY, BLUE, ORANGE, GREEN, RED = "#808080", "#4c78c8", "#e08214", "#3a9a5c", "#d1495b"
RC = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    ),  # on white and on black
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "thetau",
}
TAU_A, TAU_B = np.array([2.0, 0.6]), np.array([0.5, 1.7])  # the two task vectors of the first picture
ENTRIES_A = np.array([0.9, -0.2, 0.6, 0.1, -0.7, 0.4, 0.0, 0.8])
ENTRIES_B = np.array([-0.6, -0.3, 0.5, 0.7, 0.5, 0.1, 0.9, -0.8])
CLUSTERS = {
    "reviews": (BLUE, np.array([[1.9, 0.5], [2.0, 0.9], [1.7, 0.8]])),
    "intents": (ORANGE, np.array([[-0.4, 1.6], [0.1, 1.9], [-0.7, 1.8]])),
}


def task_vector(axes: Axes) -> None:
    """θ₀, two models that were fine-tuned from it, their losses around them, their sum, and one vector turned round."""
    x, y = np.meshgrid(np.linspace(-2.6, 3.4, 200), np.linspace(-1.3, 3.1, 200))
    for name, tau, colour in (("a", TAU_A, BLUE), ("b", TAU_B, ORANGE)):
        axes.contour(x, y, (x - tau[0]) ** 2 + (y - tau[1]) ** 2, levels=[0.15, 0.6], colors=colour, alpha=0.4, linewidths=1)
        _arrow(axes, tau, colour)
        axes.text(*np.add(tau, (0.1, -0.25)), f"θ{name} = θ₀ + τ{name}", color=colour)
    _arrow(axes, TAU_A + TAU_B, GREEN)
    axes.text(*np.add(TAU_A + TAU_B, (-1.1, 0.15)), "θ₀ + τa + τb", color=GREEN)
    _arrow(axes, -TAU_A, RED)
    axes.text(*np.add(-TAU_A, (-0.3, -0.35)), "θ₀ − τa", color=RED)
    axes.plot(0, 0, "o", color=GREY)
    axes.text(0.08, -0.3, "θ₀, the base")
    axes.set(xlim=(-2.6, 3.4), ylim=(-1.3, 2.9), aspect="equal", xlabel="one weight", ylabel="another weight")


def interference(axes: Axes) -> None:
    """Eight entries of two task vectors and what their mean keeps; where the signs differ, both lose."""
    place = np.arange(len(ENTRIES_A))
    conflict = ENTRIES_A * ENTRIES_B < 0
    for at in place[conflict]:
        axes.axvspan(at - 0.5, at + 0.5, color=RED, alpha=0.12, linewidth=0)
    axes.bar(place - 0.27, ENTRIES_A, 0.26, color=BLUE, label="τa")
    axes.bar(place, ENTRIES_B, 0.26, color=ORANGE, label="τb")
    axes.bar(place + 0.27, (ENTRIES_A + ENTRIES_B) / 2, 0.26, color=GREEN, label="their mean")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xticks=place, xlabel="entry of a weight matrix; shaded: the signs differ", ylabel="change", ylim=(-1.15, 1))
    axes.legend(frameon=False, ncols=3, loc="lower left")


def basis(axes: Axes) -> None:
    """Six task vectors in two clusters, and the two means that are stored."""
    for name, (colour, vectors) in CLUSTERS.items():
        for vector in vectors:
            _arrow(axes, vector, colour, width=1, alpha=0.45)
        mean = vectors.mean(0)
        _arrow(axes, mean, colour, width=3)
        axes.text(*np.add(1.12 * mean, (-0.35, 0.1)), f"basis of {name}", color=colour)
    axes.plot(0, 0, "o", color=GREY)
    axes.text(0.08, -0.22, "θ₀")
    axes.set(xlim=(-1.7, 3.0), ylim=(-0.4, 2.4), aspect="equal", xlabel="one weight", ylabel="another weight")


def tangent(axes: Axes) -> None:
    """One output as one weight moves, f(θ) = tanh θ, and its tangent at θ₀."""
    start, step = -0.2, 0.9
    slope = 1 - np.tanh(start) ** 2
    theta = np.linspace(-1.0, 2.2, 200)
    axes.plot(theta, np.tanh(theta), color=BLUE, label="the model, f(θ)")
    axes.plot(theta, np.tanh(start) + slope * (theta - start), color=ORANGE, label="its tangent, f(θ₀) + J(θ − θ₀)")
    for count in (1, 2):
        at = start + count * step
        low, high = np.tanh(at), np.tanh(start) + slope * count * step
        axes.plot([at, at], [low, high], color=RED, linestyle=":")
        axes.plot(at, low, "o", color=BLUE)
        axes.plot(at, high, "o", color=ORANGE)
        axes.text(at + 0.05, low - 0.2, f"θ₀ + {count if count > 1 else ''}τ: {high - low:.2f} apart", color=RED)
    axes.plot(start, np.tanh(start), "o", color=GREY)
    axes.text(start + 0.05, np.tanh(start) - 0.2, "θ₀")
    axes.set(xlabel="one weight", ylabel="one output", xlim=(-1.1, 2.4), ylim=(-1.0, 2.1))
    axes.legend(frameon=False, loc="upper left")


PICTURES: dict[str, Callable[[Axes], None]] = {
    "task-vector": task_vector,
    "interference": interference,
    "basis": basis,
    "tangent": tangent,
}


def draw(name: str, folder: Path) -> Path:
    """A picture as SVG, the same bytes each time, for light and dark pages."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        PICTURES[name](axes)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"concept-{name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def _arrow(axes: Axes, to: np.ndarray, colour: str, width: float = 2, alpha: float = 1) -> None:
    axes.annotate(
        "", xy=tuple(to), xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": width, "alpha": alpha}
    )


def main() -> None:
    """All of them, into docs/images."""
    for name in PICTURES:
        sys.stdout.write(f"{draw(name, IMAGES)}\n")


if __name__ == "__main__":
    main()
