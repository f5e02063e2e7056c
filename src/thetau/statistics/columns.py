"""Inner products of two task vectors column by column: of the fibres along a tensor's first axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.engine.window import BLOCK
from thetau.parts import Site, Statistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ColumnProducts(Statistic):
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of shape `[3, *rest]`, float64, for a tensor `[rows, *rest]`; for one with a single axis `[3]`."""

    @property
    def per_tensor(self) -> bool:
        """Always."""
        return True

    def add(
        self, total: Float[Tensor, "3 *rest"] | None, stack: Float[Tensor, "2 *block"], site: Site, seen: None
    ) -> Float[Tensor, "3 *rest"]:
        """Add a block's products."""
        first, second = stack.double()
        products = torch.stack([(one * other).sum(0) for one, other in ((first, first), (first, second), (second, second))])
        return products if total is None else total + products

    def fold(self, total: Float[Tensor, "3 *rest"], other: Float[Tensor, "3 *rest"]) -> Float[Tensor, "3 *rest"]:
        """Never called: each tensor stands alone."""
        raise NotImplementedError

    def finish(self, total: Float[Tensor, "3 *rest"], seen: None) -> Float[Tensor, "3 *rest"]:
        """The sums themselves."""
        return total

    def memory(self, tasks: int, elements: int) -> int:
        """Three numbers a column, twice, and a block in float64."""
        return 2 * self._columns(elements) + 8 * 5 * min(elements, BLOCK)

    def held(self, tasks: int, elements: Sequence[int]) -> int:
        """Three numbers a column."""
        return sum(map(self._columns, elements))

    @staticmethod
    def _columns(elements: int) -> int:
        """Bytes for the columns of a matrix that is at most sixteen times as wide as high."""
        return 24 * (int(4 * elements**0.5) + 1)
