"""Normal numbers and signs from counter-based bits: a sketch is the same whatever the order of tasks, blocks and workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from thetau._lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Bits: TypeAlias = "Callable[[str, int], Tensor]"  # (axis, count): integers in [0, 2³¹), others for another axis


def gaussian(rows: int, columns: int, bits: Bits) -> Float[Tensor, "rows columns"]:
    """Normal numbers by Box–Muller, float64; `bits` is asked for the axes u and v."""
    u = [(bits(axis, rows * columns).double() + 0.5) / (1 << 31) for axis in "uv"]
    return ((-2 * u[0].log()).sqrt() * (2 * torch.pi * u[1]).cos()).reshape(rows, columns)


def signs(rows: int, columns: int, bits: Bits) -> Float[Tensor, "rows columns"]:
    """±1 with equal chance, float32, which do as well in a range finder and cost less; `bits` is asked for the axis s."""
    return (1 - 2 * bits("s", rows * columns).bitwise_and(1)).float().reshape(rows, columns)
