"""Long work says how far it is. Who does it counts; who runs a command watches; a library's use is silent, since nobody watches there.

with doing("head of sst2"), counted(len(examples), "examples") as advance:
    for example in examples:
        ...
        advance(1)

Several works that belong to a larger one are its steps:

for task in each("task", tasks):
    ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, final

FIRST, EVERY = 10.0, 60.0  # seconds until the first plain line, and between two of them
Advance = Callable[[float], None]
T = TypeVar("T")


class Watcher(Protocol):
    """Told of one work at a time, and of which step of a larger one it is a part."""

    def begin(self, text: str, total: float, unit: str) -> None:
        """Work of so many units begins; without a unit they mean nothing but a share."""

    def advance(self, done: float) -> None:
        """So many more are done."""

    def end(self) -> None:
        """It has ended, well or not."""

    def enter(self, what: str, total: int) -> None:
        """A larger work of so many steps begins; a step is called `what`."""

    def step(self, text: str) -> None:
        """The next step begins."""

    def leave(self) -> None:
        """The last one has ended, well or not."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_TEXT: ContextVar[str] = ContextVar("text", default="working")
_STEPPING: ContextVar[bool] = ContextVar("stepping", default=False)


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Work inside is told to `watcher`; to nobody where it is None."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def console() -> Any:
    """rich's, on stderr, with bars whose words are in the terminal's own colour: cyan and yellow cannot be read on white."""
    from rich.console import Console
    from rich.theme import Theme

    words = ("remaining", "data.speed", "download", "percentage", "elapsed", "filesize", "filesize.total")
    return Console(stderr=True, theme=Theme({f"progress.{word}": "default" for word in words}))


def silence() -> None:
    """Nobody watches from here on."""
    _WATCHER.set(None)


@contextmanager
def doing(text: str) -> Iterator[None]:
    """What the work inside is called."""
    token = _TEXT.set(text)
    try:
        yield
    finally:
        _TEXT.reset(token)


@contextmanager
def counted(total: float, unit: str = "") -> Iterator[Advance]:
    """Work of so many units, under the name that `doing` gave it; what it does inside is a part of it, and is not told apart.

    Examples:
        >>> told = Plain(print, clock=iter([0.0, 0.0, 20.0]).__next__)
        >>> with watched(told), doing("head of sst2"), counted(400, "examples") as advance:
        ...     advance(100)
        head of sst2: 25 % (5 examples/s, 1 min left)
    """
    watcher = _WATCHER.get()
    if watcher is None:
        yield lambda done: None
        return
    watcher.begin(_TEXT.get(), total, unit)
    with watched(None):
        try:
            yield watcher.advance
        finally:
            watcher.end()


@contextmanager
def counted_by(tick: Callable[[int], None] | None, total: float, unit: str = "") -> Iterator[Callable[[int], None]]:
    """As `counted`, but told to `tick` where one is given, in the place of whoever watches."""
    if tick is None:
        with counted(total, unit) as advance:
            yield advance
        return
    with watched(None):
        yield tick


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A larger work of about `total` steps, each called `what`; call what is given with a word on each step as it begins. What work a step does is told
    beside it. Steps inside of steps are a part of them, and are not told apart.

    Examples:
        >>> told = Plain(print, clock=iter([0.0, 0.0, 1.0, 2.0, 40.0, 50.0]).__next__)
        >>> with watched(told), steps("row", 3) as step:
        ...     step("density=0.1")
        ...     step("density=0.2")
        ...     with doing("evaluate on sst2"), counted(400, "examples") as advance:
        ...         advance(100)
        row 2 of 3, density=0.2: evaluate on sst2: 25 % (10 examples/s, 30 s left); about 2 min left in all
    """
    watcher = _WATCHER.get()
    if watcher is None or _STEPPING.get():
        yield lambda text: None
        return
    watcher.enter(what, total)
    token = _STEPPING.set(True)
    try:
        yield watcher.step
    finally:
        _STEPPING.reset(token)
        watcher.leave()


def each(what: str, items: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
    """The items one after the other, each as a step of a larger work.

    Examples:
        >>> list(each("task", ["sst2", "mnli"]))
        ['sst2', 'mnli']
    """
    with steps(what, len(items)) as step:
        for item in items:
            step(name(item))
            yield item


@final
class Plain:
    """A line now and then, for outputs that are no terminal: the first after `FIRST` seconds, then one in `EVERY`, over all work of a command."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._due = clock() + FIRST
        self._text, self._unit, self._total, self._done, self._start = "", "", 0.0, 0.0, 0.0
        self._what, self._steps, self._place, self._step, self._entered = "", 0, 0, "", 0.0

    def begin(self, text: str, total: float, unit: str) -> None:
        """Work of so many units begins."""
        self._text, self._unit, self._total, self._done, self._start = text, unit, total, 0.0, self._clock()

    def advance(self, done: float, text: str | None = None) -> None:
        """So many more are done; says so where it is time to."""
        self._done += done
        self._text = text or self._text
        now = self._clock()
        if now >= self._due:
            self._due = now + EVERY
            self._say(self.line(now - self._start, now))

    def end(self) -> None:
        """Nothing is said of the end: what was made is."""
        self._text = ""

    def enter(self, what: str, total: int) -> None:
        """A larger work of so many steps begins."""
        self._what, self._steps, self._place, self._step, self._entered = what, total, 0, "", self._clock()

    def step(self, text: str) -> None:
        """The next step begins; says so where it is time to."""
        self._place, self._step = self._place + 1, text
        now = self._clock()
        if now >= self._due:
            self._due = now + EVERY
            self._say(self.line(0.0, now))

    def leave(self) -> None:
        """The larger work has ended."""
        self._what = ""

    def line(self, seconds: float, now: float = 0.0) -> str:
        """How far it is after so many seconds of this work, and at this time of the larger one."""
        share = min(1.0, self._done / self._total) if self._total > 0 else 0.0
        rate = self._done / seconds if seconds > 0 else 0.0
        told = [f"{_amount(rate, self._unit)}/s"] if self._unit and rate else []
        told += [f"{lasting((self._total - self._done) / rate)} left"] if rate and self._total > self._done else []
        inner = f"{self._text}: {100 * share:.0f} %" + (f" ({', '.join(told)})" if told else "") if self._text else ""
        if not self._what:
            return inner
        count = max(self._steps, self._place)
        line = (
            f"{self._what} {self._place} of {count}" + (f", {self._step}" if self._step else "") + (f": {inner}" if inner else "")
        )
        if self._place < 2:
            return line
        each = (now - self._entered) / (self._place - 1)  # what is done of this step is part of it
        return f"{line}; about {lasting(each * (count - self._place + 1))} left in all"


def _amount(value: float, unit: str) -> str:
    if unit != "B":
        return f"{value:.3g} {unit}"
    name, size = next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= size), ("B", 1.0))
    return f"{value / size:.3g} {name}"


def lasting(seconds: float) -> str:
    """A time as people say it.

    Examples:
        >>> lasting(7), lasting(100), lasting(9000)
        ('7 s', '2 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
