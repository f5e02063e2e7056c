"""Classification by a text-to-text model: the label whose text the model finds most likely after the prompt.

As T5 (Raffel et al., JMLR 2020, <https://arxiv.org/abs/1910.10683>) and Flan-T5, but instead of writing freely and comparing
strings, every label is scored: no answer falls outside the labels, and the scores are differentiable features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError
from thetau.models.verbaliser import (
    LanguageModel,
    Prompt,
    check_texts,
    digest,
    fitted,
    load_language_model,
    padded,
    pairs,
    soft_targets,
)

IGNORED = -100
_NEEDED = ("input_ids", "attention_mask", "label_ids")


@final
class TextToText(nn.Module):
    """T5 as one module of tensors to a tensor: `forward(**columns) → [example, label]`, log-likelihoods of the labels' texts."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **columns: Tensor) -> Float[Tensor, "example label"]:
        """The sum over each label's tokens of their log-probabilities, in nats. The encoder runs once an example.

        `columns`: `input_ids` and `attention_mask`, `[example, token]`, and `label_ids`, `[label, label_token]`, the same labels for
        the whole batch, padded with −100.
        """
        missing = [name for name in _NEEDED if name not in columns]
        if missing:
            raise DataError(
                f"columns must have {', '.join(_NEEDED)}. Got none for {', '.join(missing)}; make them with `label_inputs`."
            )
        labels, seen = columns["label_ids"], columns["attention_mask"]
        backbone: Any = self.backbone
        hidden: Tensor = backbone.encoder(input_ids=columns["input_ids"], attention_mask=seen).last_hidden_state
        count = len(labels)
        ids = labels.repeat(len(hidden), 1)  # for each example all the labels
        counted = ids != IGNORED
        start = torch.full_like(ids[:, :1], int(backbone.config.decoder_start_token_id))
        shifted = torch.cat([start, ids[:, :-1]], 1)
        pad = int(backbone.config.pad_token_id)
        logits: Tensor = backbone(
            encoder_outputs=(hidden.repeat_interleave(count, 0),),
            attention_mask=seen.repeat_interleave(count, 0),
            decoder_input_ids=shifted.masked_fill(shifted == IGNORED, pad),
            use_cache=False,
        ).logits
        told = logits.log_softmax(-1).gather(-1, ids.masked_fill(~counted, pad).unsqueeze(-1)).squeeze(-1)
        return (told * counted).sum(-1).reshape(-1, count)


@final
@dataclass(frozen=True, kw_only=True)
class TextToTextHead:
    """Nothing but the loss: the module gives the scores. `values` is the prompt's, for a regression."""

    values: tuple[float, ...] | None = None

    def logits(self, scores: Float[Tensor, "example label"]) -> Float[Tensor, "example label"]:
        """The scores as they are."""
        return scores

    def linear(self, change: Tensor) -> Tensor:
        """The same: there is no constant part."""
        return change

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """−log-likelihood of the right label's text, summed over its tokens, the mean over the batch.

        The language-model loss: other labels do not count. For a regression with the shares of `soft_targets`.
        """
        return -(soft_targets(labels, self.values, scores.shape[-1]) * scores).sum(-1).mean()

    def to(self, device: torch.device) -> TextToTextHead:
        """The same: it holds no tensors."""
        return self

    def hash(self) -> str:
        """A hexadecimal digest of its kind and values."""
        return digest([type(self).__name__, self.values])


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


def load_text_to_text(folder: Path) -> LanguageModel:
    """The text-to-text model in a folder, in float32 and evaluation mode; its `module` is a `TextToText`.

    Raises `CheckpointError` (not readable, not such a model) and `AlignmentError` (weights that are not those of the config).
    """
    model = load_language_model(folder, "AutoModelForSeq2SeqLM", TextToText)
    if model.tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer must have a token that ends a text; it has none. Use the model's own.")
    return model
