"""Several processes or GPUs, through accelerate: each takes a share of every batch, gradients are summed.

    accelerate launch --num_processes 4 -m thetau finetune --model … --task … -o …

Under `accelerate launch` (or torchrun) the environment says how many there are; otherwise there is one and accelerate is not needed.
The weights are those of one process up to rounding where there is no dropout; with it, each process draws masks of its own, and the
result depends on their number. All see the same files: the first one writes, each reads the state of an unfinished run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from thetau.errors import DataError, OutputError

# Entries that are summed at once: few enough to be little beside the model, enough that a message's latency is nothing.
_BUCKET = 1 << 24


@final
class Processes:
    """The processes of a run: which one this is, and sums over all of them.

    What sums, gathers or waits must be called by every process. Raises `DataError` where another one has ended.
    """

    def __init__(self, device: str | None) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerator: Any = None
        if self.count > 1:
            if "RANK" not in os.environ:
                raise DataError(
                    f"the environment says WORLD_SIZE={self.count}, but not which of them this process is (RANK). "
                    "Start the processes with `accelerate launch` or torchrun, or unset WORLD_SIZE."
                )
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise DataError(f"{self.count} processes need accelerate. Install it: pip install 'thetau[models]'") from error
            # What the launcher was configured to do for other trainers' loops is not for this one: precision is the config's.
            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
        self.rank = 0 if self._accelerator is None else int(self._accelerator.process_index)
        self.device = self._place(device)

    def _place(self, device: str | None) -> torch.device:
        if self._accelerator is not None:
            place: torch.device = self._accelerator.device
            return place
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"device {device!r} cannot be used ({reason}). Name another one, such as cpu.") from error

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's part of a batch."""
        return slice(self.rank, None, self.count)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over processes, in place, in float32."""
        if self._accelerator is None:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
            with self._together():
                total = self._accelerator.reduce(flat, reduction="sum")
            for tensor, part in zip(bucket, total.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each process, by rank, on the CPU. All have one shape and dtype."""
        if self._accelerator is None:
            return [tensor.cpu()]
        with self._together():
            found: Tensor = self._accelerator.gather(tensor[None].to(self.device))
        return list(found.cpu().unbind())

    def once(self, work: Callable[..., object], *given: object) -> None:
        """Let the first process do `work(*given)` while the others wait; where it fails, all do.

        Raises what `work` raises, in the first process; `OutputError` in the others.
        """
        failure: Exception | None = None
        if self.first:
            try:
                work(*given)
            except Exception as error:
                failure = error
        failed = torch.tensor([float(failure is not None)], device=self.device)
        self.sum([failed])
        if failure is not None:
            raise failure
        if failed.item():
            raise OutputError("the first process could not write what it has to; its own message says why.")

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DataError(f"process {self.rank} of {self.count}: another one has ended; its own message says why.") from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
