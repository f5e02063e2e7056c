"""Elect: zero the entries whose sign is not that of the sum over tasks.

The second step of TIES-Merging, Yadav et al., NeurIPS 2023, <https://arxiv.org/abs/2306.01708>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from thetau.parts import Op, Site, Transform
from thetau.statistics import SignTotals
from thetau.sums import sum_in_order

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Elect(Transform):
    """`cancelled` says what becomes of entries whose deltas cancel exactly.

    `zero`, the sign of the `majority` of all entries, as in the authors' code, or the sign +, `positive`, as in mergekit.
    """

    cancelled: Literal["zero", "majority", "positive"] = "zero"
    per_task: ClassVar[bool] = False

    def requires(self) -> SignTotals | None:
        """The majority of all entries, where it is wanted."""
        return SignTotals() if self.cancelled == "majority" else None

    def prepare(self, result: object, tasks: tuple[str, ...]) -> float:
        """The sign that cancelled entries get."""
        if self.cancelled == "positive":
            return 1.0
        return float((result > 0) - (result < 0)) if isinstance(result, int) else 0.0

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: float, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("elect", value=state)]

    def apply(self, stack: Float[Tensor, "task *block"], state: float, site: Site) -> Float[Tensor, "task *block"]:
        """Zero what disagrees."""
        elected = sum_in_order(stack).sign_()
        if state:
            elected.masked_fill_(elected == 0, state)
        return stack.masked_fill(stack.sign() != elected, 0)
