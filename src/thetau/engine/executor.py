"""Running work over tensors: threads, bounded memory, results in order, progress."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from thetau.engine import cluster
from thetau.engine.work import Progress, Silent, Work, gigabytes
from thetau.errors import ThetauError
from thetau.plan import Step
from thetau.sums import fold_tree

WIDEST = 16  # bytes of an element in flight: as stored, in float32, and as much again for what is made of it


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
    - `tf32`: whether a GPU may round the factors of float32 products to 10 bits, which is several times as fast; the processor's are whole.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    max_memory: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    window: int = 1 << 20
    progress: Progress = field(default_factory=Silent)
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    device: str = "auto"
    tf32: bool = False

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
        return _engine, (self.workers, self.max_memory, self.window, self.device, self.tf32)

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

    @contextmanager
    def there(self) -> Iterator[None]:
        """A context in which new tensors lie on that device, and its products are as exact as asked."""
        with _ROUNDED if self.tf32 else nullcontext(), nullcontext() if self.place.type == "cpu" else torch.device(self.place):
            yield

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a matrix that goes to the device next; a GPU takes it from pinned memory while the next one is read."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.place.type == "cuda")

    def there_as_float32(self, matrix: Tensor) -> Tensor:
        """A matrix on the device. It travels as it is and is widened there."""
        return matrix.to(self.place, non_blocking=True).float().contiguous()

    def allow(self, memory: int, what: str) -> None:
        """Refuse work that cannot fit, before it starts.

        Raises:
            ThetauError: it needs more than `max_memory`.
        """
        if memory > self.max_memory:
            raise ThetauError(
                f"{what} needs {gigabytes(memory)}; the memory budget is {gigabytes(self.max_memory)}. "
                "Raise it (`--max-memory`) or choose a method that needs less."
            )

    def check(self, steps: Sequence[Step], what: str, held: int = 0) -> None:
        """The same of the largest step, beside what is held in memory meanwhile."""
        largest = max(steps, key=lambda step: step.memory, default=None)
        if largest is not None:
            beside = f" beside the {gigabytes(held)} that it keeps" if held else ""
            whole = f"{what} needs {gigabytes(largest.memory)} for the tensor {largest.name!r}{beside}"
            if largest.memory + held > self.max_memory:
                raise ThetauError(
                    f"{whole}; the memory budget is {gigabytes(self.max_memory)}. "
                    "Raise it (`--max-memory`) or choose a method that needs less."
                )

    def run(self, steps: Sequence[Step], work: Work, description: str, *, held: int = 0) -> Iterator[tuple[Step, Any]]:
        """Results in the order of the steps. The first error stops everything and is raised.

        `work` may be sent to other processes. `held` bytes are in memory beside the steps' own.
        """
        self.check(steps, description, held)
        if self.executor == "ray":
            yield from cluster.run(self.address, self.progress, steps, work, description)
            return
        self.progress.begin(description, sum(step.read for step in steps))
        gate = _Gate(self.max_memory - held)
        stop = threading.Event()

        def guarded(step: Step) -> Any:
            with gate.holding(step.memory):
                if stop.is_set():
                    raise _Stopped
                result = work(step)
                self.progress.advance(step.read)
                return result

        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="thetau", initializer=torch.set_num_threads, initargs=(1,))
        pending: deque[tuple[Step, Future[Any]]] = deque()
        queue = iter(steps)
        try:
            for step in queue:
                pending.append((step, pool.submit(guarded, step)))
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
        self, steps: Sequence[Step], work: Work, fold: Callable[[Any, Any], Any], description: str, *, held: int = 0
    ) -> Any:
        """All results folded in a tree (`sums.fold_tree`); None where there are no steps."""
        if self.executor == "ray":
            self.check(steps, description, held)
            return cluster.reduce(self.address, self.progress, steps, work, fold, description)
        return fold_tree((result for _, result in self.run(steps, work, description, held=held)), fold)


def _engine(workers: int, max_memory: int, window: int, device: str, tf32: bool) -> Engine:
    return Engine(workers=workers, max_memory=max_memory, window=window, device=device, tf32=tf32)


class _Rounded:
    """While some thread is inside, products are rounded; the setting is the whole process's."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_float32_matmul_precision(self._before)


_ROUNDED = _Rounded()


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
