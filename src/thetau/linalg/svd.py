r"""Singular values and vectors: whole, by the Gram matrix of the smaller side, or by a random sketch where that is cheaper.

A Gram matrix squares singular values. In float64 that loses nothing of a float32 matrix: a value σ comes out with an error of
ε₆₄ σ₁²/σ and its vectors with ε₆₄ (σ₁/σ)² at most, where float32 entries alone leave σ known to ε₃₂ σ₁, which is more for all
σ > ε₃₂ σ₁ / 2³⁰. The larger side is never decomposed, and one symmetric eigenproblem costs a half to a tenth of a decomposition
in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.rounding import eps
from thetau.linalg.sketch import Bits, gaussian

OVERSAMPLE, POWERS = 16, 2
EIGEN = 22.0  # float32 operations a side cubed that an eigendecomposition in float64 takes the time of


def svd(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vᵀ, without the vectors of zeros; by LAPACK's QR iteration where divide and conquer does not converge.

    That happens to nearly orthonormal columns, whose singular values are all but equal.
    """
    try:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if not bool(matrix.isfinite().all()):
            raise
        import scipy.linalg  # slow to load, and few runs need it

        found = scipy.linalg.svd(matrix.numpy(force=True), full_matrices=False, lapack_driver="gesvd")
        u, s, vt = (torch.from_numpy(one).to(matrix) for one in found)
    return u, s, vt


def decomposed(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, r]`, s `[r]` and V `[columns, r]` in float64, of the directions of a float32 matrix that are more than rounding."""
    exact = matrix.double()
    s, basis = spectrum(exact)
    if matrix.shape[0] <= matrix.shape[1]:
        return basis, s, (exact.T @ basis) / s
    return (exact @ basis) / s, s, basis


def spectrum(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "small r"]]:
    """Singular values, falling, and the vectors of the smaller side (the left one of a square) in float64, without what is rounding in float32."""
    exact = matrix.double()
    values, vectors = torch.linalg.eigh(exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact)
    s = values.flip(0).clamp(min=0).sqrt()
    return s[: (rank := seen(s, s, tuple(matrix.shape)))], vectors.flip(1)[:, :rank]


def polar(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " r"]]:
    """U Vᵀ, and the singular values; directions that are rounding are 0 in it, so that it is a partial isometry.

    M (MᵀM)^(−1/2), or (MMᵀ)^(−1/2) M where M is wide.
    """
    s, basis = spectrum(matrix)
    root = (basis / s) @ basis.T
    exact = matrix.double()
    nearest = root @ exact if matrix.shape[0] <= matrix.shape[1] else exact @ root
    return nearest.to(matrix), s.to(matrix)


def truncated_svd(matrix: Float[Tensor, "d_out d_in"], rank: int, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """U `[d_out, r]`, s `[r]`, V `[d_in, r]`; by a random sketch (Halko et al., SIAM Review 2011) where that is the cheaper way.

    The sketch is a function of `bits` alone. Whichever way, Uᵀ M V = diag(s) to rounding, and U and V are orthonormal.
    """
    rows, columns = matrix.shape
    small = min(rows, columns)
    width = rank + OVERSAMPLE
    if not sketched(rows, columns, rank):
        if matrix.dtype == torch.float32 and rank < small:
            u, s, v = decomposed(matrix)
            if len(s) >= rank:
                return u[:, :rank].to(matrix), s[:rank].to(matrix), v[:, :rank].to(matrix)
        u, s, vt = svd(matrix)  # zeros have vectors, too
        return u[:, :rank], s[:rank], vt[:rank].T
    wide = matrix if rows <= columns else matrix.T  # [small, large]
    basis = torch.linalg.qr(wide @ gaussian(wide.shape[1], width, bits).to(matrix)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    inner, s, vt = svd(basis.T @ wide)
    rank = min(rank, small)
    u, v = basis @ inner[:, :rank], vt[:rank].T
    return (u, s[:rank], v) if rows <= columns else (v, s[:rank], u)


def sketched(rows: int, columns: int, rank: int) -> bool:
    """Whether a sketch costs less than a whole decomposition."""
    return 6 * (rank + OVERSAMPLE) <= min(rows, columns)


def truncated_flops(rows: int, columns: int, rank: int) -> float:
    """Operations of `truncated_svd`, about: as many as a float32 product makes in the same time, measured at sides of 1024 and 2816."""
    entries, small = rows * columns, min(rows, columns)
    if sketched(rows, columns, rank):
        return 20.0 * rank * entries
    if rank < small:
        return 4.0 * entries * small + EIGEN * small**3 + 4.0 * rank * entries
    return 8.0 * entries * small + 34.0 * small**3


def polar_flops(rows: int, columns: int) -> float:
    """Operations of `polar`, likewise."""
    entries, small = rows * columns, min(rows, columns)
    return 8.0 * entries * small + (EIGEN + 4.0) * small**3


def orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """The polar factor: the nearest matrix with orthonormal columns (rows, where there are more columns than rows).

    Columns that hang together have no nearest one: what is left of them is orthonormal in the span that they have, and 0 outside.
    """
    return polar(columns)[0]


def seen(values: Float[Tensor, " r"], against: Float[Tensor, " s"], shape: tuple[int, ...]) -> int:
    """How many singular values of a float32 matrix are more than the rounding of the largest of `against`."""
    return int((values > against[0] * max(shape) * eps(torch.float32)).sum())
