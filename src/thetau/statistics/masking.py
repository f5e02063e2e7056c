"""How much of each task's vector a masking transform leaves: Σ|τ| before it and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.parts import Site, Statistic, Transform

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """A running total of `[task, 2]`, before and after; a class of its own, so that no statistic of the masking is taken for it."""

    values: Float[Tensor, "task 2"]


@dataclass(frozen=True)
class Masked:
    """What the masking transform's own statistic found, and the sums `[task, 2]`, before and after; the sums are last."""

    rounds: int
    found: Any
    sums: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MaskedSums(Statistic):
    """Σ|τ_t| and Σ|m_t ⊙ τ_t|, float64, of a tensor or of the whole vector: one round after those that the masking asks for.

    The masking is made again for it, block by block; a random one is a function of (seed, task, tensor, element) and so the same.
    """

    masking: Transform
    per_tensor: bool = True

    @property
    def rounds(self) -> int:
        """Of the masking, and one."""
        return self._own + 1

    def add(self, total: Any, stack: Float[Tensor, "task *block"], site: Site, seen: Masked | None) -> Any:
        """A block's share of the masking's own statistic, then of the sums."""
        inner = self.masking.requires()
        found = seen.found if seen is not None else None
        if inner is not None and (seen.rounds if seen is not None else 0) < self._own:
            return inner.add(total, stack, site, found)
        state = self.masking.prepare({site.name: found} if self.per_tensor and inner is not None else found, site.tasks)
        pair = [one.reshape(len(one), -1).double().abs().sum(1) for one in (stack, self.masking.apply(stack, state, site))]
        sums = torch.stack(pair, 1)
        return Sums(sums if total is None else total.values + sums)

    def fold(self, total: Any, other: Any) -> Any:
        """As the masking's own statistic does, or the sums' sum."""
        if isinstance(total, Sums):
            return Sums(total.values + other.values)
        inner = self.masking.requires()
        assert inner is not None
        return inner.fold(total, other)

    def finish(self, total: Any, seen: Masked | None) -> Masked:
        """After the masking's rounds what it found, then the sums beside it."""
        inner = self.masking.requires()
        rounds, found = (seen.rounds, seen.found) if seen is not None else (0, None)
        if inner is not None and rounds < self._own:
            return Masked(rounds + 1, inner.finish(total, found))
        return Masked(rounds + 1, found, total.values)

    def memory(self, tasks: int, elements: int) -> int:
        """That of the masking's own statistic, and two numbers a task."""
        inner = self.masking.requires()
        return 16 * tasks * (512 if self.per_tensor else 1) + (inner.memory(tasks, elements) if inner is not None else 0)

    def held(self, tasks: int, elements: Sequence[int]) -> int:
        """What the masking's own statistic holds."""
        inner = self.masking.requires()
        return inner.held(tasks, elements) if inner is not None else 0

    @property
    def _own(self) -> int:
        """Rounds of the masking's own statistic."""
        inner = self.masking.requires()
        return inner.rounds if inner is not None else 0
