"""Charts as marks of SVG with their places worked out; the template only writes them down, and every text in them is escaped there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Literal, final

from thetau.report.blocks import Bars, Chart, Column, Graph, Heatmap, Lines, Node, Scatter, Spread, Table
from thetau.report.scales import Axis, axis, order_of, spread_of
from thetau.report.text import Span, clean, number, shown

WIDTH = 900.0
STEPS = 16  # shades on each side of 0
LABEL = 26  # characters of a name beside a mark; the whole name is in what is said of it
TABLE = 1500  # cells up to which a heatmap is given as a table too
LETTER = 7.2  # pixels of one at the size of labels


@final
@dataclass(frozen=True, kw_only=True)
class Mark:
    """One shape. `tip`: what is said when it is pointed at or reached by the keys."""

    tag: Literal["path", "rect", "circle", "line", "text"]
    at: Mapping[str, Any]
    text: str = ""
    tip: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart, ready to be written. `summary`: what a screen reader says of it. `table`: the same figures; `cells`: those of a heatmap."""

    title: str
    summary: str
    width: float
    height: float
    marks: tuple[Mark, ...]
    caption: str = ""
    table: Table | None = None
    cells: Mapping[str, Any] = field(default_factory=dict)
    legend: tuple[tuple[str, str], ...] = ()


@singledispatch
def draw(chart: Chart) -> Drawing:
    """The drawing of any chart."""
    raise TypeError(f"no drawing is known of a {type(chart).__name__}")


def label(x: float, y: float, text: str, *, anchor: str = "start", style: str = "", turn: bool = False) -> Mark:
    """A short text."""
    at: dict[str, Any] = {"x": round(x, 1), "y": round(y, 1)}
    if anchor != "start":
        at["text-anchor"] = anchor
    if style:
        at["class"] = style
    if turn:
        at["transform"] = f"rotate(-45 {round(x, 1)} {round(y, 1)})"
    return Mark(tag="text", at=at, text=clean(text, LABEL))


def _room(names: Sequence[str]) -> float:
    """Pixels that the longest of some labels takes."""
    return LETTER * max((min(LABEL, len(clean(name, LABEL))) for name in names), default=0) + 10


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Mark:
    return Mark(tag="line", at={"x1": round(x1, 1), "y1": round(y1, 1), "x2": round(x2, 1), "y2": round(y2, 1), "class": style})


def _across(scale: Axis, top: float, bottom: float, name: str, say: Callable[[float], str] = number) -> list[Mark]:
    """Ticks, grid and name of an axis that goes from left to right, its labels below."""
    marks = []
    for tick in scale.ticks:
        marks += [
            _line(scale.at(tick), top, scale.at(tick), bottom, "grid"),
            label(scale.at(tick), bottom + 16, say(tick), anchor="middle", style="tick"),
        ]
    return [
        *marks,
        Mark(
            tag="text",
            at={"x": (scale.start + scale.stop) / 2, "y": bottom + 36, "text-anchor": "middle", "class": "axis"},
            text=name,
        ),
    ]


def _upwards(scale: Axis, left: float, right: float, name: str) -> list[Mark]:
    """The same of an axis that goes up, its name above."""
    marks = []
    for tick in scale.ticks:
        marks += [
            _line(left, scale.at(tick), right, scale.at(tick), "grid"),
            label(left - 6, scale.at(tick) + 4, number(tick), anchor="end", style="tick"),
        ]
    return [*marks, Mark(tag="text", at={"x": 4, "y": 14, "class": "axis"}, text=name)]


# Heatmaps.


def shade(value: float | None, top: float, signed: bool, bottom: float = 0.0) -> str:
    """The class of a value's colour: `p1`…`p16` above `bottom`, `m1`…`m16` below 0, `p0` at it, `nan` for what is no number.

    Examples:
        >>> shade(0.5, 1.0, True), shade(-2.0, 1.0, True), shade(float("nan"), 1.0, True)
        ('p8', 'm16', 'nan')
    """
    if value is None or math.isnan(value):
        return "nan"
    length = abs(value) if signed else max(0.0, value - bottom)
    step = round(STEPS * min(1.0, length / (top - bottom))) if top > bottom and math.isfinite(top) else 0
    return f"{'m' if signed and value < 0 and step else 'p'}{step}"


# Up to the first of these steps a cell is read in the page's ink, from the second on in its ground, between them in black: by the contrast of both themes.
_INKS = {"p": (10, 11), "m": (9, 13)}


