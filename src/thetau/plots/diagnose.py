"""Charts of the diagnostics, one a result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thetau.diagnostics.cosines import Cosines
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.interference import Interference
from thetau.diagnostics.kernel import KernelTest
from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save
from thetau.studies.by_paradigm import AlphaCurves, Costs, SingleTasks


def interference_chart(result: Interference, path: Path) -> None:
    """The heatmap of ‖J τ‖² (vector by row, inputs by column), and the three scatters over pairs. Raises `OutputError`."""
    chart = figure(13, 7.6)
    grid = chart.add_gridspec(2, 3)
    _heatmap(
        chart.add_subplot(grid[0, :2]), result.products, result.tasks, result.tasks, "mean ‖J(x) τ‖², vector × inputs", "{:.3g}"
    )
    _heatmap(
        chart.add_subplot(grid[0, 2]), result.cosine, result.tasks, result.tasks, "cosine of the vectors", "{:.2f}", signed=True
    )
    values = {
        "τJp": [pair.tau_jp for pair in result.pairs],
        "cosine": [pair.cosine for pair in result.pairs],
        "normalised accuracy": [pair.normalised for pair in result.pairs],
    }
    for place, found in enumerate(result.correlations):
        axes = chart.add_subplot(grid[1, place])
        axes.plot(values[found.x], values[found.y], "o", color=PALETTE[0], markersize=5)
        axes.set_xlabel(found.x, color=MUTED)
        axes.set_ylabel(found.y, color=MUTED)
        known = "not defined" if found.spearman is None else f"{found.spearman:+.2f}"
        axes.set_title(f"Spearman {known}, {found.n} pairs", loc="left", color=INK, fontsize=10)
        plain(axes, "both")
    save(chart, path)


def disentanglement_chart(result: Disentanglement, path: Path) -> None:
    """ξ over the grid; the cross is the pre-trained model, the square the range 0..1 in which α is sought. Raises `OutputError`."""
    chart = figure(6, 5.2)
    axes = chart.add_subplot()
    picture = axes.pcolormesh(result.grid, result.grid, result.error, cmap="viridis_r", shading="nearest")
    axes.set_aspect("equal")
    axes.plot([0], [0], "x", color="#c2382e", markersize=9, markeredgewidth=2)
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#c2382e", linewidth=1.2)
    axes.set_xlabel(f"α of {result.tasks[1]}", color=MUTED)
    axes.set_ylabel(f"α of {result.tasks[0]}", color=MUTED)
    what = (
        "share of labels that differ, sum of both tasks" if result.distance == "disagreement" else "KL in nats, sum of both tasks"
    )
    raw = ", raw features" if result.features == "raw" else ""
    axes.set_title(f"disentanglement error: {what}{raw}", loc="left", color=INK, fontsize=10)
    chart.colorbar(picture, ax=axes)
    save(chart, path)


def kernel_chart(result: KernelTest, path: Path) -> None:
    """Accuracy in the model against accuracy in the linear form, and the relative error of each task. Raises `OutputError`."""
    chart = figure(10, 4.4)
    left, right = chart.add_subplot(1, 2, 1), chart.add_subplot(1, 2, 2)
    for row in result.rows:
        left.plot([100 * row.nonlinear.value], [100 * row.linearised.value], "o", color=PALETTE[0])
        left.annotate(row.task, (100 * row.nonlinear.value, 100 * row.linearised.value), fontsize=8, color=INK)
    left.plot([0, 100], [0, 100], color="#c8ccd2", linewidth=1, zorder=0)
    left.set_xlabel("fine-tuned model, %", color=MUTED)
    left.set_ylabel("post-hoc linear, %", color=MUTED)
    left.set_title("accuracy", loc="left", color=INK, fontsize=10)
    plain(left, "both")
    names = [row.task for row in result.rows]
    right.barh(range(len(names)), [row.error for row in result.rows], color=PALETTE[0], height=0.6)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlabel("mean of ‖f − f₀ − Jτ‖ / ‖f − f₀‖", color=MUTED)
    right.set_title("relative error of the linear form", loc="left", color=INK, fontsize=10)
    plain(right, "x")
    save(chart, path)


def cosines_chart(result: Cosines, path: Path) -> None:
    """A heatmap a group. Raises `OutputError`."""
    count = len(result.groups)
    chart = figure(4.6 * count + 0.6, 4.4)
    for place, group in enumerate(result.groups, start=1):
        title = group.name if group.mean_absolute is None else f"{group.name}: mean |cos| {group.mean_absolute:.3f}"
        _heatmap(chart.add_subplot(1, count, place), group.cosine, group.tasks, group.tasks, title, "{:.2f}", signed=True)
    save(chart, path)


def alpha_chart(result: AlphaCurves, path: Path) -> None:
    """A line a paradigm: normalised validation accuracy over α. Raises `OutputError`."""
    chart = figure(8.4, 4.8)
    axes = chart.add_subplot()
    for place, curve in enumerate(result.curves):
        style = ("-", "--", ":")[place // len(PALETTE) % 3]
        values = [100 * value for value in curve.normalised]
        axes.plot(curve.alphas, values, style, color=PALETTE[place % len(PALETTE)], label=curve.name, linewidth=1.6)
    axes.set_xlabel("α", color=MUTED)
    axes.set_ylabel("normalised validation accuracy, %", color=MUTED)
    axes.set_title(f"{result.suite}: θ₀ + α Σ τ, mean over tasks", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plain(axes, "both")
    save(chart, path)


def single_chart(result: SingleTasks, path: Path) -> None:
    """Groups of bars: each task under each paradigm. Raises `OutputError`."""
    tasks = list(result.n)
    chart = figure(2 + 1.5 * len(tasks), 4.6)
    axes = chart.add_subplot()
    width = 0.84 / len(result.rows)
    for place, row in enumerate(result.rows):
        places = [i + (place - (len(result.rows) - 1) / 2) * width for i in range(len(tasks))]
        hatch = (None, "//", "..")[place // len(PALETTE) % 3]
        axes.bar(
            places,
            [100 * row.accuracy[task] for task in tasks],
            width,
            color=PALETTE[place % len(PALETTE)],
            hatch=hatch,
            label=row.name,
        )
    for i, task in enumerate(tasks):
        axes.plot([i - 0.44, i + 0.44], [100 * result.pretrained[task]] * 2, color=INK, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test accuracy, %; dashed: pre-trained", color=MUTED)
    axes.set_title(f"{result.suite}: each task's own model", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plain(axes, "y")
    save(chart, path)


def costs_chart(result: Costs, path: Path) -> None:
    """Bars: seconds a step relative to the first paradigm, with the share of parameters that is trained. Raises `OutputError`."""
    chart = figure(8, 1.4 + 0.36 * len(result.rows))
    axes = chart.add_subplot()
    axes.barh(range(len(result.rows)), [row.relative for row in result.rows], color=PALETTE[0], height=0.62)
    for place, row in enumerate(result.rows):
        share = row.trained / row.parameters if row.parameters else 0.0
        axes.text(row.relative, place, f" {row.relative:.2f}×, {100 * share:.0f} % trained", va="center", color=INK, fontsize=8)
    axes.set_yticks(range(len(result.rows)), [row.name for row in result.rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(row.relative for row in result.rows))
    axes.set_xlabel(f"seconds a step, over {result.rows[0].name}'s", color=MUTED)
    plain(axes, "x")
    save(chart, path)


def _heatmap(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str,
    *,
    signed: bool = False,
) -> None:
    most = max(abs(value) for row in values for value in row) or 1.0
    limits = {"vmin": -1.0, "vmax": 1.0, "cmap": "RdBu_r"} if signed else {"vmin": 0.0, "vmax": most, "cmap": "Blues"}
    axes.imshow(values, aspect="auto", **limits)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = abs(value) > 0.6 * (1.0 if signed else most)
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7, color="white" if dark else INK)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=INK)
