"""Pages of what task vectors do to each other: τJp (`diagnose tau-jp`), disentanglement errors (`diagnose disentanglement`), cosines."""

from __future__ import annotations

from itertools import pairwise

from thetau.diagnostics.cosines import Cosines
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.interference import Interference
from thetau.diagnostics.results import Matrix
from thetau.errors import DataError
from thetau.report.blocks import Block, Column, Facts, Heatmap, Page, Scatter, Section, Table
from thetau.report.blocks import Point as Dot
from thetau.report.text import number

CHANGED = "The file was changed; run it again."


def _square(values: Matrix, side: int) -> bool:
    return len(values) == side and all(len(row) == side for row in values)


def interference_page(found: Interference) -> Page:
    """τJp of every pair, beside cosines and what addition keeps. Raises `DataError`: figures that are not of every pair."""
    count = len(found.tasks)
    if not (
        _square(found.products, count) and _square(found.cosine, count) and set(found.tasks) <= set(found.unit) & set(found.n)
    ):
        raise DataError(f"τJp: has not one figure a pair of tasks. {CHANGED}")
    facts = Facts(
        pairs=(
            ("Examples", ", ".join(f"{task} {found.n[task]}" for task in found.tasks) + f" ({found.split})"),
            ("Accuracies measured in", "the linear form" if found.space == "tangent" else "the model itself"),
            *((f"Spearman: {one.x} and {one.y}", one.spearman) for one in found.correlations),
        )
    )
    products = Heatmap(
        title="E‖J(x) τ‖² of each vector (row) on each task (column)",
        rows=found.tasks,
        columns=found.tasks,
        values=found.products,
        caption="On the diagonal, what a vector does to its own task.",
    )
    cosines = Heatmap(
        title="Cosines", rows=found.tasks, columns=found.tasks, values=found.cosine, signed=True, top=1.0, spec="+.3f"
    )
    pairs = Table(
        title="Pairs",
        columns=(
            Column(name="a", number=False),
            Column(name="b", number=False),
            Column(name="τJp"),
            Column(name="cosine", spec="+.3f"),
            Column(name="normalised accuracy", spec=".1f", meaning="of the sum at α = 1, mean of both, in percent"),
        ),
        rows=tuple(
            (pair.a, pair.b, pair.tau_jp, pair.cosine, 100 * pair.normalised)
            for pair in sorted(found.pairs, key=lambda pair: -pair.tau_jp)
        ),
    )
    dots = Scatter(
        title="τJp and what addition keeps",
        x="τJp",
        y="normalised accuracy, %",
        points=tuple(Dot(name=f"{pair.a} · {pair.b}", x=pair.tau_jp, y=100 * pair.normalised) for pair in found.pairs),
    )
    blocks: tuple[Block, ...] = (products, cosines, dots, pairs) if found.pairs else (products, cosines)
    return Page(
        title=f"τJp of {', '.join(found.tasks)}",
        about="τJp",
        lead=f"{count} vectors, every pair.",
        sections=(
            Section(slug="overview", title="Overview", blocks=(facts,)),
            Section(slug="pairs", title="Pairs", blocks=blocks),
        ),
    )


def disentanglement_page(found: Disentanglement) -> Page:
    """ξ over the grid. Raises `DataError`: figures that are not of every point."""
    side = len(found.grid)
    if not side or not _square(found.error, side) or not all(_square(part, side) for part in found.parts.values()):
        raise DataError(f"disentanglement: has not one figure a point of the grid. {CHANGED}")
    if any(a >= b for a, b in pairwise(found.grid)):
        raise DataError(f"disentanglement: its grid does not rise. {CHANGED}")
    names = tuple(number(value, ".3g") for value in found.grid)
    a, b = found.tasks
    cells, inside = found.cells, found.inside
    facts = Facts(
        pairs=(
            (
                "Distance",
                "disagreement of labels" if found.distance == "disagreement" else "KL of the softmax of the features, nats",
            ),
            ("Features", found.features),
            ("Measured in", "the linear form" if found.space == "tangent" else "the model itself"),
            ("Examples", ", ".join(f"{task} {n}" for task, n in found.n.items()) + f" ({found.split})"),
            ("Mean over the grid", sum(cells) / len(cells)),
            ("Mean for α in 0..1", sum(inside) / len(inside) if inside else None),
        )
    )
    maps = [
        Heatmap(title=title, rows=names, columns=names, values=values)
        for title, values in (("ξ", found.error), *((f"The part of {task}", part) for task, part in found.parts.items()))
    ]
    return Page(
        title=f"Disentanglement of {a} and {b}",
        about="disentanglement error",
        lead="0 where each vector acts on its own task alone.",
        sections=(
            Section(slug="overview", title="Overview", blocks=(facts,)),
            Section(slug="error", title="Over α", lead=f"α of {a} goes down, α of {b} to the right.", blocks=tuple(maps)),
        ),
    )


def cosines_page(found: Cosines) -> Page:
    """Cosines, group by group. Raises `DataError`: figures that are not of every pair."""
    if wrong := [group.name for group in found.groups if not _square(group.cosine, len(group.tasks))]:
        raise DataError(f"cosines: group {wrong[0]!r} has not one figure a pair. {CHANGED}")
    maps = tuple(
        Heatmap(
            title=group.name or "vectors",
            rows=group.tasks,
            columns=group.tasks,
            values=group.cosine,
            signed=True,
            top=1.0,
            cluster=len(group.tasks) > 12,
            spec="+.3f",
            caption=f"Mean |cos| over pairs: {number(group.mean_absolute)}.",
        )
        for group in found.groups
    )
    return Page(
        title="Cosines of task vectors",
        about="cosines",
        lead=f"{len(found.groups)} group{'s' if len(found.groups) != 1 else ''}.",
        sections=(Section(slug="cosines", title="Cosines", blocks=maps),),
    )
