"""A progress bar over bytes, with rate and time left."""

from __future__ import annotations

from typing import Any

from thetau.engine.work import Progress


def bar() -> Progress:
    """A bar on stderr; nothing where stderr is not a terminal."""
    return _Bar()


class _Bar:
    """One bar a pass."""

    def __init__(self) -> None:
        self._live: Any = None
        self._task: Any = None

    def begin(self, description: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._live = Bars(*columns, console=console, disable=not console.is_terminal)
        self._live.start()
        self._task = self._live.add_task(description, total=total)

    def advance(self, done: int) -> None:
        self._live.update(self._task, advance=done)

    def end(self) -> None:
        self._live.stop()
