"""Means on the sphere: the Karcher mean of models, tensor by tensor, and its first step.

Each tensor's direction x/‖x‖ is a point on a sphere; the mean direction is multiplied by the mean length Σ w ‖x‖. `karcher` goes from
the normalised mean of the directions to the point where the logarithms of all of them add up to 0 (Karcher, CPAM 1977,
<https://doi.org/10.1002/cpa.3160300502>; mergekit's method of that name has equal weights, `max_iter` and `tol`). `multislerp` is where
it begins: mergekit's has a step in the tangent space at that point, in which the weighted directions add up to 0, so that it moves nowhere.
Everything happens in the span of the inputs, over K numbers that follow from their inner products in float64.

Departs from mergekit where directions cancel: the weighted sum of the inputs, where it stops (`multislerp`); what lies opposite to the
mean, up to the rounding of float32, pulls in no direction (`karcher`), where it divides by the sine of nearly π.

Use it to average several models of one ancestor without the loss of length that a plain mean has; it costs two passes over the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from thetau._lazy import torch
from thetau.methods.fields import AtLeast, NotNegative, Origin, Shares
from thetau.methods.reductions import InSpan
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying, values_at

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHORT = 1e-8  # added to lengths, and the length below which directions cancel: multislerp's
NOTHING = 1e-8  # weights that add up to less cannot be normalised
ROUNDING = 4 * 2.0**-23  # four times float32's ε: a sine below it is rounding


@dataclass(frozen=True, kw_only=True)
class Direction(InSpan):
    """(Σ w ‖x‖) μ/‖μ‖ with μ = Σ w x/‖x‖."""

    shares: Varying
    normalise: bool

    def coefficients(self, gram: Float[Tensor, "task task"], name: str, tasks: tuple[str, ...]) -> list[float]:
        """Of each model; the weights themselves where directions cancel."""
        if len(tasks) == 1:
            return [1.0]
        weights = _weights(values_at(self.shares, name, tasks), normalise=self.normalise)
        lengths = gram.diagonal().clamp(min=0).sqrt()
        mean = weights / (lengths + SHORT)
        size = _length(mean, gram)
        if size < SHORT:
            return weights.tolist()
        return (mean * (weights @ lengths / size)).tolist()


@dataclass(frozen=True, kw_only=True)
class KarcherMean(InSpan):
    """(Σ w ‖x‖) u, u being where the weighted logarithms of all x/‖x‖ add up to 0."""

    shares: Varying
    max_iter: int
    tol: float

    def coefficients(self, gram: Float[Tensor, "task task"], name: str, tasks: tuple[str, ...]) -> list[float]:
        """Of each model."""
        if len(tasks) == 1:
            return [1.0]
        weights = _weights(values_at(self.shares, name, tasks), normalise=True)
        lengths = gram.diagonal().clamp(min=0).sqrt()
        there = lengths > self.tol
        if not bool(there.any()):
            return [0.0] * len(tasks)
        inverse = torch.where(there, 1 / lengths.where(there, torch.ones_like(lengths)), 0.0)
        cosines = gram * inverse[:, None] * inverse
        mean = self._mean(cosines, there, _weights((weights * there).tolist(), normalise=True))
        return (mean * inverse * (weights @ lengths)).tolist()

    def _mean(
        self, cosines: Float[Tensor, "task task"], there: Tensor, weights: Float[Tensor, " task"]
    ) -> Float[Tensor, " task"]:
        """The mean direction, as coefficients of the directions."""
        mean, size = weights, _length(weights, cosines)
        if size < self.tol:
            mean, size = torch.zeros_like(weights).index_fill(0, there.nonzero()[0], 1.0), 1.0
        mean = mean / size
        for _ in range(self.max_iter):
            cosine = (cosines @ mean).clamp(-1, 1)
            angle = torch.acos(cosine)
            sine = torch.sin(angle)
            pulls = there & (angle >= self.tol) & (sine > ROUNDING)
            pull = torch.where(pulls, weights * angle / sine.where(pulls, torch.ones_like(sine)), 0.0)
            step = pull - (pull @ cosine) * mean
            size = _length(step, cosines)
            if size < self.tol or size == 0:
                break
            turn = torch.tensor(size, dtype=torch.float64)
            mean = torch.cos(turn) * mean + torch.sin(turn) * step / size
            length = _length(mean, cosines)
            mean = mean / length if length > self.tol else mean
        return mean


@register("multislerp", paper="Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea")
@dataclass(frozen=True, kw_only=True)
class Multislerp(Method):
    r"""$\left(\sum_t w_t \|x_t\|\right) \mu / \|\mu\|$ with $\mu = \sum_t w_t x_t / \|x_t\|$; `karcher` without its iterations."""

    weights: Shares = 1.0
    normalise: Annotated[bool, "divide the weights by their sum first, unless it is 0."] = True
    of: Origin = "models"

    def chain(self) -> Chain:
        """Models, or task vectors."""
        return Chain(reduction=Direction(shares=self.weights, normalise=self.normalise), models=self.of == "models")


@register("karcher", paper="Karcher, CPAM 1977, https://doi.org/10.1002/cpa.3160300502")
@dataclass(frozen=True, kw_only=True)
class Karcher(Method):
    r"""$\left(\sum_t w_t \|x_t\|\right) u$ with $\sum_t w_t \log_u(x_t / \|x_t\|) = 0$.

    - `tol`: steps and angles below it are none, and what is no longer than it has no direction (its length counts all the same).
    """

    weights: Shares = 1.0
    of: Origin = "models"
    max_iter: Annotated[int, AtLeast(0), "steps at most; none of them is needed for two models."] = 10
    tol: NotNegative = 1e-5

    def chain(self) -> Chain:
        """Models, or task vectors."""
        return Chain(reduction=KarcherMean(shares=self.weights, max_iter=self.max_iter, tol=self.tol), models=self.of == "models")


def _weights(given: list[float], *, normalise: bool) -> Float[Tensor, " task"]:
    weights = torch.tensor(given, dtype=torch.float64)
    total = float(weights.sum())
    return weights / total if normalise and abs(total) >= NOTHING else weights


def _length(coefficients: Float[Tensor, " task"], gram: Float[Tensor, "task task"]) -> float:
    """‖Σ c_t x_t‖."""
    return float((coefficients @ gram @ coefficients).clamp(min=0).sqrt())
