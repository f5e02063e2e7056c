"""AWD's objective as a function of K numbers and the Gram matrix, and its minimisation.

With δ = Σ c_k τ_k, g = Gc and q = cᵀGc: ⟨τ_i − δ, τ_j − δ⟩ = G_ij − g_i − g_j + q and ‖δ‖ = √q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from thetau.statistics.gram import cosines

Array = np.ndarray
STARTS = (0.02, 0.25, 0.5, 1.0)  # shares of the mean vector from which the search starts
TINY = 1e-24


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
    gram: Float[Tensor, "*batch task task"], c: Float[Tensor, "*batch task"], alpha: float, *, reverse: bool = False
) -> Float[Tensor, "*batch"]:
    """mean_{i≠j} |cos(τ_i − δ, τ_j − δ)| + α‖δ‖; the mean counts negatively where `reverse`."""
    k = gram.shape[-1]
    cos = cosines(disentangled_gram(gram, c)).abs()
    pairs = (cos.sum((-1, -2)) - cos.diagonal(dim1=-2, dim2=-1).sum(-1)) / max(1, k * (k - 1))
    norm = ((c[..., None, :] @ gram @ c[..., :, None])[..., 0, 0]).clamp(min=0).sqrt()
    return (-pairs if reverse else pairs) + alpha * norm


def solve(gram: Float[Tensor, "task task"], alpha: float, *, reverse: bool = False) -> Disentangled:
    """The best of several local minima, by SLSQP on the epigraph form (minimise Σ s_ij under −s_ij ≤ cos_ij ≤ s_ij).

    Tasks of zero norm take no part; with fewer than two tasks δ is 0.
    """
    alive = torch.diagonal(gram) > 0
    inner = gram.double()[alive][:, alive]
    c = torch.zeros(gram.shape[0], dtype=torch.float64)
    if len(inner) > 1:
        scale = float(torch.diagonal(inner).mean())
        found = _search((inner / scale).numpy(), alpha * scale**0.5, reverse)
        c[alive] = torch.from_numpy(found)
    before, after = cosines(gram.double()), cosines(disentangled_gram(gram.double(), c)[alive][:, alive])
    pairs_before, pairs_after = _pairs(before[alive][:, alive]), _pairs(after)
    loss = objective(inner, c[alive], alpha, reverse=reverse) if len(inner) else torch.tensor(0.0)
    return Disentangled(
        coefficients=c.tolist(),
        alive=alive.tolist(),
        norm=float((c @ gram.double() @ c).clamp(min=0).sqrt()),
        loss=float(loss),
        mean_before=float(pairs_before.mean()),
        mean_after=float(pairs_after.mean()),
        max_before=float(pairs_before.max()),
        max_after=float(pairs_after.max()),
    )


def _pairs(cos: Tensor) -> Tensor:
    k = cos.shape[0]
    if k < 2:
        return torch.zeros(1, dtype=cos.dtype)
    return cos[torch.triu_indices(k, k, offset=1).unbind()].abs()


def _search(gram: Array, alpha: float, reverse: bool) -> Array:
    """The best coefficients for a Gram matrix of unit scale."""
    k = len(gram)
    tensor = torch.from_numpy(gram)

    def loss(c: Array) -> float:
        return float(objective(tensor, torch.from_numpy(c), alpha, reverse=reverse))

    best = np.zeros(k)
    for share in STARTS:
        found = _slsqp(gram, alpha, np.full(k, share / k), reverse)
        if np.isfinite(found).all() and loss(found) < loss(best):
            best = found
    return best


def _slsqp(gram: Array, alpha: float, start: Array, reverse: bool) -> Array:
    k = len(gram)
    i, j = np.triu_indices(k, 1)
    pairs = len(i)

    def cos_and_slope(c: Array) -> tuple[Array, Array]:
        g = gram @ c
        inner = gram - g[:, None] - g[None, :] + c @ g
        norm = np.sqrt(np.maximum(np.diag(inner), TINY))
        cos = inner[i, j] / (norm[i] * norm[j])
        d_inner = 2 * g[None, :] - gram[i] - gram[j]  # ∂ inner_ij / ∂c
        d_norm2 = 2 * g[None, :] - 2 * gram  # ∂ inner_ii / ∂c
        slope = d_inner / (norm[i] * norm[j])[:, None] - 0.5 * cos[:, None] * (
            d_norm2[i] / norm[i][:, None] ** 2 + d_norm2[j] / norm[j][:, None] ** 2
        )
        return cos, slope

    def penalty(c: Array) -> tuple[float, Array]:
        g = gram @ c
        norm = np.sqrt(max(float(c @ g), TINY))
        return alpha * norm, alpha * g / norm

    if reverse:  # maximise the mean |cos|: smooth where no cosine is zero, so no epigraph is needed

        def plain(c: Array) -> tuple[float, Array]:
            cos, slope = cos_and_slope(c)
            value, d_value = penalty(c)
            return value - np.abs(cos).mean(), d_value - (np.sign(cos)[:, None] * slope).mean(0)

        return np.asarray(minimize(plain, start, jac=True, method="SLSQP", options={"maxiter": 200, "ftol": 1e-12}).x)

    def fun(x: Array) -> tuple[float, Array]:
        value, slope = penalty(x[:k])
        return value + x[k:].mean(), np.concatenate([slope, np.full(pairs, 1 / pairs)])

    def epigraph(x: Array) -> Array:
        cos, _ = cos_and_slope(x[:k])
        return np.concatenate([x[k:] - cos, x[k:] + cos])

    def epigraph_slope(x: Array) -> Array:
        _, slope = cos_and_slope(x[:k])
        eye = np.eye(pairs)
        return np.block([[-slope, eye], [slope, eye]])

    cos, _ = cos_and_slope(start)
    constraint = {"type": "ineq", "fun": epigraph, "jac": epigraph_slope}
    result = minimize(
        fun,
        np.concatenate([start, np.abs(cos)]),
        jac=True,
        method="SLSQP",
        constraints=[constraint],
        options={"maxiter": 300, "ftol": 1e-12},
    )
    return np.asarray(result.x[:k])


def solve_batch(
    gram: Float[Tensor, "batch task task"], alpha: float, *, reverse: bool = False, steps: int = 150
) -> Float[Tensor, "batch task"]:
    """Coefficients for many small problems at once: Adam on a smoothed |cos| that sharpens, keeping the best point of each.

    The start c = 0 is a candidate, so no problem ends above it.
    """
    k = gram.shape[-1]
    alive = gram.diagonal(dim1=1, dim2=2) > 0
    scale = (gram.diagonal(dim1=1, dim2=2).sum(1) / alive.sum(1).clamp(min=1)).clamp(min=torch.finfo(gram.dtype).tiny)
    unit = gram / scale[:, None, None]
    weight = alpha * scale.sqrt()
    c = torch.where(alive, 0.5 / k, 0.0).to(gram.dtype)
    best, best_loss = torch.zeros_like(c), _losses(unit, torch.zeros_like(c), weight, reverse)
    first, second = torch.zeros_like(c), torch.zeros_like(c)
    for step in range(1, steps + 1):
        progress = step / steps
        slope = _slopes(unit, c, weight, reverse, smooth=10 ** (-1 - 3 * progress)) * alive
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope.square()
        rate = 0.1 * (1 - progress) + 1e-4
        c = c - rate / k * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-12)
        loss = _losses(unit, c, weight, reverse)
        better = loss < best_loss
        best, best_loss = torch.where(better[:, None], c, best), torch.where(better, loss, best_loss)
    return best


def _losses(gram: Tensor, c: Tensor, weight: Tensor, reverse: bool) -> Tensor:
    norm = (c[:, None] @ gram @ c[:, :, None])[:, 0, 0].clamp(min=0).sqrt()
    return objective(gram, c, 0.0, reverse=reverse) + weight * norm


def _slopes(gram: Tensor, c: Tensor, weight: Tensor, reverse: bool, smooth: float) -> Tensor:
    """Gradient of the objective with √(cos² + smooth²) for |cos|, by the chain rule through inner, norms and cosines."""
    k = gram.shape[-1]
    g = (gram @ c[:, :, None])[:, :, 0]
    q = (c * g).sum(1)
    inner = gram - g[:, :, None] - g[:, None, :] + q[:, None, None]
    norm = inner.diagonal(dim1=1, dim2=2).clamp(min=TINY).sqrt()
    cos = inner / (norm[:, :, None] * norm[:, None, :])
    d_cos = cos / (cos.square() + smooth**2).sqrt() / (k * (k - 1))
    d_cos = d_cos - torch.diag_embed(d_cos.diagonal(dim1=1, dim2=2))
    if reverse:
        d_cos = -d_cos
    d_inner = d_cos / (norm[:, :, None] * norm[:, None, :])
    d_diagonal = -(d_cos * cos).sum(2) / norm.square()
    d_inner = d_inner + torch.diag_embed(d_diagonal)
    # inner_ij = G_ij − g_i − g_j + q, with ∂g/∂c = G and ∂q/∂c = 2g
    d_g = -2 * d_inner.sum(2)
    slope = (gram @ d_g[:, :, None])[:, :, 0] + 2 * g * d_inner.sum((1, 2))[:, None]
    return slope + (weight / q.clamp(min=TINY).sqrt())[:, None] * g
