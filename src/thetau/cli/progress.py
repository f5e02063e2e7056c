"""What a command says while it works: a bar with rate and time left on a terminal, a plain line now and then elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, final

from thetau.engine.work import Progress
from thetau.pace import Plain, Watcher, console

SHORT = 1.0  # seconds of work that are not worth a bar


def bar() -> Progress:
    """The engine's work, in bytes."""
    return _Bytes()


def watcher() -> Watcher:
    """All other work."""
    return _Bar() if sys.stderr.isatty() else Plain(say)


def say(line: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@final
class _Bar:
    """A bar that is gone when the work is done, below one of the steps where the work is one of several; none for work that takes no time."""

    def __init__(self) -> None:
        self._live: Any = None
        self._inner: Any = None
        self._task: Any = None
        self._waiting: tuple[str, float, str] | None = None
        self._done, self._start = 0.0, 0.0
        self._outer: Any = None
        self._row: Any = None
        self._what, self._steps, self._place, self._entered = "", 0, 0, 0.0

    def begin(self, text: str, total: float, unit: str) -> None:
        self._waiting, self._done, self._start = (text, total, unit), 0.0, time.monotonic()

    def advance(self, done: float) -> None:
        self._done += done
        if self._inner is not None:
            self._inner.update(self._task, completed=self._done)
        elif self._waiting is not None and time.monotonic() - self._start > SHORT:
            self._show(*self._waiting)

    def _show(self, text: str, total: float, unit: str) -> None:
        from rich.progress import Progress as Bars

        from thetau.finetune.progress import columns_of

        self._inner = Bars(*columns_of(unit), console=console(), speed_estimate_period=120)
        self._task = self._inner.add_task(text, total=total, completed=self._done)
        self._draw()

    def _draw(self) -> None:
        """Both bars, or the one that there is; nothing where there is none."""
        from rich.console import Group
        from rich.live import Live

        bars = [one for one in (self._outer, self._inner) if one is not None]
        if bars and self._live is None:
            self._live = Live(console=console(), transient=True, refresh_per_second=4)
            self._live.start()
        if self._live is not None:
            self._live.update(Group(*bars), refresh=True)
            if not bars:
                self._live.stop()
                self._live = None

    def end(self) -> None:
        self._waiting = None
        if self._inner is not None:
            self._inner = None
            self._draw()

    def enter(self, what: str, total: int) -> None:
        self._what, self._steps, self._place, self._entered = what, total, 0, time.monotonic()

    def step(self, text: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._place += 1
        if self._outer is None and time.monotonic() - self._entered > SHORT:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
            )
            self._outer = Bars(*columns, console=console(), speed_estimate_period=3600)
            self._row = self._outer.add_task(self._what, total=self._steps)
            self._draw()
        if self._outer is not None:
            done, total = self._place - 1, max(self._steps, self._place)
            self._outer.update(self._row, completed=done, total=total, description=f"{self._what} {self._place}: {text}")

    def leave(self) -> None:
        if self._outer is not None:
            self._outer = None
            self._draw()


@final
class _Bytes:
    """One bar a pass over tensors."""

    def __init__(self) -> None:
        self._live: Any = None
        self._task: Any = None
        self._plain: Plain | None = None

    def begin(self, description: str, total: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        terminal = console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        if not terminal.is_terminal:
            self._plain = self._plain or Plain(say)
            self._plain.begin(description, total, "B")
        self._live = Bars(*columns, console=terminal, disable=not terminal.is_terminal)
        self._live.start()
        self._task = self._live.add_task(description, total=total)

    def advance(self, done: int) -> None:
        self._live.update(self._task, advance=done)
        if self._plain is not None:
            self._plain.advance(done)

    def end(self) -> None:
        self._live.stop()
