r"""Sums of Kronecker products as operators on matrices.

The operator is X ↦ Σ_i w_i H_i X G_i with H_i = L_i diag(h_i) L_iᵀ and G_i = R_i diag(g_i) R_iᵀ, neither of which is ever formed. Where one
side is the identity for all, the other's sum is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.descent import Apply, flow
from thetau.linalg.rounding import Spectrum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Term:
    """One task's w H ⊗ G and what it wants of τ, with H = L diag(h) Lᵀ + `h_rest` and G = R diag(g) Rᵀ + `g_rest`.

    `target` is Lᵀ τ R, or its diagonal where L and R are τ's own singular vectors; `rows` is Lᵀ τ and `columns` τ R where they are not
    and there is a rest. A side that is None is the identity; then its values are 1 and nothing has a rest.
    """

    left: Tensor | None  # [d_out, a]
    h: Tensor  # [a] or [1]
    right: Tensor | None  # [d_in, b]
    g: Tensor  # [b] or [1]
    target: Tensor  # [a, b] or [a]
    h_rest: float = 0.0
    g_rest: float = 0.0
    rows: Tensor | None = None  # [a, d_in]
    columns: Tensor | None = None  # [d_out, b]
    weight: float = 1.0

    def inside(self, x: Tensor) -> Tensor:
        """Lᵀ X R, the longer dimension first out of the way."""
        if self.left is not None and self.right is not None and x.shape[0] < x.shape[1]:
            return self.left.T @ (x @ self.right)
        if self.left is not None:
            x = self.left.T @ x
        return x if self.right is None else x @ self.right

    def apply(self, x: Tensor) -> Tensor:
        """W H X G, but for w · `h_rest` · `g_rest` · X."""
        if not self.rest:
            return self._outside(self._weigh(self.inside(x)))
        assert self.left is not None and self.right is not None
        columns = x @ self.right
        return self._spread(self.left.T @ columns, self.left.T @ x, columns)

    def residual(self, start: Tensor) -> Tensor:
        """W H (τ − start) G but for the same; cancelled in the small matrices, before anything is multiplied back."""
        gap = -self.inside(start)
        (gap if self.target.ndim == 2 else gap.diagonal()).add_(self.target)
        if not self.rest:
            return self._outside(self._weigh(gap))
        assert self.left is not None and self.right is not None
        rows = self.target[:, None] * self.right.T if self.rows is None else self.rows
        columns = self.left * self.target if self.columns is None else self.columns
        return self._spread(gap, rows - self.left.T @ start, columns - start @ self.right)

    @property
    def rest(self) -> bool:
        """Whether what L and R leave out has a weight."""
        return self.h_rest > 0 or self.g_rest > 0

    @property
    def traces(self) -> tuple[float, float]:
        """Of H and of G, a side that is the identity counting 1."""
        d_out, d_in = (0 if basis is None else len(basis) for basis in (self.left, self.right))
        return float(self.h.sum()) + self.h_rest * d_out, float(self.g.sum()) + self.g_rest * d_in

    def scaled(self, factor: float) -> Term:
        """With another weight."""
        return replace(self, weight=self.weight * factor)

    def _weigh(self, y: Tensor) -> Tensor:
        return y * (self.weight * self.h)[:, None] * self.g

    def _outside(self, y: Tensor) -> Tensor:
        """L y Rᵀ, the longer dimension last."""
        if self.left is not None and self.right is not None and len(self.left) < len(self.right):
            return (self.left @ y) @ self.right.T
        if self.right is not None:
            y = y @ self.right.T
        return y if self.left is None else self.left @ y

    def _spread(self, inner: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """L h (inner · g Rᵀ + `g_rest` · rows) + `h_rest` · columns · g Rᵀ, times w."""
        assert self.left is not None and self.right is not None
        middle = self._weigh(inner) @ self.right.T
        middle.addcmul_(self.h[:, None], rows, value=self.weight * self.g_rest)
        return torch.addmm(self.left @ middle, columns * (self.weight * self.h_rest * self.g), self.right.T)


@dataclass(frozen=True, kw_only=True)
class OneSided:
    """X ↦ X A, or A X where `left`, whatever the number of tasks: Σ w_i G_i summed up, and B = Σ w_i τ_i G_i."""

    gram: Tensor  # A, [side, side]
    target: Tensor  # B, [d_out, d_in]
    left: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """X A or A X."""
        return self.gram @ x if self.left else x @ self.gram

    def residual(self, start: Tensor) -> Tensor:
        """B − start · A: minus half the gradient there."""
        return self.target - self.apply(start)

    def flow(self, residual: Tensor, *, time: float, floor: float = 0.0) -> Tensor:
        """R Q φ(Λ) Qᵀ with φ(λ) = (1 − e^{−2sλ})/λ, A = QΛQᵀ and s = `time` / mean of the eigenvalues that are not 0.

        In a direction whose λ is no more than A's own rounding R has only rounding too, and nothing moves.
        """
        if float(residual.norm()) <= floor:
            return torch.zeros_like(residual)
        spectrum = Spectrum.of(self.gram)
        growth, vectors = spectrum.flow(time / float(spectrum.values[spectrum.seen].mean())), spectrum.vectors
        change: Tensor = residual @ vectors * growth @ vectors.T if not self.left else vectors * growth @ (vectors.T @ residual)
        return change

    def compressed(self) -> tuple[OneSided, Tensor | None, Tensor | None]:
        """Itself."""
        return self, None, None

    def preconditioner(self, damping: float) -> Apply:
        """(A + δ)⁻¹ on its side; `damping` is δ as a share of the largest eigenvalue."""
        inverse = damped_inverse(self.gram, damping)
        return lambda x: inverse @ x if self.left else x @ inverse

    def to(self, dtype: torch.dtype, unit: float) -> OneSided:
        """A / `unit` in another precision; B is left as it is."""
        return replace(self, gram=(self.gram / unit).to(dtype))


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """The operator; `terms` are of one dtype. `pull` is Σ w_i · `h_rest` · `g_rest` · τ_i, where there are rests."""

    terms: Sequence[Term]
    shape: tuple[int, int]
    pull: Tensor | None = None

    @property
    def rest(self) -> float:
        """Σ w_i · `h_rest` · `g_rest`: what every direction has."""
        return sum(term.weight * term.h_rest * term.g_rest for term in self.terms)

    def apply(self, x: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Σ w_i H_i X G_i."""
        total = self.terms[0].apply(x)
        for term in self.terms[1:]:
            total += term.apply(x)
        return total.add_(x, alpha=self.rest) if self.rest else total

    def residual(self, start: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Σ w_i H_i (τ_i − start) G_i: minus half the gradient there."""
        total = self.terms[0].residual(start)
        for term in self.terms[1:]:
            total += term.residual(start)
        return total if self.pull is None else total.add_(self.pull).add_(start, alpha=-self.rest)

    def flow(self, residual: Tensor, *, time: float, floor: float = 0.0) -> Tensor:
        """As `flow` below does it."""
        return flow(self.apply, residual, time=time, bound=self.bound(), floor=floor)

    def bound(self) -> float:
        """No eigenvalue is larger."""
        return sum(term.weight * (float(term.h.max()) + term.h_rest) * (float(term.g.max()) + term.g_rest) for term in self.terms)

    def compressed(self) -> tuple[Kronecker, Tensor | None, Tensor | None]:
        """The same operator on its range, with the bases that lead back: X = P Y Qᵀ.

        A side is compressed where all its factors together have fewer columns than it has dimensions; LoRA's always have. Where
        there are rests, the range is everything.
        """
        if any(term.rest for term in self.terms):
            return self, None, None
        left = _span([term.left for term in self.terms], self.shape[0])
        right = _span([term.right for term in self.terms], self.shape[1])
        terms = [
            replace(
                term,
                left=term.left if left is None or term.left is None else left.T @ term.left,
                right=term.right if right is None or term.right is None else right.T @ term.right,
            )
            for term in self.terms
        ]
        shape = tuple(d if basis is None else basis.shape[1] for basis, d in zip((left, right), self.shape, strict=True))
        return Kronecker(terms=terms, shape=(shape[0], shape[1])), left, right

    def preconditioner(self, damping: float) -> Apply:
        """(H̄ + δ)⁻¹ X (Ḡ + δ)⁻¹, H̄ and Ḡ being the means of the factors, each weighted by the trace of the other side.

        - `damping`: δ, as a share of the mean's largest eigenvalue.
        """
        sides: list[Tensor | None] = []
        for of, d in (("left", self.shape[0]), ("right", self.shape[1])):
            if getattr(self.terms[0], of) is None:
                sides.append(None)
                continue
            mean = torch.zeros(d, d, dtype=self.terms[0].target.dtype)
            for term in self.terms:
                first = of == "left"
                basis, own, rest = (term.left, term.h, term.h_rest) if first else (term.right, term.g, term.g_rest)
                other = term.weight * term.traces[1 if first else 0]
                assert basis is not None
                mean += (basis * (own * other)) @ basis.T
                mean.diagonal().add_(rest * other)
            sides.append(damped_inverse(mean, damping))

        def solve(x: Tensor) -> Tensor:
            y = x if sides[0] is None else sides[0] @ x
            return y if sides[1] is None else y @ sides[1]

        return solve


def _span(bases: Sequence[Tensor | None], dimension: int) -> Tensor | None:
    kept = [basis for basis in bases if basis is not None]
    if len(kept) < len(bases) or sum(basis.shape[1] for basis in kept) >= dimension:
        return None
    q: Tensor = torch.linalg.qr(torch.cat(kept, 1)).Q
    return q


def damped_inverse(matrix: Float[Tensor, "side side"], damping: float) -> Float[Tensor, "side side"]:
    """(M/λ + damping)⁻¹, λ being the largest eigenvalue of a positive semidefinite M."""
    values, vectors = torch.linalg.eigh(matrix)
    inverse: Tensor = (vectors / (values.clamp(min=0) / values[-1] + damping)) @ vectors.T
    return inverse