def ink_on(style: str) -> Literal["off", "mid", "on"]:
    """How a number is written on a colour so that it can be read, in the light and the dark.

    Examples:
        >>> [ink_on(style) for style in ("p0", "p11", "p16", "m11", "nan")]
        ['off', 'mid', 'on', 'mid', 'off']
    """
    if style == "nan":
        return "off"
    ink, ground = _INKS[style[0]]
    step = int(style[1:])
    return "off" if step <= ink else "mid" if step <= ground else "on"


def arranged(chart: Heatmap) -> Heatmap:
    """The same with its rows in the order in which they are drawn."""
    rows = list(range(len(chart.rows)))
    square = chart.rows == chart.columns
    if chart.groups:
        wanted = [name for members in chart.groups.values() for name in members]
        rows = [chart.rows.index(name) for name in wanted] + [
            place for place, name in enumerate(chart.rows) if name not in set(wanted)
        ]
    elif chart.cluster:
        rows = order_of(chart.values)
    columns = rows if square else list(range(len(chart.columns)))
    return Heatmap(
        title=chart.title,
        rows=tuple(chart.rows[i] for i in rows),
        columns=tuple(chart.columns[j] for j in columns),
        values=tuple(tuple(chart.values[i][j] for j in columns) for i in rows),
        caption=chart.caption,
        signed=chart.signed,
        top=chart.top,
        bottom=chart.bottom,
        groups=chart.groups,
        spec=chart.spec,
    )


@draw.register
def _heatmap(given: Heatmap) -> Drawing:
    chart = arranged(given)
    down, across = len(chart.rows), len(chart.columns)
    flat = [value for row in chart.values for value in row]
    finite = [abs(value) for value in flat if value is not None and math.isfinite(value)]
    top = chart.top or max(finite, default=1.0) or 1.0
    left = min(190.0, _room(chart.rows))
    # Numbers stand in the cells where there is room for them; from 60 columns on, names are told by pointing alone.
    named = across <= 60
    head = (min(130.0, 0.75 * _room(chart.columns)) + 6) if named else 8.0
    wide = max(4.0, min(64.0, (WIDTH - left - 60) / max(1, across)))
    high = max(4.0, min(14.0, wide)) if down > 60 else 26.0 if wide >= 20 else max(13.0, wide)
    longest = max((len(number(value, chart.spec)) for value in flat), default=0) if len(flat) <= TABLE else 99
    written = wide >= LETTER * longest + 6 and high >= 16
    marks: list[Mark] = []
    paths: dict[str, list[str]] = {}
    holes: list[str] = []
    for i, row in enumerate(chart.values):
        styles = [shade(value, top, chart.signed, chart.bottom) for value in row]
        j = 0
        while j < across:
            style, first = styles[j], j
            while j < across and styles[j] == style:
                j += 1
            if style == "nan":  # a pattern, which the grid would distort
                x, y, length = left + first * wide, head + i * high, (j - first) * wide
                holes.append(f"M{x:.5g} {y:.5g}h{length:.5g}v{high:.5g}h-{length:.5g}z")
            else:
                paths.setdefault(style, []).append(f"M{first} {i}h{j - first}")
    # A run of cells is a line one cell thick, on a grid whose unit is the cell: the shortest way to write many of them.
    grid = f"translate({left:.5g} {head + high / 2:.5g}) scale({wide:.5g} {high:.5g})"
    marks += [
        Mark(tag="path", at={"class": f"cell {style}", "d": "".join(parts), "transform": grid})
        for style, parts in sorted(paths.items())
    ]
    if holes:
        marks.append(Mark(tag="path", at={"class": "nan", "d": "".join(holes)}))
    step = max(1, math.ceil(11 / high))
    marks += [
        label(left - 6, head + (i + 0.5) * high + 4, name, anchor="end", style="name")
        for i, name in enumerate(chart.rows)
        if i % step == 0
    ]
    if named:
        step = max(1, math.ceil(13 / wide))
        marks += [
            label(left + (j + 0.5) * wide + 3, head - 6, name, style="name", turn=True)
            for j, name in enumerate(chart.columns)
            if j % step == 0
        ]
    if written:
        for i, row in enumerate(chart.values):
            for j, value in enumerate(row):
                ink = ink_on(shade(value, top, chart.signed, chart.bottom))
                text = number(value, chart.spec)
                marks.append(
                    Mark(
                        tag="text",
                        at={
                            "x": round(left + (j + 0.5) * wide, 1),
                            "y": round(head + (i + 0.5) * high + 4, 1),
                            "class": f"value {ink}",
                        },
                        text=text,
                    )
                )
    marks += _frames(chart, left, head, wide, high)
    low, high_end = min(finite_of(flat), default=0.0), max(finite_of(flat), default=0.0)
    empty = sum(1 for value in flat if value is None or not math.isfinite(value))
    unknown = f", {empty} of {len(flat)} of them no numbers" if empty else ""
    cells = {
        "x": round(left, 2),
        "y": round(head, 2),
        "w": round(wide, 4),
        "h": round(high, 4),
        "rows": [clean(name) for name in chart.rows],
        "columns": [] if chart.rows == chart.columns else [clean(name) for name in chart.columns],
        "values": [
            " ".join(number(value, chart.spec).replace(",", "").replace("−", "-") for value in row) for row in chart.values
        ],
    }
    marked = (
        [part * top for part in (-1, -0.5, 0, 0.5, 1)]
        if chart.signed
        else [chart.bottom + part * (top - chart.bottom) for part in (0, 0.25, 0.5, 0.75, 1)]
    )
    legend = [(shade(value, top, chart.signed, chart.bottom), number(value, ".3g")) for value in marked]
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: a heatmap of {down} rows and {across} columns, values from {number(low, '.3g')} to {number(high_end, '.3g')}{unknown}.",
        width=left + across * wide + (60 if named else 12),
        height=head + down * high + 6,
        marks=tuple(marks),
        caption=chart.caption,
        cells=cells,
        legend=(*legend, *((("nan", "no number"),) if empty else ())),
        table=_heat_table(chart) if len(flat) <= TABLE else None,
    )


