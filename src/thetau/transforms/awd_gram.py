"""AWD's objective as a function of K numbers and the Gram matrix, and its minimisation.

With δ = Σ c_k τ_k, g = Gc and q = cᵀGc: ⟨τ_i − δ, τ_j − δ⟩ = G_ij − g_i − g_j + q and ‖δ‖ = √q.

Many problems are solved at once: each |x| is replaced by √(x² + μ²), of which x²/2√(x₀² + μ²) is a majorant up to a constant, so that a step
is a damped least-squares problem in K numbers; μ falls geometrically to where it no longer counts. Problems that are posed one at a time
get more starts, and a polish on the epigraph form, which knows no μ.

Vectors that depend on each other leave combinations that are nothing but rounding; coefficients along them would grow without end. So c is
kept to the directions that the Gram matrix's spectrum shows (`thetau.linalg.gram.span`). Where there is only one, all vectors lie on a line,
no δ changes a cosine, and δ is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.linalg.gram import span
from thetau.linalg.threads import one_thread
from thetau.statistics.gram import cosines

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
SHARES = (0.3, 0.6, 1.0)  # of the mean vector, from which the search starts
GONE = 1e-8  # a vector whose square δ has brought below this share of the mean square has no direction left
TINY = 1e-24
STEPS = 60
SMOOTH = (0.3, 1e-9)  # μ of the first step and of the last


@dataclass(frozen=True)
class Disentangled:
    """δ's coefficients, and what it brought: mean and largest |cos| over pairs before and after, ‖δ‖, the objective."""

    coefficients: list[float]
    alive: list[bool]
    norm: float
    loss: float
    mean_before: float
    mean_after: float
    max_before: float
    max_after: float


def disentangled_gram(
    gram: Float[Tensor, "*batch task task"], c: Float[Tensor, "*batch task"]
) -> Float[Tensor, "*batch task task"]:
    """The Gram matrix of τ_i − δ."""
    g = (gram @ c[..., None])[..., 0]
    q = (c * g).sum(-1)
    return gram - g[..., :, None] - g[..., None, :] + q[..., None, None]


def objective(
    gram: Float[Tensor, "*batch task task"], c: Float[Tensor, "*batch task"], alpha: float | Tensor, *, reverse: bool = False
) -> Float[Tensor, "*batch"]:
    """mean_{i≠j} |cos(τ_i − δ, τ_j − δ)| + α‖δ‖ over the tasks that are not zero; the mean counts negatively where `reverse`.

    A vector that δ takes away whole has no cosine. It counts as the worst one, or removing everything would be the best of all.
    """
    both = _both(gram)
    inner = disentangled_gram(gram, c)
    size = inner.diagonal(dim1=-2, dim2=-1)
    gone = size < GONE * _scale(gram)[..., None]
    lost = gone[..., :, None] | gone[..., None, :]
    cos = cosines(inner).abs().masked_fill(lost, 0.0 if reverse else 1.0).masked_fill(~both, 0)
    pairs = cos.sum((-1, -2)) / both.sum((-1, -2)).clamp(min=1)
    norm = ((c[..., None, :] @ gram @ c[..., :, None])[..., 0, 0]).clamp(min=0).sqrt()
    return (-pairs if reverse else pairs) + alpha * norm


def solve(gram: Float[Tensor, "task task"], alpha: float, *, reverse: bool = False) -> Disentangled:
    """The best of several local minima. Tasks of zero norm take no part; with fewer than two tasks δ is 0."""
    with one_thread():
        return _solve(gram.double(), alpha, reverse)


def _solve(gram: Float[Tensor, "task task"], alpha: float, reverse: bool) -> Disentangled:
    alive = torch.diagonal(gram) > 0
    inner = gram[alive][:, alive]
    c = torch.zeros(gram.shape[0], dtype=torch.float64)
    loss = objective(inner, c[alive], alpha, reverse=reverse)
    onto, seen = span(inner)
    if int(seen.sum()) > 1:
        scale = _scale(inner)
        unit, weight = inner / scale, alpha * float(scale) ** 0.5
        k = len(inner)
        anywhere = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (0.5 / k) ** 0.5
        starts = torch.cat([_starts(k, thorough=True), anywhere])
        many = unit.expand(len(starts), k, k)
        rough = solve_batch(many, weight, reverse=reverse, starts=starts[None], steps=2 * STEPS)
        rough = rough[objective(many, rough, weight, reverse=reverse).argsort()]
        polished = [_polish(unit.numpy(), weight, start.numpy(), reverse) for start in (rough if reverse else rough[:3])]
        for one in (rough[0], *(onto @ torch.from_numpy(point) for point in polished)):
            value = objective(inner, one, alpha, reverse=reverse)
            if value < loss:
                loss, c[alive] = value, one
    before = cosines(inner).abs()
    after = cosines(disentangled_gram(inner, c[alive])).abs()
    return Disentangled(
        coefficients=c.tolist(),
        alive=alive.tolist(),
        norm=float((c @ gram @ c).clamp(min=0).sqrt()),
        loss=float(loss),
        mean_before=float(_pairs(before).mean()),
        mean_after=float(_pairs(after).mean()),
        max_before=float(_pairs(before).max()),
        max_after=float(_pairs(after).max()),
    )


