"""Successive halving: a trial is measured on little first, and on more only while it is among the best share of the trials that came as far.

Jamieson and Talwalkar, AISTATS 2016, <https://arxiv.org/abs/1502.07943>; without waiting for others as in ASHA, Li et al., MLSys 2020,
<https://arxiv.org/abs/1810.05934>, except that a trial that stopped is never taken up again. With several objectives, the best are those that fewest others
dominate. Every trial is measured on the same examples at the same rung, and each rung reads only what the one before it did not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, final

Halving = Literal["none", "examples", "tasks", "both"]
LEAST = 8  # examples of a task at a rung: fewer say nothing


@final
@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is read at each rung: task → number of examples, of a fixed order; the last rung reads everything."""

    rungs: tuple[Mapping[str, int], ...]
    seed: int = 0

    def rows(self, task: str, rung: int, count: int) -> list[int]:
        """The examples of a task, of `count`, that a rung reads and no earlier one did."""
        order = list(range(count))
        random.Random(f"{self.seed}/{task}").shuffle(order)
        before = max((self.rungs[r].get(task, 0) for r in range(rung)), default=0)
        return order[before : self.rungs[rung].get(task, 0)]


def ladder_of(counts: Mapping[str, int], halving: Halving, rungs: int, factor: int, seed: int = 0) -> Ladder:
    """The ladder over tasks of `counts` examples: each rung reads `factor` times what the one before it did.

    Of each task's examples (`examples`), of the tasks, in their order (`tasks`), or of both in the same proportion.

    Examples:
        >>> [dict(rung) for rung in ladder_of({"a": 90, "b": 90}, "examples", 3, 3).rungs]
        [{'a': 10, 'b': 10}, {'a': 30, 'b': 30}, {'a': 90, 'b': 90}]
        >>> [dict(rung) for rung in ladder_of({"a": 90, "b": 90, "c": 90, "d": 90}, "tasks", 2, 2).rungs]
        [{'a': 90, 'b': 90}, {'a': 90, 'b': 90, 'c': 90, 'd': 90}]
    """
    if halving == "none":
        return Ladder(rungs=(dict(counts),), seed=seed)
    made: list[dict[str, int]] = []
    for rung in range(rungs):
        share = float(factor) ** (rung - rungs + 1)
        power = 0.5 if halving == "both" else 1.0
        of_tasks = share**power if halving != "examples" else 1.0
        of_examples = share**power if halving != "tasks" else 1.0
        tasks = list(counts)[: max(1, ceil(round(of_tasks * len(counts), 9)))]
        read = {task: min(counts[task], max(LEAST, ceil(round(of_examples * counts[task], 9)))) for task in tasks}
        if not made or made[-1] != read:  # few tasks or examples: rungs fall together
            made.append(read)
    return Ladder(rungs=tuple(made), seed=seed)


def goes_on(mine: Sequence[float], others: Sequence[Sequence[float]], factor: int) -> bool:
    """Whether a trial with these losses at a rung is among the best of `factor` of those that came there, itself with them.

    `others` are the losses of the other trials there. Fewer than `factor` trials let only the best pass. Equal ones pass together.

    Examples:
        >>> goes_on([0.3], [[0.1], [0.2], [0.4], [0.5], [0.6]], 2), goes_on([0.45], [[0.1], [0.2], [0.4], [0.5], [0.6]], 2)
        (True, False)
    """
    everyone = [tuple(mine), *map(tuple, others)]
    places = max(1, len(everyone) // factor)
    rank = {one: sum(dominates(other, one) for other in everyone) for one in everyone}
    return sum(rank[other] < rank[everyone[0]] for other in everyone) < places


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether losses are nowhere larger than others and somewhere smaller."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(losses: Sequence[Sequence[float]]) -> list[int]:
    """The places of those that none dominates; of several alike the first.

    Examples:
        >>> front([[1, 4], [2, 2], [3, 3], [4, 1], [2, 2]])
        [0, 1, 3]
    """
    seen: set[tuple[float, ...]] = set()
    found = []
    for place, one in enumerate(losses):
        if tuple(one) not in seen and not any(dominates(other, one) for other in losses):
            seen.add(tuple(one))
            found.append(place)
    return found
