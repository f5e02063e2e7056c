"""Tables on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(caption: str, *columns: str) -> Table:
    """A table with its caption below; the first column is text, the others are numbers."""
    from rich.table import Table

    made = Table(caption=caption, caption_justify="left")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def percent(value: float) -> str:
    """A share in percent, to one place."""
    return f"{100 * value:.1f}"


def show(made: Table) -> None:
    """On stdout. Figures are never cut: a narrow terminal may wrap the lines, a pipe gets them whole. The caption is no narrower than its words, however
    narrow the table is."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # names are text, whatever they hold
    console.width = max(console.width, console.measure(made, options=console.options.update(max_width=500)).maximum)
    caption, made.caption = made.caption, None
    console.print(made)
    made.caption = caption
    if caption:
        console.print(caption, style="italic", soft_wrap=True, highlight=False)
