"""What a model says of each task's unlabelled examples, batch by batch: how uncertain it is, and whether it still tells them apart.

Entropy has a trivial minimum, a model that says the same of every example. Predictions are counted, and a run is to stop where all of a
task's fall on one class over a window of steps though they did not at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.evidence.collecting import check_classes
from thetau.finetune.batches import training_batches
from thetau.finetune.lesson import Lesson, to_device
from thetau.models import Encoder
from thetau.tasks import Task, encode, make_head
from thetau.tasks.head import AnyHead


@final
class Entropies:
    """The entropies of a module's predictions on the batches of its lessons; `history` has those of each step, in nats.

    `window`: steps over which predictions are counted.
    """

    def __init__(self, module: nn.Module, lessons: Sequence[Lesson], *, batch: int, seed: int, window: int) -> None:
        self.module, self.lessons, self.window = module, tuple(lessons), window
        self.device = next(module.parameters()).device
        self.heads = [lesson.head.to(self.device) for lesson in lessons]
        self.counts = [torch.zeros(0, dtype=torch.int64) for _ in self.lessons]
        self.first: list[int] = []  # classes that each task's predictions had in the first window
        self.history: list[list[float]] = []
        self.picks = [training_batches(lesson.inputs.lengths, batch, f"{seed}/{lesson.name}") for lesson in self.lessons]

    def entropy(self, number: int) -> Tensor:
        """The mean entropy of a task's next batch, with the weights that the module holds; its predictions are counted."""
        lesson, head = self.lessons[number], self.heads[number]
        columns = to_device(lesson.inputs.batch(next(self.picks[number])), self.device)
        told = head.logits(self.module(**columns)).log_softmax(-1)
        picked = torch.bincount(told.detach().argmax(-1).cpu(), minlength=told.shape[-1])
        held = self.counts[number]
        self.counts[number] = picked if not len(held) else held + picked
        return -(told.exp() * told).sum(-1).mean()

    def descend(self, step: int, remedy: str, ran: Callable[[str], None] = lambda task: None) -> float:
        """One batch of every task, forward and backward, so that the parameters hold the gradient of the summed entropy, which is returned.

        `ran` is told of each task after its batch.

        Raises:
            DataError: an entropy is not finite.
        """
        found = []
        for number, lesson in enumerate(self.lessons):
            entropy = self.entropy(number)
            ran(lesson.name)
            if not bool(torch.isfinite(entropy)):
                raise DataError(
                    f"step {step}: the entropy of {lesson.name} must be finite. Got {float(entropy.detach())}; {remedy}"
                )
            entropy.backward()  # type: ignore[no-untyped-call]
            found.append(float(entropy.detach()))
        self.history.append(found)
        return math.fsum(found)

    def collapsed(self, step: int) -> str | None:
        """At the end of a window, which `step` is: the task whose predictions fell on one class in all of it, and did not at first.

        Where there is none a new window begins.
        """
        seen = [int((counts > 0).sum()) for counts in self.counts]
        self.first = self.first or seen
        for lesson, before, now, counts in zip(self.lessons, self.first, seen, self.counts, strict=True):
            if now == 1 and before > 1:
                return (
                    f"step {step}: every example of {lesson.name} in the last {self.window} steps was told class {int(counts.argmax())}, of "
                    f"{before} classes at first: its entropy has collapsed."
                )
        self.counts = [torch.zeros_like(counts) for counts in self.counts]
        return None

    def ends(self) -> dict[str, tuple[float, float]]:
        """Each task's mean entropy over the first and the last window; NaN where no step was made."""
        found = [
            torch.tensor(part).mean(0) if part else torch.full((len(self.lessons),), math.nan)
            for part in (self.history[: self.window], self.history[-self.window :])
        ]
        return {lesson.name: (float(a), float(b)) for lesson, a, b in zip(self.lessons, *found, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """What a run that goes on later needs to know."""
        return {
            "history": torch.tensor(self.history, dtype=torch.float64),
            "first": torch.tensor(self.first, dtype=torch.int64),
            **{f"counts/{number}": counts for number, counts in enumerate(self.counts)},
        }

    def resume(self, told: Mapping[str, Tensor], steps: int) -> None:
        """Go on after so many steps, with what `tensors` gave then."""
        self.first, self.history = told["first"].tolist(), told["history"].tolist()
        self.counts = [told[f"counts/{number}"] for number in range(len(self.lessons))]
        for picks in self.picks:
            for _ in range(steps):
                next(picks)


def lessons_of(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    names: Sequence[str],
    heads: Mapping[str, AnyHead],
    *,
    split: str,
    examples: int | None,
    max_length: int,
    image_size: int | None,
    what: str,
) -> list[Lesson]:
    """The unlabelled examples of each task, and its head, made from the base that the encoder holds where `heads` has none.

    Raises:
        DataError: a task has no classes, or no example; `what` is what is learned from them.
    """
    sizes: dict[str, Any] = {"max_length": max_length, "image_size": image_size}
    lessons = []
    for name in names:
        check_classes(tasks[name])
        inputs = encode(encoder, tasks[name], split, limit=examples, **sizes)
        if not len(inputs):
            raise DataError(
                f"task {name!r}: has no example in its split {split}, and {what} are learned from unlabelled examples. Leave the "
                "task out, or name another split (`split=test`)."
            )
        head = heads.get(name) or make_head(encoder, tasks[name], **sizes)
        lessons.append(Lesson(name=name, inputs=inputs, head=head))
    return lessons
