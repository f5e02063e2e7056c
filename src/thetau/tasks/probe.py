"""Heads made from labelled features, for models without a text tower: class means, and a linear probe.

The means are prototypes (Snell et al., NeurIPS 2017, <https://arxiv.org/abs/1703.05175>) with the cosine for a distance; the probe is
the logistic regression of CLIP's linear evaluation (Radford et al., ICML 2021, <https://arxiv.org/abs/2103.00020>). Both are made
once, with the base, and never trained after that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.tasks.head import LOGIT_SCALE, Head
from thetau.tasks.images import needed

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # unit features differ little, so a C of 1 is already a strong penalty
_DEFAULT_STRENGTH = 100.0
_STEPS = 2000


@final
@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """`logits = scale · (weight · feature + bias)`, without gradients."""

    weight: Float[Tensor, "label feature"]
    bias: Float[Tensor, " label"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise DataError(f"`LinearHead(scale=...)` must be above 0. Got {self.scale!r}.")

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """`features` have unit length."""
        return self.scale * (features @ self.weight.T + self.bias)

    def linear(self, change: Tensor) -> Tensor:
        """The same without the bias."""
        return self.scale * change @ self.weight.T

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.logits(features), labels)

    def to(self, device: torch.device) -> LinearHead:
        """The same head on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def hash(self) -> str:
        """A hexadecimal digest of weight, bias and scale."""
        digest = hashlib.blake2b(f"{self.scale!r}{tuple(self.weight.shape)}".encode(), digest_size=16)
        for tensor in (self.weight, self.bias):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def class_means_head(
    features: Float[Tensor, "example feature"], labels: Sequence[int], n_classes: int, scale: float = LOGIT_SCALE
) -> Head:
    """A class is the unit mean of its examples' unit features. Raises `DataError`: a class without examples, labels outside."""
    numbers = _checked(features, labels, n_classes)
    sums = torch.zeros(n_classes, features.shape[1]).index_add_(0, numbers, features.detach().cpu().float())
    return Head(classes=nn.functional.normalize(sums, dim=-1), scale=scale)


def linear_probe_head(
    features: Float[Tensor, "example feature"],
    labels: Sequence[int],
    n_classes: int,
    seed: int = 0,
    validation: tuple[Tensor, Sequence[int]] | None = None,
) -> LinearHead:
    """Logistic regression with an L2 penalty on unit features.

    With `validation`, features and labels, C is the smallest of `STRENGTHS` that is most accurate there; else 100. Raises `DataError`.
    """
    numbers = _checked(features, labels, n_classes)
    if validation is None:
        return _fitted(features, numbers, _DEFAULT_STRENGTH, seed)
    truth = _checked(validation[0], validation[1], n_classes, every=False)
    heads = [_fitted(features, numbers, strength, seed) for strength in STRENGTHS]
    return max(heads, key=lambda head: int((head.logits(validation[0].cpu().float()).argmax(-1) == truth).sum()))


def _fitted(features: Tensor, labels: Tensor, strength: float, seed: int) -> LinearHead:
    linear = needed("sklearn.linear_model", "a linear probe", "scikit-learn")
    model: Any = linear.LogisticRegression(C=strength, max_iter=_STEPS, random_state=seed)
    model.fit(features.detach().cpu().double().numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(part).float() for part in (model.coef_, model.intercept_))
    if len(bias) == 1:  # two classes: the logit of the second, shared between both
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LinearHead(weight=weight, bias=bias)


def _checked(features: Tensor, labels: Sequence[int], n_classes: int, *, every: bool = True) -> Tensor:
    numbers = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if n_classes < 2:
        raise DataError(f"a head must have at least 2 classes. Got {n_classes}.")
    if not len(numbers) or len(numbers) != len(features):
        raise DataError(
            f"a head is made from one label a feature, at least one. Got {len(features)} features, {len(numbers)} labels."
        )
    if not torch.isfinite(features).all():
        raise DataError("a head's features must be finite. Got NaN or Inf; look at the weights that gave them.")
    if numbers.min() < 0 or numbers.max() >= n_classes:
        got = int(numbers.min() if numbers.min() < 0 else numbers.max())
        raise DataError(f"labels must be in 0..{n_classes - 1}, the head has {n_classes} classes. Got {got}.")
    counts = torch.bincount(numbers, minlength=n_classes)
    if every and not counts.all():
        raise DataError(
            f"a head needs an example of each class. Got none of class {int(counts.argmin())}; take more examples, or a stratified split."
        )
    return numbers
