r"""Theorems 4.5, 4.6 and 4.8 on what task arithmetic may cost, as formulas, with the conditions under which they hold.

Zeng et al., 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>, Section 4 and Appendix A. All three
begin with local smoothness (Assumption 4.2) and a zero gradient at $\theta_i$ (Assumption 4.1):

$$\mathcal L_i(\theta^*) - \mathcal L_i(\theta_i) \le \frac{L_i}{2} \lVert \theta^* - \theta_i \rVert^2,$$

and bound the distance by $C = \max_i \lVert\tau_i\rVert^2$ and $\epsilon = \max_{i \ne j} |\cos(\tau_i, \tau_j)|$, or for 4.8 by
$\beta = \max_i \langle \tau_{tar}, \tau_i \rangle / C$.

- Addition: with $t_j = \alpha_j$, $t_k = \alpha_k - 1$ for the task k that is measured, $\sum_j t_j = 0$ and
  $\sum_{i<j} |t_i t_j| = 2t_k^2 - \frac12 \sum_j t_j^2$, so that the squared distance is at most
  $C[(1-\epsilon)\sum_j t_j^2 + 4\epsilon t_k^2] \le 2C(1+\epsilon)(1-\alpha_k)^2$. The paper drops the last factor.
- Negation: $\lVert \alpha\tau_i + \tau_j \rVert^2 \le 2C(1+\epsilon)$ for $0 \le \alpha \le 1$, and $\lVert\tau_j\rVert^2 \le C$ for
  $|\mathcal L_j(\theta_0) - \mathcal L_j(\theta_j)|$. That second step needs smoothness from below too, which Assumption 4.2 does not give; where
  $\mathcal L_j(\theta_j) \le \mathcal L_j(\theta_0)$ it is not needed, and $L_jC(1+\epsilon)$ bounds the gap already.
- Out of distribution: $\lVert \tau_{i^*} - \tau_{tar} \rVert^2 \le 2C - 2\beta C$. This needs no sign of β; the theorem's $0 < \beta$ says when it is of use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from thetau._lazy import torch
from thetau.diagnostics.results import Matrix
from thetau.statistics.gram import cosines

if TYPE_CHECKING:
    from torch import Tensor

GRADIENT = 0.1  # what the gradient may add to the second-order term and still be called negligible
_BLOCK = 1 << 20


def addition_bound(smoothness: float, size: float, epsilon: float) -> float:
    r"""Theorem 4.5: $L_i C (1 + \epsilon)$."""
    return smoothness * size * (1 + epsilon)


def negation_bound(smoothness: float, size: float, epsilon: float) -> float:
    r"""Theorem 4.6: $L_j C (\frac32 + \epsilon)$."""
    return smoothness * size * (1.5 + epsilon)


def ood_bound(smoothness: float, size: float, beta: float) -> float:
    r"""Theorem 4.8: $L_{tar} C (1 - \beta)$."""
    return smoothness * size * (1 - beta)


@final
@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition of a theorem, whether this run meets it, and what the run has."""

    rule: str
    met: bool
    got: str


def addition_condition(alphas: Sequence[float]) -> Condition:
    """Assumption 4.3."""
    total = math.fsum(alphas)
    met = all(alpha >= 0 for alpha in alphas) and math.isclose(total, 1, abs_tol=1e-9)
    return Condition(rule="α ≥ 0 and Σα = 1", met=met, got=f"Σα = {total:g}, smallest α {min(alphas):g}")


def negation_condition(alpha: float) -> Condition:
    """What the proof of Theorem 4.6 uses."""
    return Condition(rule="0 ≤ α ≤ 1", met=0 <= alpha <= 1, got=f"α = {alpha:g}")


def ood_condition(beta: float) -> Condition:
    """Assumption 4.7."""
    return Condition(rule="0 < β ≤ 1", met=0 < beta <= 1 + 1e-9, got=f"β = {beta:.3g}")


def gradient_condition(gradient: float, distances: Sequence[float], second_order: float) -> Condition:
    """Assumption 4.1, ∇L_i(θ_i) = 0, as far as it matters here: ‖∇‖ times the `distances` that the proof steps over, against L/2 times
    their squares.
    """
    most = gradient * math.fsum(distances)
    share = 0.0 if most == 0 else most / second_order if second_order else math.inf
    return Condition(
        rule=f"∇L(θ_i) ≈ 0: at most {100 * GRADIENT:g} % of the second-order term",
        met=share <= GRADIENT,
        got=f"‖∇‖ = {gradient:.3g}, which could add {100 * share:.3g} %",
    )


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How task vectors lie: their inner products `gram`, in the order of `names`."""

    names: tuple[str, ...]
    gram: Tensor

    @classmethod
    def of(cls, vectors: Mapping[str, Mapping[str, Tensor]]) -> Geometry:
        """Of name → τ; a tensor that one lacks counts as 0 there. Summed in float64, a million elements at a time."""
        listed = list(vectors.values())
        total = torch.zeros(len(listed), len(listed), dtype=torch.float64)
        for name in dict.fromkeys(name for vector in listed for name in vector):
            size = next(vector[name].numel() for vector in listed if name in vector)
            for start in range(0, size, _BLOCK):
                width = min(_BLOCK, size - start)
                rows = torch.zeros(len(listed), width, dtype=torch.float64)
                for row, vector in zip(rows, listed, strict=True):
                    if name in vector:
                        row.copy_(vector[name].reshape(-1)[start : start + width])
                total += rows @ rows.T
        return cls(names=tuple(vectors), gram=(total + total.T) / 2)

    @property
    def size(self) -> float:
        """C = max ‖τ‖²."""
        return float(self.gram.diagonal().max())

    @property
    def cosine(self) -> Matrix:
        """Of each pair; a zero vector has 0."""
        return tuple(tuple(float(value) for value in row) for row in cosines(self.gram))

    @property
    def epsilon(self) -> float:
        """ε = max |cos| over pairs."""
        cosine = self.cosine
        return max((abs(cosine[i][j]) for i in range(len(cosine)) for j in range(i)), default=0.0)

    def squared(self, coefficients: Mapping[str, float]) -> float:
        """‖Σ c_j τ_j‖²."""
        weights = torch.tensor([coefficients.get(name, 0.0) for name in self.names], dtype=torch.float64)
        return max(0.0, float(weights @ self.gram @ weights))

    def distance(self, coefficients: Mapping[str, float], task: str) -> float:
        """‖θ* − θ_task‖ for θ* = θ₀ + Σ c_j τ_j."""
        return math.sqrt(self.squared(away(coefficients, task)))

    def nearest(self, target: str) -> tuple[str, float]:
        """The other vector with the largest inner product with the target's, and that product over C: β. β of zero vectors is 0."""
        place = self.names.index(target)
        products = {name: float(self.gram[place, i]) for i, name in enumerate(self.names) if i != place}
        best = max(products, key=lambda name: products[name])
        return best, products[best] / self.size if self.size else 0.0


def away(coefficients: Mapping[str, float], task: str) -> dict[str, float]:
    """The coefficients of θ* − θ_task in the task vectors."""
    return {**coefficients, task: coefficients.get(task, 0.0) - 1}
