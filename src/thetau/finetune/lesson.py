"""What one task brings to a run: its inputs and its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from thetau.tasks.head import AnyHead


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


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """`head` reads the features of `inputs`; in a penalty its labels are not looked at."""

    name: str
    inputs: Inputs
    head: AnyHead


def to_device(columns: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same columns on a device."""
    return {name: column.to(device) for name, column in columns.items()}
