"""What one task brings to a run: its inputs and its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs as Inputs


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
