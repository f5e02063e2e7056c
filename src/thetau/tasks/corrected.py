"""A head behind a correction of the features that it reads: what Representation Surgery keeps beside a merged model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.errors import DataError
from thetau.tasks.head import AnyHead


@final
@dataclass(frozen=True, kw_only=True)
class Correction:
    """f ↦ f − U ReLU(D f), brought back to the length of f where features have a length that counts (`unit`).

    A zero U leaves every bit as it is.
    """

    up: Float[Tensor, "feature rank"]
    down: Float[Tensor, "rank feature"]
    unit: bool

    def __call__(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example feature"]:
        """The corrected features."""
        corrected: Tensor = features - (features @ self.down.T).relu() @ self.up.T
        if not self.unit:
            return corrected
        back: Tensor = features.norm(dim=-1, keepdim=True) / corrected.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return corrected * back


@final
@dataclass(frozen=True, kw_only=True)
class CorrectedHead:
    """`head` reads what `correction` makes of the features."""

    head: AnyHead
    correction: Correction

    def logits(self, features: Tensor) -> Tensor:
        """The head's, of the corrected features."""
        return self.head.logits(self.correction(features))

    def linear(self, change: Tensor) -> Tensor:
        """Not defined. Raises `DataError`."""
        raise DataError("a corrected head is not linear in the features. Take the head without its correction.")

    def predict(self, features: Tensor) -> Tensor:
        """The head's, of the corrected features."""
        return self.head.predict(self.correction(features))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The head's, of the corrected features."""
        return self.head.loss(self.correction(features), labels)

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Tensor:
        """The head's, of the corrected features."""
        return self.head.log_likelihood(self.correction(features), labels)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The head's, of the corrected features."""
        return self.head.outcomes(self.correction(features))

    def hash(self) -> str:
        """A hexadecimal digest of the head and the correction."""
        digest = hashlib.blake2b(f"{self.head.hash()}{self.correction.unit}".encode(), digest_size=16)
        for tensor in (self.correction.up, self.correction.down):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes() + str(tuple(tensor.shape)).encode())
        return digest.hexdigest()

    def to(self, device: torch.device) -> CorrectedHead:
        """The same head on a device."""
        moved = replace(self.correction, up=self.correction.up.to(device), down=self.correction.down.to(device))
        return CorrectedHead(head=self.head.to(device), correction=moved)
