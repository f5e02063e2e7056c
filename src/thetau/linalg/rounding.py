r"""What is below the rounding of its own inputs is zero, so that no solver steps on it.

Task vectors are float32: an entry stands for itself up to ε = 2⁻²³ of it. So x Fᵀ is known to ε ‖x‖ √tr A over all its entries, A being FᵀF;
and an entry of A, as a product in float32, to ε √(A_kk A_jj) (Cauchy and Schwarz), hence x A to ε ‖x‖ √(max A_kk · tr A) where errors are
independent. Two conclusions are drawn from that, with a margin of 4 that stands for the lengths of sums (blocked sums of n terms err by
far less than n roundings):

- **a residual** R = B − τ₀A cancels terms of that size. A row of R that is no longer than the bound is zero (`settled`). Rows are problems of
  their own, so nothing of the others is lost. Entries that are below the same bound with the ε of what they were *accumulated* in
  (float64) are zero too: there the float32 inputs cancelled exactly.
- **a spectrum**: an eigenvalue of a positive semidefinite A `[n, n]` that is no larger than √n ε times the largest one, ε being that of A's
  own sums, is zero (`Spectrum`): random errors of entries add up to an operator of that norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from thetau._lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

MARGIN = 4.0
PIECE = 64


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def settled(
    residual: Float[Tensor, "row column"],
    rows: Float[Tensor, " row"],
    columns: Float[Tensor, " column"],
    whole: float,
    *,
    inputs: torch.dtype,
) -> Float[Tensor, "row column"]:
    """The residual, in place, with zeros for what is rounding.

    Args:
        residual: differences of inner products, accumulated in their own dtype.
        rows: lengths of the vectors that stand left in the products, for each row.
        columns: the same for those on the right: |entry| ≤ row · column before anything cancels.
        whole: the size of a row as a whole: what rounds independently adds up to ε · row · whole.
        inputs: the precision to which the vectors themselves are known.
    """
    for part, length in zip(torch.split(residual, PIECE), torch.split(rows, PIECE), strict=True):  # few rows at once, for memory
        part.masked_fill_(part.abs() <= MARGIN * eps(part.dtype) * length[:, None] * columns, 0)
        part.masked_fill_((part.norm(dim=1) <= MARGIN * eps(inputs) * length * whole)[:, None], 0)
    return residual


@dataclass(frozen=True)
class Spectrum:
    """A positive semidefinite matrix Q diag(values) Qᵀ, its eigenvalues ascending, and which of them are more than rounding."""

    values: Float[Tensor, " side"]
    vectors: Float[Tensor, "side side"]
    seen: Bool[Tensor, " side"]

    @staticmethod
    def of(matrix: Float[Tensor, "side side"], *, margin: float = 1.0) -> Spectrum:
        """Decompose; what is rounding follows from the matrix's own dtype.

        With the usual margin of 4 a float64 Gram matrix of vectors of low rank has its zeros as zeros though their entries are float32: those
        roundings add eigenvalues of about ε²/3 of the mean one, ε being float32's, and 4√n times float64's is more.
        """
        values, vectors = torch.linalg.eigh(matrix)
        return Spectrum(values, vectors, values > margin * sqrt(len(values)) * eps(values.dtype) * values[-1])

    def inverse(self, shift: float = 0.0) -> Float[Tensor, " side"]:
        """1/(λ + shift) where λ is seen, else 0."""
        return torch.where(self.seen, 1 / (self._above_zero + shift), 0)

    def flow(self, time: float) -> Float[Tensor, " side"]:
        """φ(λ) = (1 − e^{−2sλ})/λ where λ is seen, else 0: how far gradient descent in continuous time has come at s = `time`."""
        return torch.where(self.seen, -torch.expm1(-2 * time * self.values) / self._above_zero, 0)

    @property
    def _above_zero(self) -> Tensor:
        return self.values.clamp(min=torch.finfo(self.values.dtype).tiny)