def finite_of(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def _frames(chart: Heatmap, left: float, head: float, wide: float, high: float) -> list[Mark]:
    """A frame around each group of a square table."""
    if chart.rows != chart.columns:
        return []
    marks, at = [], 0
    for members in chart.groups.values():
        x, y, count = left + at * wide, head + at * high, len(members)
        place = {
            "x": round(x, 1),
            "y": round(y, 1),
            "width": round(count * wide, 1),
            "height": round(count * high, 1),
            "class": "frame",
        }
        marks.append(Mark(tag="rect", at=place))
        at += count
    return marks


def _heat_table(chart: Heatmap) -> Table:
    columns = (Column(name="", number=False), *(Column(name=name, spec=chart.spec) for name in chart.columns))
    return Table(
        title=chart.title, columns=columns, rows=tuple((name, *row) for name, row in zip(chart.rows, chart.values, strict=True))
    )


# Points.


@draw.register
def _scatter(chart: Scatter) -> Drawing:
    top, bottom, right = 26.0, 346.0, WIDTH - 30
    x = axis([point.x for point in chart.points], 64.0, right, log=chart.log_x)
    y = axis([*(point.y for point in chart.points), *chart.lines.values()], bottom, top)
    marks = [*_across(x, top, bottom, chart.x), *_upwards(y, 64.0, right, chart.y)]
    for name, value in chart.lines.items():
        marks += [
            _line(64.0, y.at(value), right, y.at(value), "rule"),
            label(right, y.at(value) - 5, name, anchor="end", style="tick"),
        ]
    points = [point for point in chart.points if math.isfinite(point.x) and math.isfinite(point.y)]
    front = sorted((point for point in points if point.front), key=lambda point: (point.x, point.y))
    best, joined = -math.inf, []  # with a third measure, some of the front lie behind the line that these two make
    for point in front:
        if point.y > best:
            best = point.y
            joined.append(point)
    if len(joined) > 1:
        steps = [f"{'M' if i == 0 else 'L'}{x.at(point.x)} {y.at(point.y)}" for i, point in enumerate(joined)]
        marks.append(Mark(tag="path", at={"class": "front", "d": "".join(steps)}))
    largest = max((point.size for point in points if point.size), default=0.0)
    for point in sorted(points, key=lambda point: point.front):
        radius = 5.0 if not point.size or not largest else 4.0 + 9.0 * math.sqrt(point.size / largest)
        style = ("dot front-dot" if point.front else "dot") + ("" if point.size else " hollow")
        place = {"cx": x.at(point.x), "cy": y.at(point.y), "r": round(radius, 1), "class": style}
        marks.append(Mark(tag="circle", at=place, tip=f"{clean(point.name)}: {point.said}" if point.said else clean(point.name)))
    taken: list[tuple[float, float, float]] = []  # left, right and baseline of the names that are written
    for point in sorted(front, key=lambda point: (point not in joined, -point.y)):
        long = LETTER * min(LABEL, len(clean(point.name)))
        start = x.at(point.x) - long < 40
        left, line = x.at(point.x) + 12 if start else x.at(point.x) - 10 - long, y.at(point.y) - 10
        if not any(abs(line - other[2]) < 14 and left < other[1] and other[0] < left + long for other in taken):
            taken.append((left, left + long, line))
            at, anchor = (left, "start") if start else (left + long, "end")
            marks.append(label(at, line, point.name, anchor=anchor, style="name over"))
    lost = len(chart.points) - len(points)
    said = f"; {lost} more have no number" if lost else ""
    named = ", ".join(clean(point.name, LABEL) for point in front[:12])
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: {len(points)} points{said}. Across: {chart.x}. Upwards: {chart.y}."
        + (f" On the front: {named}." if front else ""),
        width=WIDTH,
        height=bottom + 46,
        marks=tuple(marks),
        caption=chart.caption,
    )


