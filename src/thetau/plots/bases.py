"""Charts of banks and of the experiments on bases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau.plots.figure import INK, MUTED, PALETTE, figure, plain, save

if TYPE_CHECKING:
    from torch import Tensor

    from thetau.bases import Bank
    from thetau.bases.cluster import Groups, Spectrum


def clusters_chart(bank: Bank, path: Path) -> None:
    """A bank's clusters. Raises `OutputError`."""
    names, gram = bank.known()
    norms = gram.diagonal().clamp(min=0).sqrt()
    draw_clusters(
        list(names),
        gram / norms[:, None] / norms[None, :],
        {name: basis.members for name, basis in bank.bases.items()},
        bank.state.spectrum,
        path,
    )


def draw_clusters(names: list[str], cosine: Tensor, groups: Groups, spectrum: Spectrum | None, path: Path) -> None:
    """Cosines in the order of the bases, each basis framed (white: unknowable); beside it the Laplacian's eigenvalues and gaps."""
    order = [task for members in groups.values() for task in members]
    places = [names.index(task) for task in order]
    values = cosine[places][:, places].abs().numpy().copy()
    off = [values[i, j] for i in range(len(order)) for j in range(i) if values[i, j] == values[i, j]]
    side = max(4.5, 0.32 * len(order) + 2)
    chart = figure(side + (4.5 if spectrum is not None else 0), side)
    grid = chart.add_gridspec(1, 2, width_ratios=(side, 4)) if spectrum is not None else chart.add_gridspec(1, 1)
    axes = chart.add_subplot(grid[0, 0])
    picture = axes.imshow(values, cmap="Blues", vmin=0, vmax=max(off, default=1) or 1)
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=8, color=INK)
    axes.set_yticks(range(len(order)), order, fontsize=8, color=INK)
    axes.tick_params(length=0)
    at = 0
    for members in groups.values():
        edges = (at - 0.5, at + len(members) - 0.5)
        axes.plot(
            [edges[0], edges[1], edges[1], edges[0], edges[0]],
            [edges[0], edges[0], edges[1], edges[1], edges[0]],
            color=PALETTE[1],
            linewidth=2,
        )
        at += len(members)
    axes.set_title("|cosine| of the task vectors, by basis", loc="left", color=INK, fontsize=10)
    chart.colorbar(picture, ax=axes, shrink=0.7)
    if spectrum is not None:
        right = chart.add_subplot(grid[0, 1])
        right.plot(range(1, len(spectrum.eigenvalues) + 1), spectrum.eigenvalues, "o-", color=PALETTE[0], label="eigenvalue")
        right.bar(range(1, len(spectrum.gaps) + 1), spectrum.gaps, color=PALETTE[1], width=0.5, label="gap after it")
        right.set_xlabel("k", color=MUTED)
        right.set_title("spectrum of the Laplacian of |M|", loc="left", color=INK, fontsize=10)
        right.legend(frameon=False, fontsize=8)
        plain(right, "y")
    save(chart, path)


def sizes_chart(made: Mapping[str, Any], path: Path) -> None:
    """Average accuracy for each number of bases: the bases, random partitions, one merge of all, the base. Raises `OutputError`."""
    chart = figure(8, 4.4)
    axes = chart.add_subplot()
    rows = made["rows"]
    axes.plot([row["k"] for row in rows], [100 * row["bases"] for row in rows], "o-", color=PALETTE[0], label="bases")
    drawn = [(row["k"], 100 * value) for row in rows for value in row["random"]]
    axes.plot(
        [k for k, _ in drawn],
        [value for _, value in drawn],
        "o",
        color=PALETTE[1],
        alpha=0.5,
        markersize=4,
        label="random partitions",
    )
    inner = [row for row in rows if row["random"]]
    axes.plot(
        [row["k"] for row in inner],
        [100 * sum(row["random"]) / len(row["random"]) for row in inner],
        "-",
        color=PALETTE[1],
        label="their mean",
    )
    axes.axhline(100 * rows[0]["bases"], color=PALETTE[5], linewidth=1, linestyle="--", label="one merge of all")
    axes.axhline(100 * made["pretrained"], color=PALETTE[5], linewidth=1, linestyle=":", label="base")
    axes.axvline(made["eigengap"], color=PALETTE[2], linewidth=1, label="k by the eigengap")
    axes.set_xlabel("number of bases k", color=MUTED)
    axes.set_ylabel("average accuracy, %", color=MUTED)
    axes.set_title("mean inside and outside, nothing tuned", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plain(axes, "both")
    save(chart, path)
