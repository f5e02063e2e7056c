"""Sums whose rounding depends on nothing but their terms and the order of the tasks."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def sum_in_order(stack: Float[Tensor, "task *block"]) -> Float[Tensor, "*block"]:
    """Σ over tasks, added one after the other, so that every entry is summed in the same order whatever the block."""
    total = stack[0].clone()
    for row in stack[1:]:
        total += row
    return total


def weighted_sum(stack: Float[Tensor, "task *block"], weights: list[float]) -> Float[Tensor, "*block"]:
    """Σ weight · row over tasks, one after the other."""
    total = stack[0] * weights[0]
    for row, weight in zip(stack[1:], weights[1:], strict=True):
        total += row * weight  # two roundings, as the compiled loop makes them, not one
    return total
