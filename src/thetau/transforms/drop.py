"""Drop and rescale: zero entries at random, and divide the rest by the share that stays, so that the expectation is kept.

DARE, Yu et al., ICML 2024, <https://arxiv.org/abs/2311.03099>. Which entries go is a function of (seed, task, tensor, element).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from thetau.parts import Op, Site, Transform


@dataclass(frozen=True, kw_only=True)
class Drop(Transform):
    """Each entry is dropped with probability `rate`; the others are multiplied by 1/(1 − rate)."""

    rate: float

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        threshold = round(self.rate * (1 << 31))
        keys = [key for task in range(len(site.tasks)) for key in (*site.keys(task, element, "drop"), threshold)]
        return [Op("drop", value=1 / (1 - self.rate), keys=tuple(keys))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """Drop and rescale a block."""
        last = round(self.rate * (1 << 31)) - 1  # of the dropped; 2³¹ itself would not fit the bits' int32
        out = stack * (1 / (1 - self.rate))
        for task, row in enumerate(out):
            row.masked_fill_((site.bits(task, row.numel(), "drop") <= last).reshape(row.shape), 0)
        return out
