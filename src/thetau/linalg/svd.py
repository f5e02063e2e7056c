r"""Singular values and vectors: whole, by the Gram matrix of the smaller side, or by a random sketch where that is cheaper.

A Gram matrix squares singular values. In float64 that loses nothing of a float32 matrix: a value σ comes out with an error of
ε₆₄ σ₁²/σ and its vectors with ε₆₄ (σ₁/σ)² at most, where float32 entries alone leave σ known to ε₃₂ σ₁, which is more for all
σ > ε₃₂ σ₁ / 2³⁰. The larger side is never decomposed, and one symmetric eigenproblem costs a half to a tenth of a decomposition
in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.gram import add_upper
from thetau.linalg.rounding import eps
from thetau.linalg.sketch import Bits, gaussian

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OVERSAMPLE, POWERS = 16, 2
EIGEN = 22.0  # float32 operations a side cubed that an eigendecomposition in float64 takes the time of
PIECE = 4096  # rows that are in float64 at once
LOST = 1e-3  # of a direction, that rounding in float32 may turn it by


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


def decomposed(matrix: Float[Tensor, "rows columns"], rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, r]`, s `[r]` and V `[columns, r]` in float64, of the directions of a float32 matrix that are more than rounding; the first `rank`."""
    s, basis = spectrum(matrix)
    return _both(matrix, s[:rank], basis[:, :rank])


def spectrum(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "small r"]]:
    """Singular values, falling, and the vectors of the smaller side (the left one of a square) in float64, without what is rounding in float32."""
    tall = _tall(matrix)
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for piece in torch.split(tall, PIECE):
        add_upper(gram, piece.double())
    values, vectors = torch.linalg.eigh(gram, UPLO="U")
    s = values.flip(0).clamp(min=0).sqrt()
    return s[: (rank := seen(s, s, tuple(matrix.shape)))], vectors.flip(1)[:, :rank]


def polar(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " r"]]:
    """U Vᵀ, and the singular values; directions that are rounding are 0 in it, so that it is a partial isometry.

    M (MᵀM)^(−1/2), or (MMᵀ)^(−1/2) M where M is wide. A product in float32 turns the direction of σ by ε₃₂ σ₁/σ at most, about; it is one
    in float64 where that is more than `LOST` for some direction.
    """
    s, basis = spectrum(matrix)
    tall = _tall(matrix)
    if len(s) and float(s[0]) * eps(torch.float32) <= LOST * float(s[-1]):
        root = (basis / s).to(matrix) @ basis.T.to(matrix)
        return (matrix @ root if tall is matrix else root @ matrix), s.to(matrix)
    root = (basis / s) @ basis.T
    nearest = torch.cat([(piece.double() @ root).to(matrix) for piece in torch.split(tall, PIECE)])
    return (nearest if tall is matrix else nearest.T.contiguous()), s.to(matrix)


def truncated_svd(matrix: Float[Tensor, "d_out d_in"], rank: int, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """U `[d_out, r]`, s `[r]`, V `[d_in, r]`; by a random sketch (Halko et al., SIAM Review 2011) where that is the cheaper way.

    The sketch is a function of `bits` alone. Whichever way, Uᵀ M V = diag(s) to rounding, and U and V are orthonormal.
    """
    rows, columns = matrix.shape
    small = min(rows, columns)
    width = rank + OVERSAMPLE
    if not sketched(rows, columns, rank):
        if matrix.dtype == torch.float32 and rank < small:
            s, basis = spectrum(matrix)
            if len(s) >= rank:
                u, s, v = _both(matrix, s[:rank], basis[:, :rank])
                return u.to(matrix), s.to(matrix), v.to(matrix)
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


def _tall(matrix: Tensor) -> Tensor:
    """With at least as many rows as columns; a square is turned, so that its columns are the left side."""
    return matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix


def _both(matrix: Tensor, s: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V in float64 from the vectors of the smaller side."""
    tall = _tall(matrix)
    other = torch.cat([piece.double() @ basis for piece in torch.split(tall, PIECE)]) / s
    return (other, s, basis) if tall is matrix else (basis, s, other)


def sketched(rows: int, columns: int, rank: int) -> bool:
    """Whether a sketch costs less than a whole decomposition."""
    return 6 * (rank + OVERSAMPLE) <= min(rows, columns)


def truncated_flops(rows: int, columns: int, rank: int) -> float:
    """Operations of `truncated_svd`, about: as many as a float32 product makes in the same time, measured at sides of 1024 and 2816."""
    entries, small = rows * columns, min(rows, columns)
    if sketched(rows, columns, rank):
        return 20.0 * rank * entries
    if rank < small:
        return 2.5 * entries * small + EIGEN * small**3 + 4.0 * rank * entries
    return 8.0 * entries * small + 34.0 * small**3


def polar_flops(rows: int, columns: int) -> float:
    """Operations of `polar`, likewise."""
    entries, small = rows * columns, min(rows, columns)
    return 4.5 * entries * small + (EIGEN + 2.0) * small**3


def orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """The polar factor: the nearest matrix with orthonormal columns (rows, where there are more columns than rows).

    Columns that hang together have no nearest one: what is left of them is orthonormal in the span that they have, and 0 outside.
    """
    return polar(columns)[0]


def seen(values: Float[Tensor, " r"], against: Float[Tensor, " s"], shape: tuple[int, ...]) -> int:
    """How many singular values of a float32 matrix are more than the rounding of the largest of `against`."""
    return int((values > against[0] * max(shape) * eps(torch.float32)).sum())
