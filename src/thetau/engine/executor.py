"""Running work over tensors: threads, bounded memory, results in order, progress."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch

from thetau.errors import ThetauError
from thetau.sums import fold_tree

Result = TypeVar("Result")
WIDEST = 16  # bytes of an element in flight: as stored, in float32, and as much again for what is made of it


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
    - `executor`: `local` threads, or a `ray` cluster whose machines see the same files under the same paths.
    - `address`: of the Ray cluster; by default the one that `RAY_ADDRESS` names, or else one that is started here.
    - `device`: where the matrix solvers of streaming reductions run: `auto` is the GPU where there is one. Only this setting may
      change last bits, since a GPU's products round otherwise.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    max_memory: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    window: int = 1 << 20
    progress: Progress = field(default_factory=Silent)
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"`Engine(workers=...)` must be at least 1. Got {self.workers}.")
        if not isinstance(self.max_memory, int) or self.max_memory < 1:
            raise ValueError(f"`Engine(max_memory=...)` must be a positive number of bytes. Got {self.max_memory!r}.")
        if self.window < 1:
            raise ValueError(f"`Engine(window=...)` must be at least 1 element. Got {self.window}.")
        if self.executor not in ("local", "ray"):
            raise ValueError(f'`Engine(executor=...)` must be "local" or "ray". Got {self.executor!r}.')
        try:
            kind = torch.device(self.device).type if self.device != "auto" else "cpu"
        except RuntimeError as error:
            raise ValueError(
                f'`Engine(device=...)` must be "auto", "cpu" or a device such as "cuda:0". Got {self.device!r}.'
            ) from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f'`Engine(device="{self.device}")`: no such device here. Leave it out to run on the processor.')

    def __reduce__(self) -> tuple[Any, ...]:
        """Engines travel without their progress bar, and run what they are given on the spot."""
        return _engine, (self.workers, self.max_memory, self.window, self.device)

    @cached_property
    def place(self) -> torch.device:
        """The device of the matrix solvers."""
        return (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else torch.device(self.device)
        )

    def reach(self, readers: int) -> int:
        """Elements that are read at a time from each of so many files: `window`, or less where the budget would not hold it."""
        fits = self.max_memory // (WIDEST * max(1, readers) * self.workers)
        return max(1, min(self.window, fits))

    def there(self) -> AbstractContextManager[Any]:
        """A context in which new tensors lie on that device."""
        return nullcontext() if self.place.type == "cpu" else torch.device(self.place)

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
        """Results in the order of the items. The first error stops everything and is raised.

        `work` may be sent to other processes; it lists in `guards` whose findings must come back from there.
        """
        self.check(items, description)
        if self.executor == "ray":
            from thetau.engine import cluster

            yield from cluster.run(self, items, work, description)
            return
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

    def reduce(
        self, items: Sequence[Item], work: Callable[[Item], Result], fold: Callable[[Result, Result], Result], description: str
    ) -> Any:
        """All results folded in a tree (`sums.fold_tree`); None where there are no items."""
        if self.executor == "ray":
            from thetau.engine import cluster

            self.check(items, description)
            return cluster.reduce(self, items, work, fold, description)
        return fold_tree((result for _, result in self.run(items, work, description)), fold)


def _engine(workers: int, max_memory: int, window: int, device: str) -> Engine:
    return Engine(workers=workers, max_memory=max_memory, window=window, device=device)


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
