"""Singular values and vectors: whole, or by a random sketch where that is cheaper."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.linalg.rounding import eps
from thetau.linalg.sketch import Bits, gaussian

OVERSAMPLE, POWERS = 16, 2


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


def truncated_svd(matrix: Float[Tensor, "d_out d_in"], rank: int, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """U `[d_out, r]`, s `[r]`, V `[d_in, r]`; by a random sketch (Halko et al., SIAM Review 2011) where that is the cheaper way.

    The sketch is a function of `bits` alone. Whichever way, Uᵀ M V = diag(s) to rounding, and U and V are orthonormal.
    """
    rows, columns = matrix.shape
    small = min(rows, columns)
    width = rank + OVERSAMPLE
    if not sketched(rows, columns, rank):
        u, s, vt = svd(matrix)
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
    """Operations of `truncated_svd`, about."""
    entries, small = rows * columns, min(rows, columns)
    return 20.0 * rank * entries if sketched(rows, columns, rank) else 6.0 * entries * small + 20.0 * small**3


def orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """The polar factor: the nearest matrix with orthonormal columns (rows, where there are more columns than rows)."""
    u, _, vt = svd(columns)
    nearest: Tensor = u @ vt
    return nearest


def seen(values: Float[Tensor, " r"], against: Float[Tensor, " s"], shape: tuple[int, ...]) -> int:
    """How many singular values of a float32 matrix are more than the rounding of the largest of `against`."""
    return int((values > against[0] * max(shape) * eps(torch.float32)).sum())
