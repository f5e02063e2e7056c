"""One live encoder, many weights, many tasks: everything that can be done once is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from thetau.errors import DataError
from thetau.evaluate.accuracy import Accuracy
from thetau.evaluate.cache import Cache
from thetau.models import Encoder, weights_hash
from thetau.tasks import Head, Task, Tokens, tokenise, zero_shot_head
from thetau.tasks.encoding import features


@final
class Evaluator:
    """Measures weights on tasks with the base's frozen heads.

    Make it while `encoder` holds the base's weights: the heads are made then, and each split is tokenised at its first use and
    kept. With `cache`, an accuracy is looked up by the content of weights, tokens and head before it is computed.

    - `limits`: split → largest number of examples (None or absent: all of them).
    - `on_tokens`: called with the number of tokens done, those found in the cache included; may be set later.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Iterable[Task],
        *,
        limits: Mapping[str, int | None] | None = None,
        max_length: int = 64,
        cache: Path | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.encoder = encoder
        listed = list(tasks)
        self.tasks = {task.name: task for task in listed}
        if len(self.tasks) != len(listed):
            raise DataError(f"tasks must have different names. Got {', '.join(task.name for task in listed)}.")
        self.heads: dict[str, Head] = {name: zero_shot_head(encoder, task) for name, task in self.tasks.items()}
        self._base = encoder.weights(exact=True)
        self._limits = dict(limits or {})
        self._max_length = max_length
        self._cache = Cache(folder=cache)
        self.on_tokens = on_tokens
        self._tokens: dict[tuple[str, str], Tokens] = {}

    def tokens(self, task: str, split: str) -> Tokens:
        """The token ids of a task's split, made once."""
        if (task, split) not in self._tokens:
            examples = self.tasks[task].split(split, self._limits.get(split))
            self._tokens[task, split] = tokenise(self.encoder, examples, self._max_length)
        return self._tokens[task, split]

    def size(self, task: str, split: str) -> int:
        """How many tokens an evaluation reads: the units of `tick`."""
        return sum(self.tokens(task, split).lengths)

    def evaluate(
        self, weights: Mapping[str, Tensor], split: str, tasks: Iterable[str] | None = None, *, origin: str = "weights"
    ) -> dict[str, Accuracy]:
        """The accuracy of `weights` (the base's names) on each task, all of them by default. `origin` is what errors call the
        weights.
        """
        key = weights_hash(weights)
        loaded = False
        result = {}
        for name in self.tasks if tasks is None else tasks:
            tokens, head = self.tokens(name, split), self.heads[name]
            parts = [key, self.encoder.module.pooling, tokens.hash, head.hash()]
            found = self._cache.get(Accuracy, parts)
            if found is None:
                if not loaded:
                    self.encoder.load(weights, origin)
                    loaded = True
                found = self._accuracy(head, tokens)
                self._cache.put(found, parts)
            else:
                self.done(self.size(name, split))
            result[name] = found
        return result

    def features(self, weights: Mapping[str, Tensor], task: str, split: str, *, origin: str = "weights") -> Tensor:
        """What the head of a task reads, `[example, feature]`, from `weights`."""
        self.encoder.load(weights, origin)
        return features(self.encoder, self.tokens(task, split), self.done)

    def load_base(self) -> None:
        """Run with the base's weights."""
        self.encoder.load(self._base, "the base")

    def done(self, tokens: int) -> None:
        """Count tokens as read."""
        if self.on_tokens is not None:
            self.on_tokens(tokens)

    def _accuracy(self, head: Head, tokens: Tokens) -> Accuracy:
        with torch.inference_mode():
            guesses = head.logits(features(self.encoder, tokens, self.done)).argmax(dim=1)
            correct = int((guesses == torch.tensor(tokens.labels)).sum())
        return Accuracy.of(correct, len(tokens))
