r"""The τJp penalty: what τ does to the inputs of other tasks.

Yoshida et al., NeurIPS 2024 workshop. Equation 10 adds $\lambda \sum_t \mathbb{E}\,\|J(x_t)\tau\|^2$ over all other tasks to each step
(`strict`), Equation 11 that of one task a step, in rotation (`cyclic`). Only inputs are read, never labels. The authors' code takes the
norm and not its square, of the encoder's features: `penalty_norm="plain"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from thetau.errors import DataError
from thetau.finetune.batches import training_batches
from thetau.finetune.config import FinetuneConfig
from thetau.finetune.lesson import Lesson, to_device
from thetau.finetune.views import View


@final
class Penalty:
    """Batches of the other tasks' inputs, in an order that the seed decides, and the penalty on them."""

    def __init__(self, against: Sequence[Lesson], config: FinetuneConfig, skipped: int = 0) -> None:
        if not against:
            raise DataError(
                "paradigm 'taujp' needs at least one other task, or a control task, whose inputs are kept unchanged: --against."
            )
        self._config, self._against = config, list(against)
        self._batches: list[Iterator[list[int]]] = [
            training_batches(lesson.inputs.lengths, config.other_batch, f"{config.seed}/{lesson.name}") for lesson in against
        ]
        for step in range(skipped):
            self.draw(step)

    def draw(self, step: int) -> list[tuple[int, list[int]]]:
        """The other tasks of a step and the indices of their examples."""
        count = len(self._against)
        turns = range(count) if self._config.penalty == "strict" else [step % count]
        return [(turn, next(self._batches[turn])) for turn in turns]

    def terms(self, view: View, step: int, device: torch.device, share: slice) -> Iterator[Tensor]:
        """λ times the penalty of each task of this step; one at a time, so that one graph is held at a time."""
        for turn, indices in self.draw(step):
            own = indices[share]
            if not own:
                continue
            lesson = self._against[turn]
            change = view.change(to_device(lesson.inputs.batch(own), device))
            if self._config.penalty_of == "logits":
                change = lesson.head.linear(change)
            norms = change.square().sum(-1) if self._config.penalty_norm == "squared" else change.norm(dim=-1)
            yield self._config.strength * norms.sum() / len(indices)
