"""Heads of language models: the label words of a masked one, the labels' texts of a text-to-text one.

As LM-BFF (Gao et al., ACL 2021, <https://arxiv.org/abs/2012.15723>): the language-model head is cut to the label words and frozen, as
the embeddings are. A text-to-text model scores the labels itself, so its head is nothing but the loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.models.language import MaskEncoder, encoder_and_head
from thetau.models.weights import weights_hash
from thetau.tasks.head import class_outcomes
from thetau.tasks.prompted import digest, word_ids
from thetau.tasks.templates import Prompt


@final
@dataclass(frozen=True, kw_only=True)
class VerbaliserHead:
    """The language-model head with the rows of the label words only: a frozen copy, that later weights do not change.

    `values` is the prompt's, for a regression.
    """

    reader: nn.Module
    values: tuple[float, ...] | None = None

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """The model's own logits of the label words."""
        out: Tensor = self.reader(features)
        return out

    def linear(self, change: Tensor) -> Tensor:
        """Not defined: the head has an activation and a norm. Raises `DataError`."""
        raise DataError(
            "a language-model head is not linear in the features, so that the τJp penalty cannot read it; use a zero-shot head."
        )

    def predict(self, features: Tensor) -> Tensor:
        """The most likely label, or the expected value in a regression."""
        return _predicted(self.logits(features), self.values)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; for a regression with the targets of `soft_targets`."""
        logits = self.logits(features)
        return nn.functional.cross_entropy(logits, soft_targets(labels, self.values, logits.shape[-1]))

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Float[Tensor, " example"]:
        """The log of the softmax over the label words, at the labels; for a regression with the shares of `soft_targets`."""
        return _likelihood(self.logits(features), labels, self.values)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Every label word, in a regression as its value, with its probability."""
        return _outcomes(self.logits(features), self.values)

    def to(self, device: torch.device) -> VerbaliserHead:
        """The same head on a device."""
        return replace(self, reader=copy.deepcopy(self.reader).to(device))

    def hash(self) -> str:
        """A hexadecimal digest of the weights, the layers' kinds and the values."""
        return digest([weights_hash(self.reader.state_dict()), repr(self.reader), self.values])


def verbaliser_head(module: MaskEncoder, tokenizer: Any, prompt: Prompt) -> VerbaliserHead:
    """The head of a task, with the weights that `module` runs with now: call it while those are the base's.

    Raises `DataError` when a label word is not one token, `CheckpointError` when the model's head is not of a known form.
    """
    _, head = encoder_and_head(module.backbone)
    backbone: Any = module.backbone
    decoder = backbone.get_output_embeddings()
    ids = torch.tensor(word_ids(tokenizer, prompt), device=decoder.weight.device)
    with torch.no_grad():
        rows = nn.Linear(decoder.in_features, len(ids), bias=decoder.bias is not None, device="meta")
        rows.weight = nn.Parameter(decoder.weight[ids].clone())
        memo: dict[int, Any] = {id(decoder): rows}
        if decoder.bias is not None:
            rows.bias = nn.Parameter(decoder.bias[ids].clone())
            memo[id(decoder.bias)] = rows.bias
    # The copy meets the short decoder wherever the head has the long one.
    reader = copy.deepcopy(head, memo).eval().requires_grad_(False)
    return VerbaliserHead(reader=reader, values=prompt.values)


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

    def predict(self, features: Tensor) -> Tensor:
        """The most likely label, or the expected value in a regression."""
        return _predicted(self.logits(features), self.values)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """−log-likelihood of the right label's text, summed over its tokens, the mean over the batch.

        The language-model loss: other labels do not count. For a regression with the shares of `soft_targets`.
        """
        return -(soft_targets(labels, self.values, scores.shape[-1]) * scores).sum(-1).mean()

    def log_likelihood(self, scores: Tensor, labels: Tensor) -> Float[Tensor, " example"]:
        """Among the labels' texts alone: the log of the softmax of their scores. `loss` counts all other texts too."""
        return _likelihood(scores, labels, self.values)

    def outcomes(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Every label's text, in a regression as its value, with its probability among them."""
        return _outcomes(scores, self.values)

    def to(self, device: torch.device) -> TextToTextHead:
        """The same: it holds no tensors."""
        return self

    def hash(self) -> str:
        """A hexadecimal digest of its kind and values."""
        return digest([type(self).__name__, self.values])


def soft_targets(labels: Tensor, values: tuple[float, ...] | None, count: int) -> Float[Tensor, "example label"]:
    """The share of each label: all on one for class numbers, and for a regression on the two words whose values are nearest.

    As LM-BFF does between two words. Raises `DataError` for numbers outside the range of `values`.
    """
    if values is None:
        return nn.functional.one_hot(labels.long(), count).float()
    grid = torch.tensor(values, dtype=torch.float32, device=labels.device)
    if ((labels < grid[0]) | (labels > grid[-1])).any():
        raise DataError(
            f"labels must be in {values[0]}..{values[-1]}, the range of the prompt's `values`. "
            f"Got {labels.min().item()}..{labels.max().item()}; correct the rows or the prompt."
        )
    number = labels.float()
    upper = torch.searchsorted(grid, number).clamp(1, count - 1)
    share = (number - grid[upper - 1]) / (grid[upper] - grid[upper - 1])
    low = nn.functional.one_hot(upper - 1, count) * (1 - share)[:, None]
    return low + nn.functional.one_hot(upper, count) * share[:, None]


def expected_value(logits: Float[Tensor, "example label"], values: tuple[float, ...]) -> Float[Tensor, " example"]:
    """A regression's prediction: the mean of `values` under the model's probabilities of their words."""
    return logits.softmax(-1) @ torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _likelihood(logits: Tensor, labels: Tensor, values: tuple[float, ...] | None) -> Tensor:
    return (soft_targets(labels, values, logits.shape[-1]) * logits.log_softmax(-1)).sum(-1)


def _outcomes(logits: Tensor, values: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    numbers, shares = class_outcomes(logits)
    return (numbers if values is None else torch.tensor(values, device=logits.device)[numbers]), shares


def _predicted(logits: Tensor, values: tuple[float, ...] | None) -> Tensor:
    return logits.argmax(-1) if values is None else expected_value(logits, values)
