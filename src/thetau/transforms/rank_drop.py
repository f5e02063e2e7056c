"""Drop at random, small entries more often than large ones, and rescale each so that its expectation is kept: DELLA's MagPrune.

Deep et al. 2024, <https://arxiv.org/abs/2406.11617>. Entries are ranked by magnitude inside each row (the paper's nodes); from the
smallest to the largest the probability of being dropped falls evenly from p + ε/2 to p − ε/2, and what stays is divided by its own
1 − p_i. Equal magnitudes rank by position. mergekit's `epsilon` is half of this one, and it rescales all of a tensor by one norm
(`rescale=False` here, in a `Rescale`) or not at all. With p = 0 nothing is dropped, whatever ε. A vector or a scalar is one row; one of
more than 65,536 entries is ranked in runs of so many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, ClassVar

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.engine.window import BLOCK
from thetau.parts import Op, Site, Transform, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LONGEST = 1 << 18  # entries of a row in the compiled loop
INDEXED = 1 << 31  # elements of a tensor there: more would need other random keys in the middle of a run


@dataclass(frozen=True, kw_only=True)
class RankDrop(Transform):
    """`rate` is p, `epsilon` the width over which the probability falls; without `rescale` what stays is not divided by 1 − p_i."""

    rate: Varying
    epsilon: Varying
    rescale: bool = True
    pace: ClassVar[float] = 0.2e9  # it sorts

    def compiles(self, site: Site) -> bool:
        """Where the loop takes rows of this length."""
        matrix = len(site.shape) >= 2
        return _row(site) <= (LONGEST if matrix else BLOCK) and prod(site.shape) <= INDEXED

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        row = _row(site)
        tables = self._tables(site, row)
        shared = all(table is tables[0] for table in tables)  # one for all tasks stays in the cache
        thresholds, factors = map(np.concatenate, zip(*tables[: 1 if shared else None], strict=True))
        keys = [key for task in range(len(site.tasks)) for key in site.keys(task, element, "drop")]
        step = 0 if shared else row
        return [Op("rank_drop", by_task=tuple(factors.tolist()), keys=(row, step, *keys, *thresholds.tolist()))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """Drop and rescale a block of whole rows."""
        out = torch.empty_like(stack)
        row = site.row_elements if len(site.shape) >= 2 else stack[0].numel()
        for task, (values, table) in enumerate(zip(stack, self._tables(site, row), strict=True)):
            thresholds, factors = map(torch.from_numpy, table)
            rows = values.reshape(-1, row)
            order = torch.argsort(rows.float().abs(), dim=1, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(row).expand_as(order))
            bits = site.bits(task, values.numel(), "drop").reshape(rows.shape)
            kept = rows * factors[rank].to(rows.dtype)
            out[task] = kept.masked_fill_(bits < thresholds[rank], 0).reshape(values.shape)
        return out

    def _tables(self, site: Site, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each task's table; the same object where the numbers are the same."""
        both = zip(site.per_task(self.rate), site.per_task(self.epsilon), strict=True)
        return [_table(rate, epsilon if rate else 0.0, row, self.rescale) for rate, epsilon in both]


def _row(site: Site) -> int:
    """Entries that are ranked together."""
    return site.row_elements if len(site.shape) >= 2 else prod(site.shape)


@lru_cache(maxsize=32)
def _table(rate: float, epsilon: float, row: int, rescale: bool) -> tuple[np.ndarray, np.ndarray]:
    """By rank from the smallest: what the random bits must reach for an entry to stay, and by how much it is then multiplied."""
    rank = np.arange(row) / (row - 1) if row > 1 else np.full(1, 0.5)
    drop = rate + epsilon * (0.5 - rank)
    factors = 1 / (1 - drop) if rescale else np.ones(row)
    return np.rint(drop * (1 << 31)).astype(np.int64), factors.astype(np.float32)