@draw.register
def _spread(chart: Spread) -> Drawing:
    names = list(chart.rows)
    left, high, top = min(200.0, _room(names)), 30.0 if len(names) <= 60 else 18.0, 8.0
    right, bottom = WIDTH - 20, top + high * len(names)
    x = axis([value for row in chart.rows.values() for value in row.values()], left, right)
    marks = _across(x, top, bottom, chart.x)
    for i, (name, row) in enumerate(chart.rows.items()):
        middle = top + (i + 0.5) * high
        values = finite_of(list(row.values()))
        marks.append(label(left - 8, middle + 4, name, anchor="end", style="name"))
        marks += _violin(values, x, middle, 0.42 * high)
        marks += [
            Mark(
                tag="circle",
                at={"cx": x.at(value), "cy": round(middle, 1), "r": 3.5, "class": "dot"},
                tip=f"{clean(name)}, {clean(task)}: {number(value)}",
            )
            for task, value in row.items()
            if math.isfinite(value)
        ]
        if values:
            mean = sum(values) / len(values)
            marks.append(_line(x.at(mean), middle - 0.36 * high, x.at(mean), middle + 0.36 * high, "mean"))
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: for each of {len(names)} rows, its values as dots, their outline and their mean. Across: {chart.x}.",
        width=WIDTH,
        height=bottom + 46,
        marks=tuple(marks),
        caption=chart.caption,
    )


def _violin(values: Sequence[float], x: Axis, middle: float, half: float) -> list[Mark]:
    """The outline of how values are spread, from the least to the largest."""
    if len(set(values)) < 4:
        return []
    low, high = min(values), max(values)
    places = [low + (high - low) * k / 24 for k in range(25)]
    thick = spread_of(values, places)
    above = [f"{x.at(place)} {middle - half * one:.1f}" for place, one in zip(places, thick, strict=True)]
    below = [f"{x.at(place)} {middle + half * one:.1f}" for place, one in zip(places, thick, strict=True)][::-1]
    return [Mark(tag="path", at={"class": "violin", "d": f"M{'L'.join([*above, *below])}z"})]


@draw.register
def _bars(chart: Bars) -> Drawing:
    names = list(chart.rows)
    spans = {name: value if isinstance(value, Span) else Span(value=float(value)) for name, value in chart.rows.items()}
    left, high, top = min(200.0, _room(names)), 24.0, 8.0
    right, bottom = WIDTH - 70, top + high * len(names)
    x = axis(
        [one for span in spans.values() for one in (span.value, span.low, span.high) if one is not None], left, right, zero=True
    )
    marks = _across(x, top, bottom, chart.x)
    for i, (name, span) in enumerate(spans.items()):
        middle = top + (i + 0.5) * high
        marks.append(label(left - 8, middle + 4, name, anchor="end", style="name"))
        said = f"{clean(name)}: {shown(span, chart.spec)}" + (f", n = {span.n}" if span.n is not None else "")
        if math.isfinite(span.value):
            ends = sorted((x.at(0.0), x.at(span.value)))
            place = {
                "x": ends[0],
                "y": round(middle - 0.32 * high, 1),
                "width": round(max(1.0, ends[1] - ends[0]), 1),
                "height": round(0.64 * high, 1),
            }
            marks.append(Mark(tag="rect", at={**place, "class": "bar"}, tip=said))
        if span.low is not None and span.high is not None:
            marks.append(_line(x.at(span.low), middle, x.at(span.high), middle, "whisker"))
        end = max(
            one
            for one in (
                x.at(0.0),
                x.at(span.value) if math.isfinite(span.value) else 0.0,
                x.at(span.high) if span.high is not None else 0.0,
            )
        )
        marks.append(label(end + 6, middle + 4, number(span.value, chart.spec), style="tick"))
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: a bar for each of {len(names)}. "
        + "; ".join(f"{clean(name, LABEL)} {number(span.value, chart.spec)}" for name, span in list(spans.items())[:20])
        + ".",
        width=WIDTH,
        height=bottom + 46,
        marks=tuple(marks),
        caption=chart.caption,
    )


