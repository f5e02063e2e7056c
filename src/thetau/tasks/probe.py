"""Heads made from labelled features, for models without a text tower: class means, a linear probe, and a ridge regression.

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
from thetau.tasks.head import LOGIT_SCALE, AnyHead, Head, UnitHead, class_likelihood, class_outcomes
from thetau.tasks.images import needed

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # unit features differ little, so a C of 1 is already a strong penalty
RIDGES = (0.001, 0.01, 0.1, 1.0)
_DEFAULT_STRENGTH, _DEFAULT_RIDGE = 100.0, 0.01
_STEPS = 2000


@final
@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """`logits = scale · (weight · feature + bias)`. `regression`: the one logit is the prediction, and the loss its squared error."""

    weight: Float[Tensor, "label feature"]
    bias: Float[Tensor, " label"]
    scale: float = 1.0
    regression: bool = False

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise DataError(f"`LinearHead(scale=...)` must be above 0. Got {self.scale!r}.")

    def logits(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """`features` have unit length."""
        return self.scale * (features @ self.weight.T + self.bias)

    def linear(self, change: Tensor) -> Tensor:
        """The same without the bias."""
        return self.scale * change @ self.weight.T

    def predict(self, features: Tensor) -> Tensor:
        """The most likely class, or the number."""
        logits = self.logits(features)
        return logits[:, 0] if self.regression else logits.argmax(-1)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or the mean squared error."""
        logits = self.logits(features)
        return (
            nn.functional.mse_loss(logits[:, 0], labels.float())
            if self.regression
            else nn.functional.cross_entropy(logits, labels)
        )

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Float[Tensor, " example"]:
        """The log of the softmax at the labels; of a regression that of a Gaussian of variance 1 around the prediction, −½ (y − f)²."""
        logits = self.logits(features)
        return -(labels - logits[:, 0]).square() / 2 if self.regression else class_likelihood(logits, labels)

    def outcomes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Every class with its probability; of a regression the number one standard deviation above the prediction.

        That one stands for the whole Gaussian where gradients of the log-likelihood are squared: (y − f)² is 1 on average.
        """
        logits = self.logits(features)
        return (logits + 1, torch.ones_like(logits)) if self.regression else class_outcomes(logits)

    def to(self, device: torch.device) -> LinearHead:
        """The same head on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def hash(self) -> str:
        """A hexadecimal digest of weight, bias and scale."""
        digest = hashlib.blake2b(f"{self.scale!r}{tuple(self.weight.shape)}{'r' * self.regression}".encode(), digest_size=16)
        for tensor in (self.weight, self.bias):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def trainable(head: AnyHead, task: str) -> LinearHead:
    """A linear head with gradients that starts as `head`. Raises `DataError` for the heads of language models."""
    match head:
        case Head():
            weight, bias = head.scale * head.classes, torch.zeros(len(head.classes), device=head.classes.device)
            made = LinearHead(weight=weight.clone(), bias=bias)
        case LinearHead():
            made = replace(head, weight=head.scale * head.weight, bias=head.scale * head.bias, scale=1.0)
        case UnitHead():
            raise DataError(
                f"task {task!r}: the head of raw features normalises them and is not linear. Train it with unit features."
            )
        case _:
            raise DataError(f"task {task!r}: a language model brings its own head, which stays frozen. Leave `train_head` out.")
    made.weight.requires_grad_()
    made.bias.requires_grad_()
    return made


def frozen_copy(head: LinearHead) -> LinearHead:
    """The same without gradients, on the CPU."""
    return replace(head, weight=head.weight.detach().cpu().clone(), bias=head.bias.detach().cpu().clone())


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


def ridge_head(
    features: Float[Tensor, "example feature"], values: Sequence[float], validation: tuple[Tensor, Sequence[float]] | None = None
) -> LinearHead:
    """Ridge regression on unit features; its strength is that of `RIDGES` with the least error on `validation`, or else 0.01.

    Raises `DataError`: no examples, features that are not finite.
    """
    linear = needed("sklearn.linear_model", "a regression head", "'thetau[models]'")
    if not len(values) or len(values) != len(features) or not torch.isfinite(features).all():
        raise DataError(
            f"a regression head is made from one number a finite feature. Got {len(features)} features, {len(values)} numbers."
        )
    x, y = features.detach().cpu().double().numpy(), torch.tensor(values, dtype=torch.float64).numpy()
    best: tuple[float, Any] | None = None
    for strength in RIDGES if validation is not None else (_DEFAULT_RIDGE,):
        model: Any = linear.Ridge(alpha=strength).fit(x, y)
        error = 0.0
        if validation is not None:
            told = model.predict(validation[0].detach().cpu().double().numpy())
            error = float(((told - torch.tensor(validation[1]).double().numpy()) ** 2).mean())
        if best is None or error < best[0]:
            best = error, model
    assert best is not None
    weight, bias = torch.from_numpy(best[1].coef_).float()[None], torch.tensor([best[1].intercept_], dtype=torch.float32)
    return LinearHead(weight=weight, bias=bias, regression=True)


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
