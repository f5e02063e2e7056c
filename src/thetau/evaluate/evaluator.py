"""One live encoder, many weights, many tasks: everything that can be done once is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.errors import DataError
from thetau.evaluate.accuracy import Accuracy
from thetau.evaluate.answers import Answers
from thetau.evaluate.cache import Cache
from thetau.evaluate.causal import causal_loss, check_loss, examine
from thetau.evaluate.measures import Loss, Measure, measure
from thetau.models import Encoder, weights_hash
from thetau.models.causal import end_tokens
from thetau.pace import counted_by, doing
from thetau.tasks import Task, encode, make_head
from thetau.tasks.causal.encode import CausalInputs
from thetau.tasks.encoding import features
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs, label_tensor
from thetau.tasks.metrics import Score


@final
class Evaluator:
    """Measures weights on tasks with the base's frozen heads.

    Make it while `encoder` holds the base's weights: the heads are made then, and each split is encoded at its first use and
    kept. With `cache`, a result is looked up by the content of weights, inputs and head before it is computed.

    - `limits`: split → largest number of examples (None or absent: all of them). `limits_of`: the same of single tasks, in its place.
    - `max_length`: tokens of an example. `image_size`: pixels a side, None for the model's own.
    - `heads`: task → head that is used in place of the base's, such as one that was trained.
    - `on_tokens`: called with the number of tokens (patches) done, those found in the cache included; may be set later.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Iterable[Task],
        *,
        limits: Mapping[str, int | None] | None = None,
        limits_of: Mapping[str, Mapping[str, int | None]] | None = None,
        max_length: int = 64,
        image_size: int | None = None,
        heads: Mapping[str, AnyHead] | None = None,
        cache: Path | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.encoder = encoder
        listed = list(tasks)
        self.tasks = {task.name: task for task in listed}
        if len(self.tasks) != len(listed):
            raise DataError(f"tasks must have different names. Got {', '.join(task.name for task in listed)}.")
        self._max_length, self._image_size = max_length, image_size
        given = dict(heads or {})
        self.heads: dict[str, AnyHead] = {}
        for place, (name, task) in enumerate(self.tasks.items(), 1):
            with doing(f"head of {name} ({place} of {len(listed)})"):
                self.heads[name] = (
                    given[name]
                    if name in given
                    else make_head(encoder, task, max_length=max_length, image_size=image_size, cache=cache)
                )
        self._base = encoder.weights(exact=True)
        self._limits = {name: dict((limits_of or {}).get(name, limits or {})) for name in self.tasks}
        self._cache = Cache(folder=cache)
        self.on_tokens = on_tokens
        self._inputs: dict[tuple[str, str], Inputs] = {}

    def inputs(self, task: str, split: str) -> Inputs:
        """A task's split as the encoder reads it, made once."""
        if (task, split) not in self._inputs:
            self._inputs[task, split] = encode(
                self.encoder,
                self.tasks[task],
                split,
                max_length=self._max_length,
                image_size=self._image_size,
                limit=self._limits[task].get(split),
            )
        return self._inputs[task, split]

    def size(self, task: str, split: str) -> int:
        """How many tokens or patches an evaluation reads: the units of `tick`."""
        return sum(self.inputs(task, split).lengths)

    def evaluate(
        self, weights: Mapping[str, Tensor], split: str, tasks: Iterable[str] | None = None, *, origin: str = "weights"
    ) -> dict[str, Measure]:
        """The metric of `weights` (the base's names) on each task, all of them by default. `origin` is what errors call the
        weights.
        """
        key = weights_hash(weights)
        loaded = False
        result: dict[str, Measure] = {}
        for name in self.tasks if tasks is None else tasks:
            inputs, head, metric = self.inputs(name, split), self.heads[name], self.tasks[name].metric
            parts = [key, self.encoder.form, inputs.hash, head.hash(), *([] if metric == "accuracy" else [metric])]
            if metric == "exact_match":  # what is said ends where the files beside the weights say
                parts += map(str, sorted(end_tokens(self.encoder)))
            found = self._kept(inputs, metric, parts)
            if found is None:
                if not loaded:
                    self.encoder.load(weights, origin)
                    loaded = True
                if isinstance(inputs, CausalInputs):
                    with (
                        doing(f"evaluate {origin} on {name}, {split}"),
                        counted_by(self.on_tokens, sum(inputs.lengths), "tokens") as advance,
                    ):
                        found = examine(self.encoder, inputs, advance)
                else:
                    with torch.inference_mode(), doing(f"evaluate {origin} on {name}, {split}"):
                        read = features(self.encoder, inputs, self.on_tokens)
                        told = head.predict(read)
                        if self._cache.folder is not None:  # the loss comes for nothing with the features
                            loss = Loss(value=float(head.loss(read.float(), label_tensor(inputs.labels))), n=len(inputs))
                            self._cache.put(loss, [key, self.encoder.form, inputs.hash, head.hash(), "loss"])
                    found = measure(metric, told, inputs.labels)
                self._cache.put(found, parts)
            else:
                self.done(self.size(name, split))
            result[name] = found
        return result

    def _kept(self, inputs: Inputs, metric: str, parts: object) -> Measure | None:
        """A result that lies in the cache."""
        if isinstance(inputs, CausalInputs):
            return self._cache.get(Answers, parts)
        return self._cache.get(Accuracy, parts) if metric == "accuracy" else self._cache.get(Score, parts)

    def losses(
        self, weights: Mapping[str, Tensor], split: str, tasks: Iterable[str] | None = None, *, origin: str = "weights"
    ) -> dict[str, Loss]:
        """The mean loss of each task's head on what `weights` (the base's names) make of its split; all tasks by default."""
        key = weights_hash(weights)
        loaded = False
        result: dict[str, Loss] = {}
        for name in self.tasks if tasks is None else tasks:
            inputs, head = self.inputs(name, split), self.heads[name]
            parts = [key, self.encoder.form, inputs.hash, head.hash(), "loss"]
            found = self._cache.get(Loss, parts)
            if found is None:
                if not loaded:
                    self.encoder.load(weights, origin)
                    loaded = True
                if isinstance(inputs, CausalInputs):
                    with (
                        doing(f"loss of {origin} on {name}, {split}"),
                        counted_by(self.on_tokens, sum(inputs.lengths), "tokens") as advance,
                    ):
                        found = causal_loss(self.encoder, inputs, advance)
                else:
                    with torch.inference_mode(), doing(f"loss of {origin} on {name}, {split}"):
                        value = head.loss(features(self.encoder, inputs, self.on_tokens).float(), label_tensor(inputs.labels))
                    found = Loss(value=float(value), n=len(inputs))
                self._cache.put(found, parts)
            else:
                self.done(self.size(name, split))
            result[name] = found
        return result

    def features(self, weights: Mapping[str, Tensor], task: str, split: str, *, origin: str = "weights") -> Tensor:
        """What the head of a task reads, `[example, feature]`, from `weights`. Raises `DataError` for a causal model."""
        self.encoder.load(weights, origin)
        with doing(f"features of {origin} on {task}, {split}"):
            return features(self.encoder, self.inputs(task, split), self.on_tokens)

    def load(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Run with these weights (the base's names) until others are loaded; `origin` is what errors call them."""
        self.encoder.load(weights, origin)

    def read(self, task: str, split: str, rows: Sequence[int] | None = None) -> Float[Tensor, "example feature"]:
        """What the head of a task reads from the weights that are loaded, of all examples of a split or of `rows`."""
        return features(self.encoder, self.inputs(task, split), self.on_tokens, rows)

    def ask(self, task: str, split: str, rows: Sequence[int] | None = None, *, loss: bool = False) -> tuple[Measure, Loss | None]:
        """What a causal model with the weights that are loaded answers to a split, or to its `rows`; `loss`: also its mean loss, in a pass of its own."""
        inputs = self.inputs(task, split)
        assert isinstance(inputs, CausalInputs)
        asked = inputs if rows is None else inputs.some(rows)
        with doing(f"answers on {task}, {split}"), counted_by(self.on_tokens, sum(asked.lengths), "tokens") as advance:
            found = examine(self.encoder, asked, advance)
        return found, causal_loss(self.encoder, asked, self.done) if loss else None

    def judge(
        self, task: str, split: str, read: Float[Tensor, "example feature"], rows: Sequence[int] | None = None
    ) -> tuple[Measure, Loss]:
        """A task's metric and mean loss on features of a split, or of its `rows`."""
        labels = self.inputs(task, split).labels
        told = labels if rows is None else [labels[row] for row in rows]
        head = self.heads[task]
        with torch.inference_mode():
            loss = float(head.loss(read.float(), label_tensor(told)))
            found = measure(self.tasks[task].metric, head.predict(read), told)
        return found, Loss(value=loss, n=len(told))

    def check_loss(self, task: str, split: str) -> None:
        """Raise `DataError` for a causal model's task whose answers are longer than what is taught, so that it has no loss."""
        if isinstance(inputs := self.inputs(task, split), CausalInputs):
            check_loss(inputs)

    @contextmanager
    def through(self, encoder: Encoder) -> Iterator[None]:
        """While it lasts, everything runs through this form of the encoder, by whose `form` results are kept."""
        own, self.encoder = self.encoder, encoder
        try:
            yield
        finally:
            self.encoder = own

    def load_base(self) -> None:
        """Run with the base's weights."""
        self.encoder.load(self._base, "the base")

    def done(self, tokens: int) -> None:
        """Count tokens as read."""
        if self.on_tokens is not None:
            self.on_tokens(tokens)
