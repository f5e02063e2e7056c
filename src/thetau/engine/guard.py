"""What is noticed while task vectors are read for the first time: values that are not numbers, and vectors too long for this base."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thetau.checkpoint import Source
from thetau.engine.window import Reading, Window
from thetau.errors import CheckpointError
from thetau.vectors import Combination

FAR = 0.3  # ‖τ‖ / ‖θ₀‖; fine-tuning gives 0.001 to 0.1, another initialisation about 1.4


@dataclass
class Guard:
    """Squared norms of each task vector and of the base, summed over all blocks that were read."""

    tasks: Sequence[str]
    squares: list[float] = field(default_factory=list)
    base: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.squares = [0.0] * len(self.tasks)

    def look(
        self,
        stack: Tensor,
        reading: Reading,
        combinations: Sequence[Combination],
        window: Window,
        start: int,
        stop: int,
        reference: Source | None,
    ) -> None:
        """Check a block and add its norms.

        Raises:
            CheckpointError: a value is NaN or infinite; names the file, the tensor and how many.
        """
        found = [_square(rows) for rows in stack]
        if not all(map(math.isfinite, found)):
            for combination in combinations:
                for _, source, name in reading.terms(combination, window.name):
                    refuse_nonfinite(source, name)
        base = 0.0
        if reference is not None and window.name in reading.alignment.maps.get(reference.key, {}):
            base = _square(window.rows(reference, reading.alignment.maps[reference.key][window.name], start, stop).float())
        with self._lock:
            for task, square in enumerate(found):
                self.squares[task] += square
            self.base += base

    def add(self, task: int, other: Guard) -> None:
        """Add what was seen of one task alone."""
        with self._lock:
            self.squares[task] += other.squares[0]
            self.base += other.base

    def warnings(self, base_label: str) -> list[str]:
        """A sentence for each task whose vector is far longer than fine-tuning makes it."""
        if not self.base:
            return []
        ratios = [
            (task, math.sqrt(square), math.sqrt(square / self.base))
            for task, square in zip(self.tasks, self.squares, strict=True)
        ]
        return [
            f"{task}: ‖τ‖ = {norm:.4g} is {ratio:.2f} of the base's norm {math.sqrt(self.base):.4g}; fine-tuning gives less than {FAR:g}. "
            f"{base_label} is probably not the model that it was fine-tuned from."
            for task, norm, ratio in ratios
            if ratio > FAR
        ]

    def notes(self) -> list[str]:
        """A sentence for each task whose vector is all zero."""
        return [
            f"{task}: its task vector is all zero." for task, square in zip(self.tasks, self.squares, strict=True) if square == 0
        ]


def refuse_nonfinite(source: Source, name: str) -> None:
    """Raise if this tensor of this source holds NaN or infinite values."""
    values = source.read(name)
    if not values.dtype.is_floating_point:
        return
    values = values.float() if values.dtype.itemsize < 4 else values
    nan, inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    if nan or inf:
        file = source.specs[name].file
        raise CheckpointError(
            f"{file}: tensor {name!r} holds {nan} NaN and {inf} infinite values of {values.numel()}. Nothing was written: mend that file, or leave the tensor out with `exclude`."
        )


def _square(rows: Tensor) -> float:
    flat = rows.reshape(-1)
    square = float(torch.dot(flat, flat))
    return square if math.isfinite(square) else float(flat.double().square().sum())
