"""A progress bar with rate and time left, for runs that a person waits for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from thetau.pace import Plain, watched
from thetau.pace import console as terminal


@final
@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of progress. `advance` moves it by some units of work and may change its text."""

    progress: Any
    row: Any
    total: int | float
    plain: Plain | None = None

    def advance(self, units: int | float, text: str | None = None) -> None:
        """Count `units` as done."""
        self.progress.update(self.row, advance=units, **({} if text is None else {"description": text}))
        if self.plain is not None:
            self.plain.advance(units, text)

    def finish(self, text: str) -> None:
        """All the work is done, however it was estimated."""
        self.progress.update(self.row, completed=self.total, description=text)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(line, highlight=False)


def is_first() -> bool:
    """Whether this process speaks for the run: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bar(text: str, total: int | float, unit: str, console: Any = None) -> Iterator[Bar]:
    """A bar on stderr (or `console`) while the block runs, a plain line now and then where that is no terminal, and of several processes by
    the first alone. `unit` names what is counted in the rate; an empty one shows percent. Work inside is not told apart.
    """
    from rich.progress import Progress

    console = console or terminal()
    shown, plain = console.is_terminal and is_first(), None
    if not console.is_terminal and is_first():
        plain = Plain(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        plain.begin(text, total, unit)
    with watched(None), Progress(*columns_of(unit), console=console, speed_estimate_period=120, disable=not shown) as progress:
        yield Bar(progress=progress, row=progress.add_task(text, total=total), total=total, plain=plain)


def columns_of(unit: str) -> list[Any]:
    """The columns of a bar that counts in `unit`; an empty one shows percent."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(
                f"{task.speed:.3g} {unit}/s"
                if task.speed and task.speed < 100
                else f"{task.speed:.0f} {unit}/s"
                if task.speed
                else f"– {unit}/s",
                style="progress.data.speed",
            )

    counted = [MofNCompleteColumn(), Rate(table_column=Column(no_wrap=True))] if unit else [TaskProgressColumn()]
    return [TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn(compact=True), TextColumn("left")]
