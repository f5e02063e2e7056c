"""From texts to token ids, once for each split, and from ids to batches of similar length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.errors import DataError
from thetau.models import Encoder
from thetau.tasks.rows import Split
from thetau.tasks.task import Task

# Pairs of a batch's rows and tokens that keep two cores busy; more only adds padding.
_TOKENS_PER_BATCH = 1024
_ROWS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A split as token ids, not padded. `columns` maps `input_ids`, … to one list an example; `pads` to the value that fills a
    column.

    `truncated` counts the examples that were longer than `max_length`.
    """

    columns: Mapping[str, Sequence[Sequence[int]]]
    pads: Mapping[str, int]
    labels: tuple[int, ...]
    max_length: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each example."""
        return tuple(len(ids) for ids in self.columns["input_ids"])

    @cached_property
    def hash(self) -> str:
        """A hexadecimal digest of ids and labels: the texts, the tokenizer, the limits, all that a model sees."""
        content = json.dumps([{name: list(map(list, rows)) for name, rows in self.columns.items()}, self.labels], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the ids alone."""
        content = json.dumps({name: list(map(list, rows)) for name, rows in self.columns.items()}, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The columns of some examples, `[example, token]` int64, padded on the right to the longest of them."""
        width = max(self.lengths[i] for i in indices)
        return {
            name: torch.tensor([[*rows[i], *([self.pads[name]] * (width - len(rows[i])))] for i in indices], dtype=torch.int64)
            for name, rows in self.columns.items()
        }


def encode(
    encoder: Encoder, task: Task, split: str, *, max_length: int, image_size: int | None = None, limit: int | None = None
) -> Tokens:
    """A task's split as `encoder` reads it, at most `limit` examples."""
    return tokenise(encoder, task.split(split, limit), max_length)


def tokenise(encoder: Encoder, split: Split, max_length: int) -> Tokens:
    """The token ids of a split; pairs go through the tokenizer's own pair encoding. Longer inputs are cut at `max_length` tokens.

    A pair is cut from its longer text first.
    """
    limit = min(max_length, encoder.max_length)
    tokenizer = encoder.tokenizer
    pair = [] if split.texts2 is None else [list(split.texts2)]
    encoded: Any = tokenizer(list(split.texts), *pair, truncation=True, max_length=limit, return_overflowing_tokens=False)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    full: Any = tokenizer(list(split.texts), *pair, truncation=False, verbose=False, return_attention_mask=False)
    pads = {"input_ids": int(tokenizer.pad_token_id), "attention_mask": 0, "token_type_ids": int(tokenizer.pad_token_type_id)}
    return Tokens(
        columns=columns,
        pads={name: pads[name] for name in columns},
        labels=split.labels,
        max_length=limit,
        truncated=sum(len(ids) > limit for ids in full["input_ids"]),
    )


def ordered_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches, the shortest examples first, so that little is padded; each example once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) >= _ROWS_PER_BATCH or (len(batch) + 1) * lengths[index] > _TOKENS_PER_BATCH):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def features(encoder: Encoder, tokens: Tokens, tick: Callable[[int], None] | None = None) -> Float[Tensor, "example feature"]:
    """The unit vector of each example, in the order of `tokens`; `tick` is called with the number of tokens done.

    Raises `DataError` when the weights that `encoder` runs with give NaN or Inf.
    """
    rows: list[tuple[int, Tensor]] = []
    encoder.module.eval()
    with torch.inference_mode():
        for indices in ordered_batches(tokens.lengths):
            output = encoder.module(**tokens.batch(indices))
            if not torch.isfinite(output).all():
                raise DataError(
                    "the model's features must be finite; these weights give NaN or Inf, so no accuracy would mean anything."
                )
            rows.extend(zip(indices, output, strict=True))
            if tick is not None:
                tick(sum(tokens.lengths[i] for i in indices))
        return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])
