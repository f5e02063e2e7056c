"""Tables on the screen, and the values of a grid on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def parse_grid(given: str | None) -> tuple[float, ...] | None:
    """The values of `--alphas`. Raises `RecipeError`."""
    from math import isfinite

    from thetau.errors import RecipeError

    if given is None:
        return None
    try:
        values = tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise RecipeError([f"--alphas must be numbers with commas between them. Got {given!r}."], "options") from error
    if not all(map(isfinite, values)):
        raise RecipeError([f"--alphas must be finite. Got {given!r}."], "options")
    return values


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
