"""Several processes or GPUs, through accelerate: each takes a share of every batch, gradients are summed.

Under `accelerate launch` (or torchrun) the environment says how many there are; otherwise there is one and accelerate is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from thetau.errors import DataError


@final
class Processes:
    """The processes of a run: which one this is, and sums over all of them."""

    def __init__(self, device: str | None) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise DataError(f"{self.count} processes need accelerate. Install it: pip install 'thetau[models]'") from error
            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
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
        """Replace each tensor by its sum over processes, in place."""
        if self._accelerator is None:
            return
        listed = list(tensors)
        flat = torch.cat([tensor.reshape(-1).float() for tensor in listed])
        total = self._accelerator.reduce(flat, reduction="sum")
        for tensor, part in zip(listed, total.split([tensor.numel() for tensor in listed]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
