"""Sign totals: over all entries, how many sums over the tasks are positive and how many negative.

The authors' TIES code gives an entry whose kept deltas cancel exactly the sign that the majority of all entries has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau.parts import Site, Statistic
from thetau.sums import sum_in_order

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SignTotals(Statistic):
    """Σ over entries of sign(Σ_t τ_t): a positive or negative integer."""

    per_tensor: bool = False

    def add(self, total: int | None, stack: Float[Tensor, "task *block"], site: Site, seen: None) -> int:
        """Add a block's signs."""
        signs = sum_in_order(stack).sign()
        return (total or 0) + int(signs.double().sum().item())

    def fold(self, total: int, other: int) -> int:
        """Sum over tensors."""
        return total + other

    def finish(self, total: int, seen: None) -> int:
        """The sum itself."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """A number."""
        return 8
