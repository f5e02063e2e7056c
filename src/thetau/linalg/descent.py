r"""Two early-stopped ways down a quadratic that is known by its operator alone.

`descend` runs conjugate gradients (Hestenes and Stiefel, 1952) until the residual has shrunk to a share; `flow` follows gradient descent in
continuous time, as a Chebyshev polynomial of the operator. Both stay in start + range of the operator: what it does not see does not move.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, sqrt
from typing import TYPE_CHECKING, TypeAlias

from thetau._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Apply: TypeAlias = "Callable[[Tensor], Tensor]"


def descend(
    apply: Apply, residual: Tensor, *, iterations: int, tolerance: float, floor: float = 0.0, precondition: Apply | None = None
) -> Tensor:
    """The change that conjugate gradients make from a start with this residual.

    Stops at ‖residual‖ ≤ `tolerance` · its first norm (or ≤ `floor`), or after `iterations`.
    """
    norm = float(residual.norm())
    change = torch.zeros_like(residual)
    if norm <= floor or norm == 0:
        return change
    r = residual / norm
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), _dot(r, z)
    stop = max(tolerance, floor / norm)
    for _ in range(iterations):
        image = apply(p)
        curvature = _dot(p, image)
        if curvature <= 0 or rz <= 0:
            break
        step = rz / curvature
        change.add_(p, alpha=step)
        r.sub_(image, alpha=step)
        if float(r.norm()) <= stop:
            break
        z = r if precondition is None else precondition(r)
        before, rz = rz, _dot(r, z)
        p.mul_(rz / before).add_(z)
    return change * norm


def flow(apply: Apply, residual: Tensor, *, time: float, bound: float, floor: float = 0.0, accuracy: float = 1e-6) -> Tensor:
    """φ(A) R with φ(λ) = (1 − e^{−2sλ})/λ, by Chebyshev polynomials on [0, `bound`]; s = `time` / Rayleigh quotient of R.

    That quotient ⟨R, AR⟩/⟨R, R⟩ is where R lies in the spectrum of A: it does not change when dimensions are added that no task uses.
    """
    norm = float(residual.norm())
    if norm <= floor or norm == 0 or time == 0:
        return torch.zeros_like(residual)
    r = residual / norm
    unit = _dot(r, apply(r))
    if unit <= 0:
        return torch.zeros_like(residual)
    coefficients = chebyshev(time / unit, bound, accuracy)

    def shifted(x: Tensor) -> Tensor:
        return (2 / bound) * apply(x) - x

    before, now = r, shifted(r)
    total = coefficients[0] * before
    for number, c in enumerate(coefficients[1:]):
        if number:
            before, now = now, 2 * shifted(now) - before
        total.add_(now, alpha=c)
    return total * norm


def chebyshev(s: float, bound: float, accuracy: float = 1e-6) -> list[float]:
    """The coefficients of φ on [0, `bound`], as many as its largest value · `accuracy` needs."""
    degree = ceil(4 * sqrt(s * bound + 4)) + 16
    count = 4 * degree
    angle = (torch.arange(count, dtype=torch.float64) + 0.5) * torch.pi / count
    value = 0.5 * bound * (1 + angle.cos())
    phi = -torch.expm1(-2 * s * value) / value
    c: list[float] = [float((phi * (j * angle).cos()).mean()) * (1 if j == 0 else 2) for j in range(degree + 1)]
    tail = 0.0
    while len(c) > 2 and tail + abs(c[-1]) <= accuracy * 2 * s:
        tail += abs(c.pop())
    return c


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