@draw.register
def _lines(chart: Lines) -> Drawing:
    top, bottom, right = 26.0, 300.0, WIDTH - 190
    longest = max((len(values) for values in chart.series.values()), default=1)
    x = axis([chart.start, chart.start + max(1, longest - 1)], 64.0, right, count=min(8, max(1, longest - 1)))
    y = axis(
        [one for values in chart.series.values() for one in finite_of(values)], bottom, top, log=chart.log_y, zero=not chart.log_y
    )
    marks = [*_across(x, top, bottom, chart.x), *_upwards(y, 64.0, right, chart.y)]
    ends: list[tuple[float, float, str]] = []
    dense = sum(len(values) for values in chart.series.values()) > 600
    for number_of, (name, values) in enumerate(chart.series.items()):
        style = f"s{number_of % 6}" + (" dashed" if number_of >= 6 else "")
        known = [
            (chart.start + i, value)
            for i, value in enumerate(values)
            if value is not None and math.isfinite(value) and (value > 0 or not chart.log_y)
        ]
        if not known:
            continue
        path = "".join(f"{'M' if i == 0 else 'L'}{x.at(at)} {y.at(value)}" for i, (at, value) in enumerate(known))
        marks.append(Mark(tag="path", at={"class": f"series {style}", "d": path}, tip=clean(name) if dense else ""))
        if not dense:
            marks += [
                Mark(
                    tag="circle",
                    at={"cx": x.at(at), "cy": y.at(value), "r": 3, "class": f"dot {style}"},
                    tip=f"{clean(name)}, {at}: {number(value)}",
                )
                for at, value in known
            ]
        ends.append((y.at(known[-1][1]), x.at(known[-1][0]), name))
    lowest = 0.0
    for height, at, name in sorted(ends) if len(ends) <= 16 else []:
        lowest = max(height, lowest + 13)
        marks.append(label(at + 8, lowest + 4, name, style="name"))
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: {len(chart.series)} series of up to {longest} values. Across: {chart.x}. Upwards: {chart.y}.",
        width=WIDTH,
        height=bottom + 46,
        marks=tuple(marks),
        caption=chart.caption,
    )


# Graphs.


@draw.register
def _graph(chart: Graph) -> Drawing:
    columns: dict[int, list[Node]] = {}
    for node in chart.nodes:
        columns.setdefault(node.column, []).append(node)
    tallest = max((len(nodes) for nodes in columns.values()), default=1)
    high, gap = (40.0, 12.0) if tallest <= 24 else (34.0, 4.0)
    wide, between = 200.0, 60.0
    height = tallest * (high + gap) + 16
    places: dict[str, tuple[float, float]] = {}
    marks: list[Mark] = []
    for turn, column in enumerate(sorted(columns)):
        nodes = columns[column]
        first = (height - len(nodes) * (high + gap) + gap) / 2
        for i, node in enumerate(nodes):
            places[node.key] = (8 + turn * (wide + between), first + i * (high + gap))
    for start, end, said in chart.edges:
        (x1, y1), (x2, y2) = places[start], places[end]
        x1, y1, y2 = x1 + wide, y1 + high / 2, y2 + high / 2
        bend = (x2 - x1) / 2
        path = f"M{x1:.5g} {y1:.5g}C{x1 + bend:.5g} {y1:.5g} {x2 - bend:.5g} {y2:.5g} {x2:.5g} {y2:.5g}"
        marks.append(Mark(tag="path", at={"class": "edge", "d": path}, tip=said))
    for node in chart.nodes:
        x, y = places[node.key]
        box = {"x": x, "y": round(y, 1), "width": wide, "height": high, "rx": 6, "class": f"node {node.tone}"}
        marks.append(Mark(tag="rect", at=box, tip=": ".join(clean(part) for part in (node.name, node.said) if part)))
        marks.append(label(x + 10, y + (high / 2 + 4 if not node.said else 16), node.name, style="node-name"))
        if node.said:
            marks.append(
                Mark(tag="text", at={"x": x + 10, "y": round(y + high - 8, 1), "class": "tick"}, text=clean(node.said, 30))
            )
    return Drawing(
        title=chart.title,
        summary=f"{chart.title}: a graph of {len(chart.nodes)} models and {len(chart.edges)} arrows. The table below says the same.",
        width=16 + len(columns) * wide + (len(columns) - 1) * between,
        height=height,
        marks=tuple(marks),
        caption=chart.caption,
    )
