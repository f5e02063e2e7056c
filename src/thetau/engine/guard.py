"""What is noticed while task vectors are read for the first time: values that are not numbers, and vectors too long for this base."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint import Dtype, Source
from thetau.checkpoint.window import Window
from thetau.engine.window import Reading
from thetau.errors import CheckpointError
from thetau.parts import as_float
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 8  # tensors of which rows are compared
SAMPLE = 1 << 16  # entries of each
FAR = 0.3  # ‖τ‖ / ‖θ₀‖; fine-tuning gives 0.001 to 0.1, another initialisation about 1.4


@dataclass
class Guard:
    """Squared norms of each task vector and of the base, tensor by tensor.

    A tensor's blocks come in order; its first block begins it anew, and rows that were counted are not counted again, so that
    reading something twice (two saves, several parts of one merge) changes no number.
    """

    tasks: Sequence[str]
    _seen: dict[tuple[str | None, str], tuple[int, float]] = field(default_factory=dict)  # (task or base, tensor): rows, square
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(
        self,
        tasks: Sequence[str],
        stack: Tensor,
        reading: Reading,
        combinations: Sequence[Combination],
        window: Window,
        start: int,
        stop: int,
        reference: Source | None,
    ) -> None:
        """Check a block `[task, rows, *rest]` of some of the tasks and add its norms, and the base's where `reference` is given.

        Raises:
            CheckpointError: a value is NaN or infinite; names the file, the tensor and how many.
        """
        found = [_square(rows) for rows in stack]
        if not all(map(math.isfinite, found)):
            for combination in combinations:
                for _, source, name in reading.terms(combination, window.name):
                    refuse_nonfinite(source, name)
        squares: dict[str | None, float] = dict(zip(tasks, found, strict=True))
        if reference is not None and window.name in reading.alignment.maps.get(reference.key, {}):
            name = reading.alignment.maps[reference.key][window.name]
            squares[None] = _square(as_float(window.rows(reading.alignment.seen(reference), name, start, stop)))
        with self._lock:
            for task, square in squares.items():
                upto, before = self._seen.get((task, window.name), (0, 0.0)) if start else (0, 0.0)
                if upto == start:
                    self._seen[task, window.name] = stop, before + square

    def count(self, tasks: Sequence[str], name: str, squares: Sequence[float], base: float | None) -> None:
        """Take in a whole tensor's squared norms at once."""
        with self._lock:
            found: dict[str | None, float] = dict(zip(tasks, squares, strict=True))
            if base is not None:
                found[None] = base
            for task, square in found.items():
                self._seen[task, name] = -1, square

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "_seen": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def give(self) -> dict[tuple[str | None, str], tuple[int, float]]:
        """What was seen so far, to `take` in another process; here it is forgotten."""
        with self._lock:
            seen, self._seen = self._seen, {}
        return seen

    def take(self, seen: dict[tuple[str | None, str], tuple[int, float]]) -> None:
        """What another process saw."""
        with self._lock:
            self._seen.update(seen)

    def knows(self, name: str) -> bool:
        """Whether this tensor's norms are there already."""
        return bool(self.tasks) and (self.tasks[0], name) in self._seen

    def norms(self) -> dict[str | None, float]:
        """Norm of each task vector that was read, and of the base under None; the same whatever the order of the tensors."""
        squares: dict[str | None, list[float]] = {}
        with self._lock:
            seen = list(self._seen.items())
        for (task, _), (_, square) in seen:
            squares.setdefault(task, []).append(square)
        return {task: math.sqrt(math.fsum(parts)) for task, parts in squares.items()}

    def warnings(self, base_label: str) -> list[str]:
        """A sentence for each task whose vector is far longer than fine-tuning makes it."""
        norms = self.norms()
        base = norms.get(None, 0.0)
        return [
            f"{task}: ‖τ‖ = {norms[task]:.4g} is {norms[task] / base:.2f} of the base's norm {base:.4g}; fine-tuning gives less than "
            f"{FAR:g}. {base_label} is probably not the model that it was fine-tuned from."
            for task in self.tasks
            if base and norms.get(task, 0.0) > FAR * base
        ]

    def notes(self) -> list[str]:
        """A sentence for each task whose vector is all zero."""
        norms = self.norms()
        return [
            f"{task}: its task vector is all zero in the tensors that were merged." for task in self.tasks if norms.get(task) == 0
        ]


def strangers(
    models: Mapping[str, Source], base: Source, label_of_base: str, names: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """A sentence for each model that lies farther from another one than fine-tuning goes, told from a sample of their largest tensors.

    `names` maps each source's key to its names of the base's tensors.
    """
    matrices = [
        name for name, spec in base.specs.items() if name in names[base.key] and spec.dtype.is_floating_point and spec.elements
    ]
    largest = sorted(matrices, key=lambda name: (-base.specs[name].elements, name))[:SAMPLED]
    said = []
    for label, model in models.items():
        apart, whole, count = 0.0, 0.0, 0
        for name in (name for name in largest if name in names[model.key]):
            spec, there = base.specs[name], model.specs[names[model.key][name]]
            rows = min(spec.rows, there.rows, max(1, SAMPLE // max(1, spec.row_elements)))
            if spec.shape[1:] == there.shape[1:]:
                ours, theirs = _numbers(base, names[base.key][name], rows), _numbers(model, names[model.key][name], rows)
                apart += float(np.square(theirs - ours).sum())
                whole += float(np.square(ours).sum())
                count += ours.size
        distance = math.sqrt(apart / whole) if whole else 0.0
        if distance > FAR:
            said.append(
                f"{label}: lies {distance:.2f} of its norm away from {label_of_base} (a sample of {count} entries); models that were fine-tuned "
                f"from one another differ by less than {FAR:g}. They are probably not related."
            )
    return said


def _numbers(source: Source, name: str, rows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The first rows of a tensor, flat, in float64."""
    dtype = source.specs[name].dtype
    if source.place(name) is None or dtype not in (Dtype.F64, Dtype.F32, Dtype.F16, Dtype.BF16):
        read: np.ndarray[Any, np.dtype[np.float64]] = source.read(name, 0, rows).reshape(-1).double().numpy()
        return read
    raw = source.raw(name, 0, rows)
    if dtype is Dtype.BF16:  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(raw, f"<f{dtype.itemsize}").astype(np.float64)


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
            f"{file}: tensor {source.called(name)!r} holds {nan} NaN and {inf} infinite values of {values.numel()}. "
            "Nothing was written: mend that file, or leave the tensor out with `exclude`."
        )


def _square(rows: Tensor) -> float:
    flat = rows.reshape(-1)
    square = float(torch.dot(flat, flat))
    return square if math.isfinite(square) else float(flat.double().square().sum())
