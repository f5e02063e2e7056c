"""Running work over tensors: threads, bounded memory, results in order, progress."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch

from thetau.errors import ThetauError

Result = TypeVar("Result")


@runtime_checkable
class Progress(Protocol):
    """Told of work in bytes."""

    def begin(self, description: str, total: int) -> None: ...
    def advance(self, done: int) -> None: ...
    def end(self) -> None: ...


class Silent:
    """No progress bar."""

    def begin(self, description: str, total: int) -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Item:
    """Work on one tensor: its name, the bytes that it reads, the memory that it holds meanwhile."""

    name: str
    nbytes: int
    memory: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the work is run. No setting changes a bit of the result.

    - `workers`: threads, each with one BLAS thread; by default one a core.
    - `max_memory`: bytes that the tensors in flight may take together; by default half of the machine's memory.
    - `window`: elements read from each file at a time, for elementwise methods.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    max_memory: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    window: int = 1 << 20
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"`Engine(workers=...)` must be at least 1. Got {self.workers}.")
        if not isinstance(self.max_memory, int) or self.max_memory < 1:
            raise ValueError(f"`Engine(max_memory=...)` must be a positive number of bytes. Got {self.max_memory!r}.")
        if self.window < 1:
            raise ValueError(f"`Engine(window=...)` must be at least 1 element. Got {self.window}.")

    def check(self, items: Sequence[Item], what: str) -> None:
        """Refuse work that cannot fit, before it starts.

        Raises:
            ThetauError: one item alone needs more than `max_memory`.
        """
        largest = max(items, key=lambda item: item.memory, default=None)
        if largest is not None and largest.memory > self.max_memory:
            raise ThetauError(
                f"{what} needs {gigabytes(largest.memory)} for the tensor {largest.name!r}; the memory budget is {gigabytes(self.max_memory)}. "
                "Raise it (`--max-memory`) or choose a method that needs less."
            )

    def run(self, items: Sequence[Item], work: Callable[[Item], Result], description: str) -> Iterator[tuple[Item, Result]]:
        """Results in the order of the items. The first error stops everything and is raised."""
        self.check(items, description)
        self.progress.begin(description, sum(item.nbytes for item in items))
        gate = _Gate(self.max_memory)
        stop = threading.Event()

        def guarded(item: Item) -> Result:
            with gate.holding(item.memory):
                if stop.is_set():
                    raise _Stopped
                result = work(item)
                self.progress.advance(item.nbytes)
                return result

        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="thetau", initializer=torch.set_num_threads, initargs=(1,))
        pending: deque[tuple[Item, Future[Result]]] = deque()
        queue = iter(items)
        try:
            for item in queue:
                pending.append((item, pool.submit(guarded, item)))
                if len(pending) >= 2 * self.workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
            self.progress.end()


class _Stopped(Exception):
    """Another item failed."""


class _Gate:
    """Lets work in while the memory of all that is in flight stays below the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._free = threading.Condition()

    def holding(self, amount: int) -> _Held:
        return _Held(self, amount)

    def take(self, amount: int) -> None:
        with self._free:
            self._free.wait_for(lambda: self._used == 0 or self._used + amount <= self._limit)
            self._used += amount

    def give(self, amount: int) -> None:
        with self._free:
            self._used -= amount
            self._free.notify_all()


class _Held:
    def __init__(self, gate: _Gate, amount: int) -> None:
        self._gate, self._amount = gate, amount

    def __enter__(self) -> None:
        self._gate.take(self._amount)

    def __exit__(self, *_: object) -> None:
        self._gate.give(self._amount)


def gigabytes(count: float) -> str:
    """`"1.50 GB"`, or in MB or kB where it is less than a tenth of the larger unit."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