def solve_batch(
    gram: Float[Tensor, "batch task task"],
    alpha: float | Tensor,
    *,
    reverse: bool = False,
    starts: Float[Tensor, "start #batch task"] | None = None,
    steps: int = STEPS,
) -> Float[Tensor, "batch task"]:
    """Coefficients for many small problems at once, each the best point met from all starts.

    The point c = 0 is a candidate, so no problem ends above it.
    """
    n, k = gram.shape[:2]
    alive = gram.diagonal(dim1=1, dim2=2) > 0
    scale = _scale(gram)
    unit, weight = gram / scale[:, None, None], alpha * scale.sqrt()
    onto, seen = span(gram)
    onto = onto * (seen.sum(1) > 1)[:, None, None]
    best = torch.zeros(n, k, dtype=gram.dtype)
    loss = objective(unit, best, weight, reverse=reverse)
    for start in _starts(k, thorough=reverse)[:, None] if starts is None else starts:
        c = torch.where(alive, start.to(gram.dtype) * k / alive.sum(1, keepdim=True).clamp(min=1), 0.0)
        best, loss = _descend(unit, onto, _along(onto, c), weight, reverse, steps, best, loss)
    return best


def _both(gram: Tensor) -> Bool[Tensor, "*batch task task"]:
    """The pairs of different tasks of which neither is zero."""
    alive = gram.diagonal(dim1=-2, dim2=-1) > 0
    return alive[..., :, None] & alive[..., None, :] & ~torch.eye(gram.shape[-1], dtype=torch.bool)


def _scale(gram: Tensor) -> Float[Tensor, "*batch"]:
    """The mean square of the vectors that are not zero."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return (squares.sum(-1) / (squares > 0).sum(-1).clamp(min=1)).clamp(min=torch.finfo(gram.dtype).tiny)


def _starts(k: int, *, thorough: bool) -> Float[Tensor, "start task"]:
    """Shares of the mean vector; where `thorough`, one near it and half of every single vector too."""
    means = torch.tensor(SHARES, dtype=torch.float64)[:, None].expand(-1, k) / k
    return torch.cat([means, means[:1] / 20, 0.5 * torch.eye(k, dtype=torch.float64)]) if thorough else means


def _pairs(cos: Tensor) -> Tensor:
    k = cos.shape[0]
    if k < 2:
        return torch.zeros(1, dtype=cos.dtype)
    return cos[torch.triu_indices(k, k, offset=1).unbind()].abs()


def _along(onto: Tensor, c: Tensor) -> Float[Tensor, "batch task"]:
    return (onto @ c[:, :, None])[:, :, 0]


def _descend(
    gram: Tensor, onto: Tensor, c: Tensor, weight: Tensor, reverse: bool, steps: int, best: Tensor, best_loss: Tensor
) -> tuple[Float[Tensor, "batch task"], Float[Tensor, "batch"]]:
    """Damped steps from `c` under a falling μ, kept to the span by `onto`.

    A step that does not lower its smoothed objective is not taken, and damping grows.
    """
    first, last = SMOOTH
    damping = torch.full_like(weight, 1e-3)
    lift = 1e-14 * torch.eye(gram.shape[-1], dtype=gram.dtype)
    for step in range(steps):
        mu = first * (last / first) ** (step / max(1, steps - 1))
        value, slope, curvature = _model(gram, c, weight, reverse, mu)
        damped = curvature + damping[:, None, None] * gram + lift * (1 + damping[:, None, None])
        factor, bad = torch.linalg.cholesky_ex(damped)
        move = torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
        trial = c - _along(onto, torch.where((bad == 0)[:, None] & move.isfinite(), move, 0))
        better = _smoothed(gram, trial, weight, reverse, mu) < value
        c = torch.where(better[:, None], trial, c)
        damping = torch.where(better, damping / 5, damping * 5).clamp(1e-9, 1e9)
        loss = objective(gram, c, weight, reverse=reverse)
        lower = loss < best_loss
        best, best_loss = torch.where(lower[:, None], c, best), torch.where(lower, loss, best_loss)
    return best, best_loss


def _geometry(gram: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, q, the norms of τ_i − δ `[batch, task]` and the cosines `[batch, task, task]`."""
    g = (gram @ c[:, :, None])[:, :, 0]
    q = (c * g).sum(1).clamp(min=0)
    inner = gram - g[:, :, None] - g[:, None, :] + q[:, None, None]
    norm = inner.diagonal(dim1=1, dim2=2).clamp(min=TINY).sqrt()
    return g, q, norm, inner / (norm[:, :, None] * norm[:, None, :])


