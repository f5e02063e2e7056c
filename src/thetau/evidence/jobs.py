"""Several processes for a sum over examples: each takes a share of the batches, and the first one adds up what they leave on disk.

What another process is given are names and files alone; it opens the model and the data itself. Its share is every so many-th batch, from the
shortest examples to the longest, so that all have as much to do. A share that is there is not summed again, so that a collection which was cut off
goes on in each of its processes. The shares are added in their order: the same number of processes gives the same bits, another number gives the same
values up to the order of the sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess as Process
from pathlib import Path
from typing import Any, Protocol, cast, final

import torch
from safetensors import safe_open
from torch import Tensor

from thetau.errors import DataError
from thetau.finetune.state import StateFolder
from thetau.models import Encoder
from thetau.tasks import Task
from thetau.tasks.head import AnyHead

Tick = Callable[[int], None]


@final
@dataclass(frozen=True, kw_only=True)
class Opened:
    """What evidence is collected of: the encoder with its base's weights, the task, the fine-tuned weights, and the head where it is not the frozen one."""

    encoder: Encoder
    task: Task
    weights: Mapping[str, Tensor]
    head: AnyHead | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """A process's part of a collection: every `count`-th batch from the `number`-th on, and its part of the memory."""

    number: int = 0
    count: int = 1

    def of(self, batches: list[list[int]]) -> list[list[int]]:
        """Its batches."""
        return batches[self.number :: self.count]

    def state(self, whole: StateFolder) -> StateFolder:
        """Where its own state and its sums lie: inside that of the whole collection, since both are removed together."""
        return StateFolder(folder=whole.folder / f"share-{self.number}-of-{self.count}", key=whole.key)

    def device(self, named: str | None) -> torch.device | None:
        """Where it runs: of several GPUs that were not told apart each share takes its own."""
        if named is None:
            return None
        if named == "cuda" and torch.cuda.device_count() > 1:
            named = f"cuda:{self.number % torch.cuda.device_count()}"
        try:
            return torch.empty(0, device=named).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"device {named!r} cannot be used ({reason}). Name another one, such as cpu.") from error


ALL = Share()


class Sums(Protocol):
    """The sums of a share, whatever they are of. A dataclass of plain values, since it is sent to other processes."""

    def summed(self, opened: Opened, share: Share, state: StateFolder, tick: Tick | None) -> None:
        """Leave the share's sums in the folder of `state`, unless they are there."""


@final
@dataclass(frozen=True, kw_only=True)
class Jobs:
    """How many processes share a collection; `open` opens the same model and task in each, and can be sent to it.

    A script of one's own starts them under `if __name__ == "__main__":`, since each of them imports it.
    """

    count: int
    open: Callable[[], Opened]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"jobs must be at least 1. Got {self.count}.")


@contextmanager
def running(opened: Opened, origin: str, device: torch.device | None = None) -> Iterator[None]:
    """While it lasts, the encoder runs with the fine-tuned weights, where it is asked to; the base's come back. `origin` is what errors call them.

    Raises `AlignmentError`: the weights are not the encoder's.
    """
    encoder = opened.encoder
    home, before = next(encoder.module.parameters()).device, encoder.weights(exact=True)
    encoder.load(opened.weights, origin)
    encoder.module.to(device or home)
    try:
        yield
    finally:
        encoder.module.to(home)
        encoder.load(before, "the base")


def run_shares(jobs: Jobs, sums: Sums, opened: Opened, state: StateFolder, tick: Tick | None) -> list[Path]:
    """Sum all shares, the first one here, on threads that the processes divide between them; the shares' folders, in their order.

    Raises:
        DataError: what went wrong in another process, with the task and its share; or that it was ended from outside.
    """
    shares = [Share(number=number, count=jobs.count) for number in range(jobs.count)]
    threads = torch.get_num_threads()
    with _others(jobs, sums, state, shares[1:], opened.task.name, tick) as listen:

        def told(units: int) -> None:
            if tick is not None:
                tick(units)
            listen(0)

        try:
            torch.set_num_threads(min(threads, threads_each(jobs.count)))
            sums.summed(opened, shares[0], shares[0].state(state), told)
        finally:
            torch.set_num_threads(threads)
        listen(None)
    return [share.state(state).folder for share in shares]


@contextmanager
def _others(
    jobs: Jobs, sums: Sums, state: StateFolder, shares: list[Share], task: str, tick: Tick | None
) -> Iterator[Callable[[float | None], None]]:
    """The other processes at work; what is given hears them for so many seconds, or until they have ended. All are ended where one fails."""
    running: dict[Any, tuple[str, Process]] = {}

    def hear(pipe: Connection) -> None:
        name, process = running[pipe]
        try:
            said = pipe.recv()
        except EOFError:
            process.join()
            raise DataError(
                f"{name} was ended from outside (exit code {process.exitcode}), as a system does that runs out of memory. What was "
                "summed is kept: run it again, with fewer --jobs if need be."
            ) from None
        if isinstance(said, int):
            if tick is not None:
                tick(said)
            return
        del running[pipe]
        process.join()
        if said is not None:
            raise DataError(f"{name}: {said}")

    def listen(seconds: float | None) -> None:
        while running and (ready := wait(list(running), seconds)):
            for pipe in ready:
                hear(cast(Connection, pipe))

    try:
        for share in shares:
            mine, theirs = Pipe(duplex=False)
            process = Process(target=_help, args=(jobs, sums, state, share, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is heard
            running[mine] = (f"task {task!r}: process {share.number + 1} of {share.count}", process)
        yield listen
    finally:  # none is left but where something failed
        for _, process in running.values():
            process.terminate()
            process.join()


def _help(jobs: Jobs, sums: Sums, state: StateFolder, share: Share, pipe: Connection) -> None:
    """What another process does: its share. It says how many examples it has done, and at last None, or what went wrong."""
    torch.set_num_threads(threads_each(jobs.count))
    with suppress(BrokenPipeError, KeyboardInterrupt):  # the first process has ended: so does this one
        try:
            sums.summed(jobs.open(), share, share.state(state), pipe.send)
        except BrokenPipeError:
            raise
        except Exception as error:  # of whatever kind: the first process says it
            pipe.send(" ".join(str(error).split()) or type(error).__name__)
        else:
            pipe.send(None)
    pipe.close()


def added(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name → the sum over the files of what they hold under it, one tensor at a time."""
    with ExitStack() as stack:
        first, *others = (stack.enter_context(safe_open(path, framework="pt")) for path in files)
        for name in first.keys():  # noqa: SIM118  it is no mapping
            total: Tensor = first.get_tensor(name)
            for file in others:
                total = total + file.get_tensor(name)
            yield name, total


def threads_each(jobs: int) -> int:
    """Of each of several processes that share this one's processors."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)
