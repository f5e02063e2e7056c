"""The page of `thetau diagnose landscape`: losses and accuracies on a plane of weights, the marks on it, and the lines between its corners."""

from __future__ import annotations

from collections.abc import Sequence

from thetau.diagnostics.landscape import Landscape
from thetau.diagnostics.results import Matrix
from thetau.errors import DataError
from thetau.report.blocks import Block, Column, Facts, Heatmap, Lines, Page, Point, Scatter, Section, Table
from thetau.report.text import Value, number


def landscape_page(found: Landscape) -> Page:
    """The page. Raises `DataError`: figures that are not of every point, as where a file was changed by hand."""
    _check(found)
    over = "the base, " if found.through == "base" else ""
    return Page(
        title=f"The plane of {over}{', '.join(found.tasks)}",
        about="landscape",
        lead=f"The sum of the losses is least at {_at(found.least)} of {len(found.grid)} × {len(found.grid)} points.",
        sections=(_overview(found), _places(found), _plane(found), _lines(found)),
    )


def _check(found: Landscape) -> None:
    side, tasks = len(found.grid), set(found.tasks)
    sized = all(
        set(values) == tasks and all(len(rows) == side and all(len(row) == side for row in rows) for rows in values.values())
        for values in (found.loss, found.accuracy)
    )
    lines = all(
        set(line.loss) == tasks and set(line.barrier) == tasks and all(len(one) == len(line.steps) for one in line.loss.values())
        for line in found.lines
    )
    marks = all(set(mark.loss) == set(mark.accuracy) == tasks for mark in found.marks)
    counted = len(found.tasks) == (2 if found.through == "base" else 3) and len(tasks) == len(found.tasks)
    if not (sized and lines and marks and counted and side):
        raise DataError(
            "the landscape has not one figure a task and point. The file was changed; run `thetau diagnose landscape` again."
        )


def _at(point: tuple[float, float]) -> str:
    return f"({number(point[0], '.2f')}, {number(point[1], '.2f')})"


def _overview(found: Landscape) -> Section:
    a, b = found.tasks[:2]
    formula = (
        f"θ₀ + α τ({a}) + β τ({b})"
        if found.through == "base"
        else f"θ({a}) + α (θ({b}) − θ({a})) + β (θ({found.tasks[2]}) − θ({a}))"
    )
    pairs: list[tuple[str, Value]] = [
        ("Points", formula),
        ("Measured in", "the linear form" if found.space == "tangent" else "the model itself"),
        ("Examples", ", ".join(f"{task} {n}" for task, n in found.n.items()) + f" ({found.split})"),
    ]
    pairs += [(f"From {one} to {other}", length) for (one, other), length in found.sides.items()]
    return Section(slug="overview", title="Overview", blocks=(Facts(pairs=tuple(pairs)),))


def _places(found: Landscape) -> Section:
    """The corners, the least point and the marks: where they are, and what they do."""
    columns = (
        Column(name="point", number=False),
        Column(name="α", spec=".3f"),
        Column(name="β", spec=".3f"),
        Column(name="off the plane", spec=".3g", meaning="how far, in the length of weights"),
        Column(name="share off", spec=".3f", meaning="of the squared distance from the base, or from the middle of three models"),
        *(Column(name=f"loss, {task}", spec=".4f") for task in found.tasks),
        Column(name="sum", spec=".4f"),
        *(Column(name=f"accuracy, {task}", spec=".1f") for task in found.tasks),
    )
    places = {value: place for place, value in enumerate(found.grid)}
    rows: list[tuple[Value, ...]] = []
    for name, (x, y) in (*found.corners.items(), ("least on the grid", found.least)):
        if x in places and y in places:
            i, j = places[x], places[y]
            losses = [found.loss[task][i][j] for task in found.tasks]
            shares = [100 * found.accuracy[task][i][j] for task in found.tasks]
            rows.append((name, x, y, None, None, *losses, sum(losses), *shares))
    for mark in found.marks:
        losses = [mark.loss[task] for task in found.tasks]
        shares = [100 * mark.accuracy[task] for task in found.tasks]
        rows.append((mark.name, *mark.at, mark.distance, mark.outside, *losses, sum(losses), *shares))
    spots = [Point(name=name, x=x, y=y, front=False, said="a corner") for name, (x, y) in found.corners.items()]
    spots += [
        Point(name=mark.name, x=mark.at[0], y=mark.at[1], size=1.0, said=f"{100 * mark.outside:.0f} % off the plane")
        for mark in found.marks
    ]
    blocks: list[Block] = [
        Table(
            title="Points",
            columns=columns,
            rows=tuple(rows),
            caption="A mark has its own losses, not those of the point below it.",
        )
    ]
    if found.marks:
        blocks.append(
            Scatter(
                title="Where they fall on the plane",
                x="α",
                y="β",
                points=tuple(spots),
                caption="Hollow: corners. Filled: merges, and a base beside the plane, where they fall on it. Point at one for its name.",
            )
        )
    return Section(slug="points", title="Where merges lie", blocks=tuple(blocks))


def _plane(found: Landscape) -> Section:
    blocks = [
        _map(found, "Sum of the losses", found.joint, ".3f"),
        _map(found, "Mean accuracy, %", _percent(found.mean_accuracy), ".1f"),
    ]
    for task in found.tasks:
        blocks += [
            _map(found, f"Loss of {task}", found.loss[task], ".3f"),
            _map(found, f"Accuracy of {task}, %", _percent(found.accuracy[task]), ".1f"),
        ]
    return Section(slug="plane", title="The plane", lead="α goes down, β to the right.", blocks=tuple(blocks))


def _percent(values: Matrix) -> Matrix:
    return tuple(tuple(100 * value for value in row) for row in values)


def _map(found: Landscape, title: str, values: Matrix, spec: str) -> Heatmap:
    names = tuple(number(value, ".3g") for value in found.grid)
    known = [value for row in values for value in row if value == value]
    return Heatmap(title=title, rows=names, columns=names, values=values, bottom=min(known, default=0.0), spec=spec)


def _lines(found: Landscape) -> Section:
    table = Table(
        title="Barriers",
        columns=(
            Column(name="from", number=False),
            Column(name="to", number=False),
            Column(name="of the sum", spec=".4f"),
            *(Column(name=task, spec=".4f") for task in found.tasks),
        ),
        rows=tuple((line.start, line.end, line.joint, *(line.barrier[task] for task in found.tasks)) for line in found.lines),
        caption="The most that the loss rises above the straight line between the ends.",
    )
    series = {f"{line.start} to {line.end}": _sum(list(line.loss.values())) for line in found.lines}
    lines = Lines(title="Sum of the losses along the lines", x="step", y="loss", series=series, start=0)
    return Section(slug="lines", title="Along lines", blocks=(table, lines))


def _sum(losses: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(values) for values in zip(*losses, strict=True))
