"""Examples in a template as token ids: what masked and text-to-text language models read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, final

import torch
from torch import Tensor

from thetau.errors import DataError
from thetau.models.language import IGNORED
from thetau.tasks.inputs import label_tensor
from thetau.tasks.templates import Prompt


@final
@dataclass(frozen=True, kw_only=True)
class MaskInputs:
    """Prompts as token ids, not padded: what `MaskEncoder` reads. `positions` is the place of each example's mask token."""

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    labels: tuple[int, ...] | tuple[float, ...]
    pad: int
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each example."""
        return tuple(map(len, self.ids))

    @cached_property
    def hash(self) -> str:
        """A digest of ids and labels."""
        return digest([self.ids, self.positions, self.labels])

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the ids alone."""
        return digest([self.ids, self.positions])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, `[example, token]` padded on the right, and `mask_position`, `[example]`."""
        return padded([self.ids[i] for i in indices], self.pad) | {
            "mask_position": torch.tensor([self.positions[i] for i in indices], dtype=torch.int64)
        }

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The labels of some examples."""
        return label_tensor([self.labels[i] for i in indices])


@final
@dataclass(frozen=True, kw_only=True)
class LabelInputs:
    """Prompts and the labels' texts as token ids, not padded: what `TextToText` reads."""

    ids: tuple[tuple[int, ...], ...]
    label_ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...]
    pad: int
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each prompt."""
        return tuple(map(len, self.ids))

    @cached_property
    def hash(self) -> str:
        """A digest of prompts, label texts and labels."""
        return digest([self.ids, self.label_ids, self.labels])

    @cached_property
    def unlabelled(self) -> str:
        """The same without the labels; the labels' texts are part of what the model sees."""
        return digest([self.ids, self.label_ids])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The columns that `TextToText` takes."""
        width = max(map(len, self.label_ids))
        labels = [[*row, *([IGNORED] * (width - len(row)))] for row in self.label_ids]
        return padded([self.ids[i] for i in indices], self.pad) | {"label_ids": torch.tensor(labels, dtype=torch.int64)}

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The labels of some examples."""
        return label_tensor([self.labels[i] for i in indices])


def mask_inputs(
    tokenizer: Any,
    prompt: Prompt,
    texts: Sequence[str],
    texts2: Sequence[str] | None,
    labels: Sequence[int | float],
    max_length: int,
) -> MaskInputs:
    """Put examples in a template, in at most `max_length` tokens; the texts are cut, never the sentence around them.

    Raises `DataError`: the tokenizer has no mask token, a text holds one, the examples do not fit the prompt.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "a template with {mask} needs a tokenizer with a mask token; this one has none. Use a masked language model."
        )
    check_texts(prompt, texts, texts2, labels)

    def encode(text: str, text2: str | None) -> list[int]:
        return list(tokenizer(prompt.fill(text, text2, tokenizer.mask_token), verbose=False)["input_ids"])

    ids, positions, truncated = [], [], 0
    for number, (text, text2) in enumerate(pairs(texts, texts2)):
        row, cut = fitted(encode, text, text2, max_length)
        if row.count(tokenizer.mask_token_id) != 1:
            raise DataError(
                f"example {number}: a prompt must hold one mask token. Got {row.count(tokenizer.mask_token_id)}; "
                f"take {tokenizer.mask_token!r} out of the text."
            )
        ids.append(tuple(row))
        positions.append(row.index(tokenizer.mask_token_id))
        truncated += cut
    return MaskInputs(
        ids=tuple(ids), positions=tuple(positions), labels=tuple(labels), pad=int(tokenizer.pad_token_id), truncated=truncated
    )


def label_inputs(
    tokenizer: Any,
    prompt: Prompt,
    texts: Sequence[str],
    texts2: Sequence[str] | None,
    labels: Sequence[int | float],
    max_length: int,
) -> LabelInputs:
    """Put examples in a template, in at most `max_length` tokens; the texts are cut, never the sentence around them.

    Raises `DataError`: a label's text is not in the vocabulary, the examples do not fit the prompt.
    """
    check_texts(prompt, texts, texts2, labels)

    def encode(text: str, text2: str | None) -> list[int]:
        return list(tokenizer(prompt.fill(text, text2), verbose=False)["input_ids"])

    rows = [fitted(encode, text, text2, max_length) for text, text2 in pairs(texts, texts2)]
    return LabelInputs(
        ids=tuple(tuple(row) for row, _ in rows),
        label_ids=tuple(map(tuple, label_ids(tokenizer, prompt))),
        labels=tuple(labels),
        pad=int(tokenizer.pad_token_id),
        truncated=sum(cut for _, cut in rows),
    )


def word_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token of each label word, as it stands in the template. Raises `DataError` when one is not one known token."""
    before = prompt.template.split("{mask}")[0]
    space = " " if before[-1:].isspace() else ""
    found: dict[int, str] = {}
    for word in prompt.words:
        ids = list(tokenizer(space + word, add_special_tokens=False)["input_ids"])
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise DataError(f"a label must be one token of the tokenizer. {word!r} gives {tokens}; choose another word.")
        if ids[0] in found:
            raise DataError(f"labels must be different tokens. {found[ids[0]]!r} and {word!r} are the same; choose another word.")
        found[ids[0]] = word
    return list(found)


