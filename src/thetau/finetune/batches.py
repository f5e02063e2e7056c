"""Training batches: every example once an epoch, those of similar length together, the order a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_BATCHES_PER_POOL = 16


def training_batches(lengths: Sequence[int], batch_size: int, seed: int | str) -> Iterator[list[int]]:
    """Indices of one batch after another, without end.

    An epoch is shuffled, cut into pools of a few batches, each pool is sorted by length and cut into batches, and the batches are
    shuffled. The last batch of an epoch may be smaller. Two runs with the same lengths, size and seed give the same batches.
    """
    epoch = 0
    while True:
        generator = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        generator.shuffle(order)
        pool = batch_size * _BATCHES_PER_POOL
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lambda index: lengths[index])
            batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        generator.shuffle(batches)
        yield from batches
        epoch += 1
