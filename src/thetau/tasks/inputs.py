"""A split that a model can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


def label_tensor(labels: Sequence[int | float]) -> Tensor:
    """Labels as a loss takes them, `[example]`: int64 for classes, float32 for numbers."""
    whole = all(isinstance(label, int) for label in labels)
    return torch.tensor(list(labels), dtype=torch.int64 if whole else torch.float32)


@runtime_checkable
class Inputs(Protocol):
    """A split that a model can read: token ids or pixels."""

    @property
    def labels(self) -> Sequence[int | float]:
        """One an example."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens or patches of each example."""
        ...

    @property
    def hash(self) -> str:
        """A digest of all that a model sees."""
        ...

    @property
    def unlabelled(self) -> str:
        """The same without the labels."""
        ...

    @property
    def truncated(self) -> int:
        """Examples that were cut."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments for some examples."""
        ...

    def targets(self, indices: Sequence[int]) -> Tensor:
        """What a head's loss compares with, of some examples: their labels, or the tokens of their answers."""
        ...
