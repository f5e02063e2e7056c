"""The head of a causal model's task: nothing but the loss, for the model brings its own."""

from __future__ import annotations

from typing import final

from jaxtyping import Float, Int
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.models.language import IGNORED


@final
class CausalHead:
    """Cross-entropy of the answers' tokens: the mean over an answer, then over the examples, so that each counts the same."""

    def logits(self, features: Tensor) -> Tensor:
        """The logits as they are."""
        return features

    def linear(self, change: Tensor) -> Tensor:
        """The same: there is no constant part."""
        return change

    def predict(self, features: Tensor) -> Tensor:
        """Not defined. Raises `DataError`."""
        raise DataError(_NO_LABELS)

    def loss(
        self, features: Float[Tensor, "example answer_token word"], labels: Int[Tensor, "example answer_token"]
    ) -> Float[Tensor, ""]:
        """−log-likelihood of an answer's token, in nats."""
        there = labels != IGNORED
        return -(self._told(features, labels).sum(-1) / there.sum(-1)).mean()

    def log_likelihood(
        self, features: Float[Tensor, "example answer_token word"], labels: Int[Tensor, "example answer_token"]
    ) -> Float[Tensor, " example"]:
        """Of each answer, the sum over its tokens."""
        return self._told(features, labels).sum(-1)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Not defined: answers are texts. Raises `DataError`."""
        raise DataError(_NO_LABELS)

    def hash(self) -> str:
        """Its kind."""
        return "causal"

    def to(self, device: object) -> CausalHead:
        """The same: it holds no tensors."""
        return self

    def _told(self, features: Tensor, labels: Tensor) -> Tensor:
        flat = nn.functional.cross_entropy(features.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return -flat.view(labels.shape)


_NO_LABELS = (
    "the answers of a causal language model are texts, of which there is no list: this needs a task with classes, and an encoder."
)
