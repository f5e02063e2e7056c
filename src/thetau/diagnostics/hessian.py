r"""The Hessian of a task's mean loss as an operator, and its spectral norm by power iteration.

Zeng et al., 2025, <https://arxiv.org/abs/2502.01015>: Assumption 4.2 takes $L_i = \lVert H(\theta_i) \rVert_2$ and Section 6.2.1 estimates it by
power iteration (von Mises and Pollaczek-Geiringer, 1929), since the matrix itself, parameters by parameters, fits nowhere.

What is watched is $\lVert Hv \rVert = (v^\top H^2 v)^{1/2}$, the root of the Rayleigh quotient of $H^2$. It never falls from one iteration to
the next, never exceeds the spectral norm, and tends to it even where two extreme eigenvalues differ in nothing but their sign, where the
quotient $v^\top H v$ stands still at a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import functional_call

from thetau.errors import DataError
from thetau.models import Encoder
from thetau.models.dual import math_attention
from thetau.pace import counted, doing
from thetau.tasks.encoding import ordered_batches
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs

TOLERANCE, MAX_ITERATIONS = 1e-3, 100
_STEADY = 2  # small changes in a row: a single one may be chance


@final
@dataclass(frozen=True, kw_only=True)
class Smoothness:
    r"""An estimate of $\lVert H \rVert_2$, from below. For a unit vector v, the last of the iteration:

    - `value`: ‖Hv‖. `eigenvalue`: λ = v·Hv, with its sign. `residual`: ‖Hv − λv‖ / |λ|, None where λ is 0; some eigenvalue of H lies within
      that share of λ.
    - `change`: of `value` in the last iteration, relative. `converged`: it was at most `tolerance` twice in a row, within the
      iterations that were allowed. Where it is not, the norm may be well above `value`.
    """

    value: float
    eigenvalue: float
    residual: float | None
    iterations: int
    change: float | None
    tolerance: float
    converged: bool


@final
class LossOperator:
    """The mean loss of `head` on `inputs` as a function of the parameters `names` of `encoder`'s module, at what it runs with now.

    All else is held fixed, the head above all. Examples are read in batches and their losses weighed by their number, so that batches do
    not show. Vectors are lists of tensors in the order of `names`.
    """

    def __init__(self, encoder: Encoder, head: AnyHead, inputs: Inputs, names: Sequence[str]) -> None:
        parameters = dict(encoder.module.named_parameters())
        unknown = [name for name in names if name not in parameters]
        if unknown or not names:
            raise DataError(
                f"a Hessian is over parameters of the model, at least one. Got {unknown[0] if unknown else 'none'!r}, "
                f"where the model has {', '.join(list(parameters)[:3])}, …"
            )
        self._module, self._head, self._inputs, self._names = encoder.module.eval(), head, inputs, list(names)
        self._values = [parameters[name].detach() for name in names]

    def start(self, seed: int = 0) -> list[Tensor]:
        """A random vector of unit length, always the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(value.shape, generator=generator).to(value) for value in self._values]
        length = _norm(made)
        return [part / length for part in made]

    def gradient(self) -> list[Tensor]:
        """Of the mean loss. Raises `DataError` where it is not finite."""
        return self._sum(lambda leaves, loss: torch.autograd.grad(loss, leaves, materialize_grads=True))

    def product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v, by differentiating ⟨∇, v⟩ once more. Raises `DataError` where it is not finite."""

        def twice(leaves: Sequence[Tensor], loss: Tensor) -> Sequence[Tensor]:
            first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            inner = torch.stack([(slope * part).sum() for slope, part in zip(first, vector, strict=True)]).sum()
            if not inner.requires_grad:  # the loss is linear in the parameters
                return [torch.zeros_like(leaf) for leaf in leaves]
            return torch.autograd.grad(inner, leaves, materialize_grads=True)

        return self._sum(twice)

    def _sum(self, derivative: Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """A derivative of the mean loss, batch after batch; no batch's graph outlives it."""
        total = [torch.zeros_like(value) for value in self._values]
        with doing("a derivative of the loss"), counted(sum(self._inputs.lengths), "tokens") as advance:
            for indices in ordered_batches(self._inputs.lengths):
                leaves = [value.detach().requires_grad_() for value in self._values]
                # Fused attention has no second derivative.
                with torch.enable_grad(), math_attention():
                    given = dict(zip(self._names, leaves, strict=True))
                    features = functional_call(self._module, given, (), self._inputs.batch(indices))
                    loss = self._head.loss(features.float(), self._inputs.targets(indices)) * (len(indices) / len(self._inputs))
                    found = derivative(leaves, loss)
                for sum_, part in zip(total, found, strict=True):
                    sum_.add_(part.detach())
                del features, loss, found  # before the next batch's graph is made
                advance(sum(self._inputs.lengths[i] for i in indices))
        if not all(bool(torch.isfinite(part).all()) for part in total):
            raise DataError("a derivative of the loss is NaN or infinite at these weights, so that no bound follows from it.")
        return total


def spectral_norm(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    start: Sequence[Tensor],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Smoothness:
    """‖H‖₂ of a symmetric operator by power iteration from `start`, a unit vector. Raises `DataError` for options out of range."""
    if not 0 < tolerance < 1 or max_iterations < 1:
        raise DataError(
            f"power iteration needs a tolerance between 0 and 1 and at least one iteration. Got {tolerance!r} and {max_iterations!r}."
        )
    vector, value, change, steady = list(start), 0.0, None, 0
    eigenvalue, residual, done = 0.0, None, 0
    for done in range(1, max_iterations + 1):
        image = list(product(vector))
        before, value = value, _norm(image)
        eigenvalue = dot(vector, image)
        residual = None
        if eigenvalue:
            residual = _distance(image, vector, eigenvalue) / abs(eigenvalue)
        if value == 0:  # nothing but 0 follows
            change, steady = 0.0, _STEADY
            break
        if done > 1:
            change = abs(value - before) / value
            steady = steady + 1 if change <= tolerance else 0
        if steady >= _STEADY:
            break
        vector = image
        for part in vector:
            part.mul_(1 / value)
    return Smoothness(
        value=value,
        eigenvalue=eigenvalue,
        residual=residual,
        iterations=done,
        change=change,
        tolerance=tolerance,
        converged=steady >= _STEADY,
    )


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all their tensors, summed in float64."""
    return math.fsum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def _norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in a))


def _distance(a: Sequence[Tensor], b: Sequence[Tensor], factor: float) -> float:
    """‖a − factor · b‖, without a third vector in memory."""
    squares = (float(torch.linalg.vector_norm(x - factor * y, dtype=torch.float64)) ** 2 for x, y in zip(a, b, strict=True))
    return math.sqrt(math.fsum(squares))
