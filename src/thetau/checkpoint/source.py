"""What every readable set of weights looks like: named tensors, read lazily by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A stored tensor without its values. `file` is what messages call the place it lies in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def rows(self) -> int:
        """Length of the first axis; a 0-d tensor has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Elements in one row."""
        return prod(self.shape[1:])

    @property
    def elements(self) -> int:
        """Elements in the whole tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.elements * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """Weights that can be read by tensor and by row.

    `degree` is 1 for a model and 0 for a difference of models; `partial` says that a name it lacks stands for zeros (a task vector or
    an adapter that touches some tensors only). Reading is safe from several threads.
    """

    @property
    def label(self) -> str:
        """What messages and provenance call it: a path, a hub id or a given name."""

    @property
    def key(self) -> str:
        """Equal for two openings of the same weights, so that they cancel in `a - b`."""

    @property
    def degree(self) -> int:
        """1 for a model, 0 for a difference."""

    @property
    def partial(self) -> bool:
        """Whether an absent name stands for zeros."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor by name, in the order in which they lie in the files."""

    @property
    def folder(self) -> Path | None:
        """Where config and tokenizer files lie, if anywhere."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told about how this was opened."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` as stored: shape `[stop - start, *shape[1:]]`; a 0-d tensor as it is. The result is the caller's own or read-only."""

    def fingerprint(self) -> str:
        """A hash that tells these weights from others of the same shapes."""


def span(spec: Spec, start: int, stop: int | None) -> tuple[int, int]:
    """Row bounds, checked.

    Raises:
        IndexError: `start:stop` does not lie inside the tensor.
    """
    end = spec.rows if stop is None else stop
    if not 0 <= start <= end <= spec.rows:
        raise IndexError(f"Rows {start}:{end} do not lie inside {spec.name!r} with {spec.rows} rows.")
    return start, end