def label_ids(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    """The tokens of each label's text, with the token that ends it. Raises `DataError` for unknown or equal ones."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer must have a token that ends a text; this one has none. Use that of a text-to-text model.")
    found: dict[tuple[int, ...], str] = {}
    for word in prompt.words:
        ids = tuple(tokenizer(word, add_special_tokens=False)["input_ids"])
        if not ids or tokenizer.unk_token_id in ids:
            tokens = tokenizer.convert_ids_to_tokens(list(ids))
            raise DataError(
                f"a label's text must be in the vocabulary of the tokenizer. {word!r} gives {tokens}; choose another text."
            )
        if ids in found:
            raise DataError(f"labels must be different tokens. {found[ids]!r} and {word!r} are the same; choose another text.")
        found[ids] = word
    return [[*ids, int(tokenizer.eos_token_id)] for ids in found]


def fitted(encode: Callable[[str, str | None], list[int]], text: str, text2: str | None, limit: int) -> tuple[list[int], bool]:
    """The ids of `encode(text, text2)`, in at most `limit` tokens, and whether the texts were cut for it: the longer one first.

    Raises `DataError` when not even the sentence around the texts fits.
    """
    whole = encode(text, text2)
    if len(whole) <= limit:
        return whole, False
    low, high, best = 0, max(len(text), len(text2 or "")), encode("", None if text2 is None else "")
    if len(best) > limit:
        raise DataError(
            f"the template alone has {len(best)} tokens, more than `max_length`. Got {limit}; raise it or shorten the template."
        )
    while low < high:  # the largest number of characters, the same for both texts
        middle = (low + high + 1) // 2
        ids = encode(text[:middle], None if text2 is None else text2[:middle])
        if len(ids) <= limit:
            low, best = middle, ids
        else:
            high = middle - 1
    return best, True


def check_texts(prompt: Prompt, texts: Sequence[str], texts2: Sequence[str] | None, labels: Sequence[int | float]) -> None:
    """Raise `DataError` when the examples do not fit the prompt: pairs, lengths, class numbers."""
    if prompt.pair != (texts2 is not None):
        need, got = ("two texts", "one") if prompt.pair else ("one text", "two")
        raise DataError(f"the template {prompt.template!r} takes {need}. Got {got}; choose the template of this task.")
    if len(texts) != len(labels) or (texts2 is not None and len(texts2) != len(texts)):
        raise DataError(f"texts and labels must be as many. Got {len(texts)} texts and {len(labels)} labels.")
    wrong = next((label for label in labels if not (isinstance(label, int) and 0 <= label < len(prompt.words))), None)
    if prompt.values is None and wrong is not None:
        raise DataError(
            f"labels must be integers in 0..{len(prompt.words) - 1}, the prompt has {len(prompt.words)}. Got {wrong!r}."
        )


def pairs(texts: Sequence[str], texts2: Sequence[str] | None) -> Iterator[tuple[str, str | None]]:
    """Each text with its second one, or None."""
    return zip(texts, texts2 if texts2 is not None else repeat(None, len(texts)), strict=True)


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a batch."""
    width = max(map(len, rows))
    ids = [[*row, *([pad] * (width - len(row)))] for row in rows]
    seen = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids, dtype=torch.int64), "attention_mask": torch.tensor(seen, dtype=torch.int64)}


def digest(content: object) -> str:
    """A hexadecimal digest of plain data."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
