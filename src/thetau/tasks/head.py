"""The frozen head: a class is the embedding of its name.

As CLIP's zero-shot classifier (Radford et al., ICML 2021, <https://arxiv.org/abs/2103.00020>): every phrase of a class is put in
every template, embedded by the pre-trained encoder, averaged and brought to unit length. The head is made once, with the base,
and never trained, so that all the models of a suite share it and only the encoder differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.models import Encoder
from thetau.tasks.encoding import features, tokenise
from thetau.tasks.rows import Split
from thetau.tasks.task import Task

LOGIT_SCALE = 20.0


@runtime_checkable
class AnyHead(Protocol):
    """What reads features: a frozen function with a loss."""

    def logits(self, features: Tensor) -> Tensor:
        """One number for each label, `[example, label]`."""
        ...

    def linear(self, change: Tensor) -> Tensor:
        """The change of the logits for a change of the features: the head without its constant part."""
        ...

    def predict(self, features: Tensor) -> Tensor:
        """The class of each example, or its number in a regression."""
        ...

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Tensor:
        """log p(label | features) of each example, `[example]`; its constant part may be missing."""
        ...

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The labels that there may be and what the head gives each of them: labels and probabilities, `[example, outcome]` both."""
        ...

    def hash(self) -> str:
        """A digest of all that the head computes with."""
        ...

    def to(self, device: torch.device) -> AnyHead:
        """The same head on a device."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Head:
    """`logits = scale · cosine(feature, class)`. `classes` has rows of unit length and no gradient."""

    classes: Float[Tensor, "label feature"]
    scale: float = LOGIT_SCALE

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise DataError(f"`Head(scale=...)` must be above 0. Got {self.scale!r}.")

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """`features` have unit length."""
        logits: Tensor = self.scale * features @ self.classes.T
        return logits

    def linear(self, change: Tensor) -> Tensor:
        """The same: there is no constant part."""
        return self.logits(change)

    def predict(self, features: Tensor) -> Tensor:
        """The most likely class."""
        told: Tensor = self.logits(features).argmax(-1)
        return told

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.logits(features), labels)

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Float[Tensor, " example"]:
        """The log of the softmax at the labels."""
        return class_likelihood(self.logits(features), labels)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Every class with its probability."""
        return class_outcomes(self.logits(features))

    def to(self, device: torch.device) -> Head:
        """The same head on a device."""
        return replace(self, classes=self.classes.to(device))

    def hash(self) -> str:
        """A hexadecimal digest of the class embeddings and the scale."""
        content = self.classes.cpu().contiguous().numpy().tobytes() + f"{self.scale!r}{tuple(self.classes.shape)}".encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


@final
@dataclass(frozen=True, kw_only=True)
class UnitHead:
    """A head of unit features for raw ones: it normalises them first, as the papers' code does. Not linear, so it gives no change of logits."""

    inner: AnyHead

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """Of the features at unit length."""
        return self.inner.logits(_unit(features))

    def linear(self, change: Tensor) -> Tensor:
        """Not defined. Raises `DataError`."""
        raise DataError(
            "the logits of raw features are not linear in them, so a penalty of logits is not defined. Use penalty_of: features, or unit features."
        )

    def predict(self, features: Tensor) -> Tensor:
        """The inner head's answer."""
        return self.inner.predict(_unit(features))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The inner head's loss."""
        return self.inner.loss(_unit(features), labels)

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Tensor:
        """The inner head's."""
        return self.inner.log_likelihood(_unit(features), labels)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The inner head's."""
        return self.inner.outcomes(_unit(features))

    def to(self, device: torch.device) -> UnitHead:
        """The same head on a device."""
        return UnitHead(inner=self.inner.to(device))

    def hash(self) -> str:
        """The inner head's digest, marked."""
        return f"unit-{self.inner.hash()}"


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features, dim=-1)


def class_likelihood(logits: Float[Tensor, "example label"], labels: Tensor) -> Float[Tensor, " example"]:
    """The log of the softmax at each example's label."""
    return logits.log_softmax(-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)


def class_outcomes(logits: Float[Tensor, "example label"]) -> tuple[Tensor, Tensor]:
    """Every class's number, and the softmax."""
    return torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape), logits.softmax(-1)


def zero_shot_head(encoder: Encoder, task: Task, scale: float = LOGIT_SCALE) -> Head:
    """The head of `task` from the class names, with the weights that `encoder` runs with now: call it while those are the
    base's.
    """
    sentences = task.prompts.sentences()
    flat = tuple(sentence for group in sentences for sentence in group)
    tokens = tokenise(encoder, Split(texts=flat, texts2=None, labels=(0,) * len(flat)), encoder.max_length)
    return Head(classes=means_of(features(encoder, tokens), [len(group) for group in sentences]), scale=scale)


def means_of(rows: Float[Tensor, "sentence feature"], sizes: Sequence[int]) -> Float[Tensor, "label feature"]:
    """The unit mean of each group of rows, one group a class."""
    means = torch.stack([part.mean(0) for part in torch.split(rows, list(sizes))])
    # Outside inference mode again, so that autograd may use it as a constant.
    unit: Tensor = means / means.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return unit.clone()
