"""What a page is made of, as plain data: who makes a page says what is to be seen, never how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from thetau.report.text import Value


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its heading, whether it holds names or numbers, how these are written (a format's spec), and a word on its meaning."""

    name: str
    number: bool = True
    spec: str = ".4g"
    meaning: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that sort by any column and are filtered by words. `best`: columns in which the largest value is marked."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    caption: str = ""
    best: tuple[int, ...] = ()
    kind: Literal["table"] = field(default="table", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """A few things and what they are."""

    pairs: tuple[tuple[str, Value], ...]
    kind: Literal["facts"] = field(default="facts", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Notes:
    """Sentences, one below the other: warnings, what is good, what a reader should know."""

    texts: tuple[str, ...]
    tone: Literal["bad", "warning", "good", "plain"] = "plain"
    kind: Literal["notes"] = field(default="notes", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Code:
    """A file or a command to copy."""

    text: str
    label: str
    kind: Literal["code"] = field(default="code", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """A number for each row and column; NaN and None are hatched.

    - `signed`: colours go both ways from 0. `top`: the value of the strongest colour; by default the largest there is. `bottom`: of the
      weakest, where they go one way.
    - `groups`: rows (and columns of the same names) that belong together, framed, in the order in which they are drawn.
    - `cluster`: rows that are alike are put beside one another, and columns too where they are the rows.
    - `spec`: how a value is written.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    caption: str = ""
    signed: bool = False
    top: float | None = None
    bottom: float = 0.0
    cluster: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spec: str = ".3g"
    kind: Literal["heatmap"] = field(default="heatmap", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """One point: where it lies, how large it is in relation to the others (None: hollow), and what is said of it."""

    name: str
    x: float
    y: float
    size: float | None = None
    front: bool = False
    said: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points over two axes; those of the front are joined and named. `lines`: values of y that are drawn across, by name."""

    title: str
    x: str
    y: str
    points: tuple[Point, ...]
    caption: str = ""
    log_x: bool = False
    lines: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["scatter"] = field(default="scatter", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Spread:
    """For each row its values by name as dots, the outline of how they are spread, and their mean."""

    title: str
    x: str
    rows: Mapping[str, Mapping[str, float]]
    caption: str = ""
    kind: Literal["spread"] = field(default="spread", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each name; with an interval where the value has one."""

    title: str
    x: str
    rows: Mapping[str, Any]  # name → Span or number
    caption: str = ""
    spec: str = ".3g"
    kind: Literal["bars"] = field(default="bars", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Lines:
    """Series over 1, 2, 3, …: spectra, eigenvalues, norms by layer."""

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[float | None, ...]]
    caption: str = ""
    start: int = 1
    log_y: bool = False
    kind: Literal["lines"] = field(default="lines", init=False)


@final
@dataclass(frozen=True, kw_only=True)
class Node:
    """A model in a graph of where models come from: its name, a second line, and how it stands out."""

    key: str
    name: str
    said: str = ""
    column: int = 0
    tone: Literal["base", "model", "made", "warning"] = "model"


@final
@dataclass(frozen=True, kw_only=True)
class Graph:
    """Which model was made of which. `edges`: from, to, and a word."""

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str, str], ...]
    caption: str = ""
    kind: Literal["graph"] = field(default="graph", init=False)


Chart = Heatmap | Scatter | Spread | Bars | Lines | Graph
Block = Table | Facts | Notes | Code | Chart


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page. `slug` is its anchor: a word of ours, never a name that was read."""

    slug: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report: what it is of, one sentence, and its parts. `about`: the kind of thing, such as `merged model`."""

    title: str
    about: str
    lead: str
    sections: tuple[Section, ...]
