"""Drop and rescale: zero entries at random, and divide the rest by the share that stays, so that the expectation is kept.

DARE, Yu et al., ICML 2024, <https://arxiv.org/abs/2311.03099>. Which entries go is a function of (seed, task, tensor, element).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.parts import Op, Site, Transform, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Drop(Transform):
    """Each entry is dropped with probability `rate`; the others are multiplied by 1/(1 − rate), or stay as they are without `rescale`."""

    rate: Varying
    rescale: bool = True

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        rates = site.per_task(self.rate)
        keys = [key for task, rate in enumerate(rates) for key in (*site.keys(task, element, "drop"), _threshold(rate))]
        return [Op("drop", by_task=tuple(map(self._factor, rates)), keys=tuple(keys))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """Drop and rescale a block."""
        out = torch.empty_like(stack)
        for task, (row, rate) in enumerate(zip(stack, site.per_task(self.rate), strict=True)):
            last = _threshold(rate) - 1  # of the dropped; 2³¹ itself would not fit the bits' int32
            dropped = site.bits(task, row.numel(), "drop") <= last
            out[task] = (row * self._factor(rate)).masked_fill_(dropped.reshape(row.shape), 0)
        return out

    def _factor(self, rate: float) -> float:
        return 1 / (1 - rate) if self.rescale else 1.0


def _threshold(rate: float) -> int:
    """What the random bits must reach for an entry to stay."""
    return round(rate * (1 << 31))
