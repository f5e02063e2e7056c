"""What the spectral methods share: ranks, truncated factors of the tasks, and what decompositions cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.leading import energy, followed, leading, leading_flops
from thetau.linalg.sketch import Bits
from thetau.linalg.svd import PIECE, orthonormal, polar_flops, seen, truncated_flops, truncated_svd
from thetau.methods.sketched import EXPECTED, SMALLEST
from thetau.parts import Cost

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

DROPPED = 0.3  # of a task's energy may go with `auto`; measured, see docs/sketches.md
FIRST = 48  # directions of the first block with `auto`: fewer passes over a matrix than by small blocks, and mostly enough
PROBE = 64  # directions that a vector of low rank may have to be told as one


@dataclass(kw_only=True)
class Factors:
    """The tasks' truncated factors; with rank min / K they are together as large as two matrices, whatever K.

    A task whose vector is all zero, of which any singular vectors are as good as others, is left out. A vector of low rank has as many
    singular vectors as its rank, found without a decomposition. With `auto` each has the fewest that leave out no more than `DROPPED` of
    its energy, or no more than noise (`thetau.linalg.leading.followed`), at most `rank`; but all where its first block holds all of it, as
    with LoRA.
    """

    shape: tuple[int, int]
    rank: int
    auto: bool = False
    left: list[Tensor] = field(default_factory=list)  # [d_out, rank] each
    values: list[Tensor] = field(default_factory=list)  # [rank] each
    right: list[Tensor] = field(default_factory=list)  # [d_in, rank] each

    def take(self, vector: Float[Tensor, "d_out d_in"], bits: Bits) -> None:
        """Take in one task."""
        square = energy(vector)
        if square == 0:
            return
        if self.auto:
            found = followed(vector, self.rank, bits, tolerance=DROPPED, square=square, first=FIRST)
            found = found.least(DROPPED) if found.rest else found
        elif self.rank >= 2 * PROBE:
            found = leading(vector, PROBE, bits, square=square)
        else:
            found = None
        if found is not None and (found.rest == 0 or (self.auto and found.enough)):
            u, s, v = (found.images / found.values).to(vector), found.values.to(vector), found.vectors
        else:
            u, s, v = truncated_svd(vector, self.rank, bits)
            kept = seen(s, s, self.shape)
            u, s, v = u[:, :kept], s[:kept], v[:, :kept]
        self.left.append(u)
        self.values.append(s)
        self.right.append(v)

    def covers(self) -> tuple[Float[Tensor, "d_out all"], Float[Tensor, "d_in all"]]:
        """The nearest orthonormal matrices to all left vectors, and to all right ones, side by side."""
        left, right = (orthonormal(torch.cat(side, 1)) for side in (self.left, self.right))
        return left, right


def begun(shape: tuple[int, int], rank: int | float | str | None, tasks: int) -> Factors:
    """None yet; `auto` is for matrices that are sketched sooner than decomposed."""
    return Factors(shape=shape, rank=rank_of(rank, min(shape), tasks), auto=follows(rank, shape))


def follows(rank: int | float | str | None, shape: tuple[int, ...]) -> bool:
    """Whether the spectrum settles how many singular vectors a task keeps."""
    return rank == "auto" and min(shape) >= SMALLEST


def rank_of(rank: int | float | str | None, small: int, tasks: int, cut: Callable[[float], int] = int) -> int:
    """Singular vectors of one task where the smaller dimension is `small`: as given, a share of it, or its K-th part; at least 1.

    `full` is the K-th part too, and it is the most that `auto` gives.

    `cut` makes an integer of a share.
    """
    if rank is None or isinstance(rank, str):
        return max(1, small // tasks)
    return min(small, rank if isinstance(rank, int) else max(1, cut(rank * small)))


def factoring(shape: tuple[int, int], rank: int | float | str | None, tasks: int) -> tuple[float, int]:
    """Operations of the factors of all tasks, and how many singular vectors they have together, about, where `auto` settles it."""
    most = rank_of(rank, min(shape), tasks)
    if follows(rank, shape):
        each = min(most, EXPECTED)
        return tasks * leading_flops(*shape, each), tasks * each
    return tasks * truncating(shape, most), tasks * most


def factoring_memory(shape: tuple[int, ...], rank: int | float | str | None, width: int) -> int:
    """Numbers in float32 for the largest decomposition: of a task's vector, unless it is sketched, or of all singular vectors together."""
    return decomposing_memory(min(width, *shape) if follows(rank, shape) else min(shape))


def truncating(shape: tuple[int, ...], rank: int) -> float:
    """Operations of one truncated decomposition."""
    d_out, d_in = shape
    return truncated_flops(d_out, d_in, rank)


def procrustes(shape: tuple[int, ...], width: int) -> float:
    """Operations of the covers of so many singular vectors of all tasks."""
    d_out, d_in = shape
    return polar_flops(d_out, width) + polar_flops(d_in, width)


def polar_cost(shape: tuple[int, ...]) -> Cost:
    """Operations and working memory of one polar factor, whose Gram matrix is in float64."""
    d_out, d_in = shape
    entries, small = d_out * d_in, min(d_out, d_in)
    return Cost(flops=polar_flops(d_out, d_in), memory=4 * (3 * entries + decomposing_memory(small)))


def decomposing_memory(small: int) -> int:
    """Numbers in float32 that fill as much memory as one eigendecomposition of that side, and the rows that are in float64 beside it."""
    return 11 * small**2 + 4 * PIECE * small
