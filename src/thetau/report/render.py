"""From a page as data to one HTML file: nothing outside it is asked for, and nothing in it but our own script can run.

The file says so itself: its Content-Security-Policy allows one script and one style sheet by their hashes, and no requests at all. What was
read from a checkpoint is text that the templates escape, or JSON in which `<`, `>` and `&` are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from thetau._version import __version__
from thetau.checkpoint.disk import write_bytes
from thetau.errors import OutputError
from thetau.export.card import REPORT as REPORT
from thetau.report.blocks import Block, Heatmap, Page, Table
from thetau.report.drawing import STEPS, draw
from thetau.report.text import Span, clean, number, shown, sort_key

LIMIT = 2_000_000  # bytes of a page
WIDEST = 40  # characters of a column of names
# Rows of each table, and of each heatmap, until the page is small enough: heatmaps are the last to be cut.
_SIZES = ((5_000, 400), (1_500, 400), (400, 400), (100, 400), (400, 120), (100, 40))


def render(page: Page) -> str:
    """The page as HTML, below `LIMIT`: tables that are too long for it end early and say so.

    Raises:
        OutputError: jinja2 is not installed, or the page is too large even with short tables.
    """
    template = _template()
    size = 0
    for rows, cells in _SIZES:
        text = str(template.render(page=_shortened(page, rows, cells), version=__version__, **_assets()))
        size = len(text.encode("utf-8"))
        if size <= LIMIT:
            return text
    raise OutputError(
        f"the report of {page.title} takes {size / 1e6:.1f} MB even with tables of {_SIZES[-1][0]} rows; {LIMIT / 1e6:.0f} MB is the most. "
        "Report on fewer models at once."
    )


def check() -> None:
    """Refuse before long work what could not be rendered after it. Raises `OutputError`: jinja2 is not installed."""
    _environment()


def write(page: Page, path: Path) -> int:
    """Write the page, whole or not at all; its bytes are counted. Raises `OutputError`."""
    content = render(page).encode("utf-8")
    write_bytes(path, content)
    return len(content)


def _shortened(page: Page, rows: int, cells: int) -> Page:
    return replace(
        page,
        sections=tuple(
            replace(section, blocks=tuple(_short(block, rows, cells) for block in section.blocks)) for section in page.sections
        ),
    )


def _short(block: Block, rows: int, most: int) -> Block:
    if isinstance(block, Table) and len(block.rows) > rows:
        caption = f"The first {rows:,} of {len(block.rows):,} rows; the others would make the page too large. {block.caption}"
        return replace(block, rows=block.rows[:rows], caption=caption.strip())
    if isinstance(block, Heatmap) and max(len(block.rows), len(block.columns)) > most:
        caption = f"The first {most} of {max(len(block.rows), len(block.columns)):,}; the others would make the page too large. {block.caption}"
        return replace(
            block,
            rows=block.rows[:most],
            columns=block.columns[:most],
            values=tuple(row[:most] for row in block.values[:most]),
            groups={},
            cluster=True,
            caption=caption.strip(),
        )
    return block


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise OutputError("reports need jinja2. Install it with `pip install 'thetau[report]'`.") from error
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("thetau.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value, 1 << 20) if type(value) is str else value,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.filters["prose"] = prose
    made.globals |= {
        "draw": draw,
        "number": number,
        "shown": shown,
        "sort_key": sort_key,
        "best_of": best_of,
        "width_of": width_of,
        "plain_number": plain_number,
    }
    return made


def prose(text: str) -> Any:
    """A sentence in which what stands between backticks is code; everything else of it is text.

    Examples:
        >>> str(prose("`thetau <x>` & more"))
        '<code>thetau &lt;x&gt;</code> &amp; more'
    """
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`\n]{1,300})`", r"<code>\1</code>", str(escape(clean(text, 1 << 20)))))


def best_of(table: Table) -> dict[int, float]:
    """The largest number of each column whose largest is to be marked, of rows that have one."""
    values = {column: [plain_number(row[column]) for row in table.rows] for column in table.best}
    return {column: max(known) for column, found in values.items() if (known := [value for value in found if value == value])}


def width_of(table: Table, column: int) -> int:
    """Characters that a column of names may not be narrower than: those of its longest, up to `WIDEST`."""
    return max((min(WIDEST, len(shown(row[column]))) for row in table.rows), default=1) or 1


def plain_number(value: Any) -> float:
    """A cell's number; NaN where it has none."""
    one = value.value if isinstance(value, Span) else value
    return float(one) if isinstance(one, int | float) else float("nan")


def _template() -> Any:
    return _environment().get_template("page.html")


@lru_cache(maxsize=1)
def _assets() -> dict[str, str]:
    """Script and style sheet, and the hashes by which the page allows them."""
    from markupsafe import Markup

    environment = _environment()
    script, style = (environment.loader.get_source(environment, name)[0].strip() for name in ("report.js", "report.css"))
    style += "\n" + "\n".join([*_shades(), *(f"th.c{count}{{min-width:{count + 4}ch}}" for count in range(1, WIDEST + 1))])
    return {"script": Markup(script), "style": Markup(style), "script_hash": _hash(script), "style_hash": _hash(style)}


def _shades() -> list[str]:
    """The colours of heatmaps, from the page's own ground to a strong colour on either side."""
    return [
        f".{side}{step}{{--shade:color-mix(in oklab,var(--{name}) {round(100 * step / STEPS)}%,var(--zero));fill:var(--shade);stroke:var(--shade)}}"
        for side, name in (("p", "high"), ("m", "low"))
        for step in range(STEPS + 1)
    ]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
