"""Partitions for experiments: random ones, and all of a small set of tasks (the paper's Tables 4, 10 to 14 and Fig. 8)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from thetau.bases.cluster import Clustering, Groups, named_groups
from thetau.errors import RecipeError

MOST = 1000


def bell(count: int) -> int:
    """How many partitions a set of so many elements has.

    Examples:
        >>> [bell(count) for count in (1, 2, 3, 4)]
        [1, 2, 5, 15]
    """
    row = [1]
    for _ in range(count - 1):
        following = [row[-1]]
        for value in row:
            following.append(following[-1] + value)
        row = following
    return row[-1]


def all_partitions(names: Sequence[str], *, most: int = MOST) -> list[Groups]:
    """Every partition, from one cluster of all to each task alone.

    Raises:
        RecipeError: there are more than `most`; the message says how many.

    Examples:
        >>> for groups in all_partitions(["cr", "mr"]):
        ...     print(groups)
        {'b1': ('cr', 'mr')}
        {'b1': ('cr',), 'b2': ('mr',)}
    """
    ordered = sorted(names)
    if not ordered or len(set(ordered)) != len(ordered):
        raise RecipeError([f"partitions are of different tasks, at least one. Got {list(names)}."], "partitions")
    if bell(len(ordered)) > most:
        raise RecipeError(
            [
                f"{len(ordered)} tasks have {bell(len(ordered)):,} partitions (the Bell number B({len(ordered)})); at most {most:,} are made. "
                "Take fewer tasks, or random partitions."
            ],
            "partitions",
        )
    found = [named_groups(parts) for parts in _grow(ordered)]
    return sorted(found, key=lambda groups: (len(groups), [groups[name] for name in groups]))


def _grow(names: Sequence[str]) -> Iterator[list[list[str]]]:
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for parts in _grow(rest):
        yield [[first], *parts]
        for place in range(len(parts)):
            yield [*parts[:place], [first, *parts[place]], *parts[place + 1 :]]


def random_partition(names: Sequence[str], k: int, seed: int) -> Clustering:
    """k clusters, none empty: k tasks drawn at random begin one each, every other task joins any of them.

    Raises:
        RecipeError: `k` is out of range.

    Examples:
        >>> random_partition(["cr", "mr", "rte", "sst2"], 2, seed=0).k
        2
    """
    if not 1 <= k <= len(names):
        raise RecipeError([f"`k` must be between 1 and {len(names)}, the number of task vectors. Got {k}."], "random partition")
    generator = random.Random(seed)
    shuffled = sorted(names)
    generator.shuffle(shuffled)
    parts = [[name] for name in shuffled[:k]]
    for name in shuffled[k:]:
        generator.choice(parts).append(name)
    return Clustering(groups=named_groups(parts), k=k, chosen="random")