def _smoothed(gram: Tensor, c: Tensor, weight: Tensor, reverse: bool, mu: float) -> Float[Tensor, "batch"]:
    """The objective with √(x² + μ²) for every |x| and for ‖δ‖."""
    both = _both(gram)
    _, q, _, cos = _geometry(gram, c)
    pairs = (cos.square() + mu**2).sqrt().masked_fill(~both, 0).sum((1, 2)) / both.sum((1, 2)).clamp(min=1)
    return (-pairs if reverse else pairs) + weight * (q + mu**2).sqrt()


def _model(
    gram: Tensor, c: Tensor, weight: Tensor, reverse: bool, mu: float
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch task"], Float[Tensor, "batch task task"]]:
    """The smoothed objective, its gradient, and the curvature of its majorant (of the mean's mirror image where `reverse`)."""
    both = _both(gram)
    i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], offset=1)
    share = both[:, i, j] * 2 / both.sum((1, 2)).clamp(min=1)[:, None]
    g, q, norm, cosine = _geometry(gram, c)
    cos = cosine[:, i, j]
    away = (g[:, None, :] - gram) / norm[:, :, None]  # ∂‖τ_i − δ‖ / ∂c
    slope = (2 * g[:, None, :] - gram[:, i] - gram[:, j]) / (norm[:, i] * norm[:, j])[:, :, None]
    slope = slope - cos[:, :, None] * (away[:, i] / norm[:, i, None] + away[:, j] / norm[:, j, None])
    size = (cos.square() + mu**2).sqrt()
    length = (q + mu**2).sqrt()
    pull = share / size
    pairs = (share * size).sum(1)
    rise = ((pull * cos)[:, :, None] * slope).sum(1)
    curvature = slope.transpose(1, 2) @ (pull[:, :, None] * slope)
    sign = -1 if reverse else 1
    return (
        sign * pairs + weight * length,
        sign * rise + (weight / length)[:, None] * g,
        curvature + (weight / length)[:, None, None] * gram,
    )


def _polish(gram: Array, weight: float, start: Array, reverse: bool) -> Array:
    """SLSQP from a point that is nearly a minimum: the |cos| near zero in epigraph form (s under −s ≤ cos ≤ s), the others as they are."""
    k = len(gram)
    i, j = np.triu_indices(k, 1)

    def measure(c: Array) -> tuple[Array, Array]:
        """The cosines of all pairs and their slopes."""
        g = gram @ c
        inner = gram - g[:, None] - g[None, :] + c @ g
        norm = np.sqrt(np.maximum(np.diag(inner), TINY))
        away = (g - gram) / norm[:, None] ** 2
        cos = inner[i, j] / (norm[i] * norm[j])
        return cos, (2 * g - gram[i] - gram[j]) / (norm[i] * norm[j])[:, None] - cos[:, None] * (away[i] + away[j])

    cos, _ = measure(start)
    kinks = np.zeros(len(i), dtype=bool)
    if not reverse:  # a mean that is maximised has no minimum at its kinks
        kinks[np.argsort(np.abs(cos))[: 2 * k]] = True

    def cost(x: Array) -> tuple[float, Array]:
        c, slack = x[:k], x[k:]
        g = gram @ c
        norm = np.sqrt(max(float(c @ g), TINY))
        cos, slope = measure(c)
        sign = np.where(kinks, 0, np.sign(cos)) * (-1 if reverse else 1)
        value = weight * norm + (sign @ cos + slack.sum()) / len(i)
        return value, np.concatenate([weight * g / norm + sign @ slope / len(i), np.full(len(slack), 1 / len(i))])

    def room(x: Array) -> Array:
        cos = measure(x[:k])[0][kinks]
        return np.concatenate([x[k:] - cos, x[k:] + cos])

    def room_slope(x: Array) -> Array:
        slope = measure(x[:k])[1][kinks]
        eye = np.eye(len(slope))
        return np.block([[-slope, eye], [slope, eye]])

    from scipy.optimize import minimize  # slow to load, and few runs need it

    found = minimize(
        cost,
        np.concatenate([start, np.abs(cos[kinks])]),
        jac=True,
        method="SLSQP",
        constraints=[] if reverse else [{"type": "ineq", "fun": room, "jac": room_slope}],
        options={"maxiter": 100, "ftol": 1e-13},
    )
    return np.where(np.isfinite(found.x[:k]).all(), found.x[:k], start)
