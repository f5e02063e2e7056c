"""Sums whose rounding depends on nothing but their terms and the order of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
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


def masked(values: Float[Tensor, "*block"], mask: Bool[Tensor, "*block"], factor: float) -> Float[Tensor, "*block"]:
    """Values where the mask is set and zeros elsewhere, times a factor, rounded once: a task's vector from what is kept of it."""
    kept = values.masked_fill(~mask, 0)
    return kept if factor == 1 else kept * factor


def fold_tree(parts: Iterable[Any], fold: Callable[[Any, Any], Any]) -> Any:
    """Fold results pairwise, in a tree that their number alone decides; None where there are none.

    Threads and clusters make the same tree, so the same bits, and only ⌈log₂ n⌉ results are held at a time.
    """
    held: list[tuple[int, Any]] = []
    for part in parts:
        size, total = 1, part
        while held and held[-1][0] == size:
            total = fold(held.pop()[1], total)
            size *= 2
        held.append((size, total))
    result: Any = held.pop()[1] if held else None
    while held:
        result = fold(held.pop()[1], result)
    return result
