r"""References as sketches: of what stands in for a task's inputs the leading directions, and one weight for all others.

A task's Gram matrix τᵀτ = V s² Vᵀ is a sample of what its inputs look like, and its small eigenvalues are the sample's noise. A sketch has
the r leading ones, V_r s_r² V_rᵀ, and c for every direction: what is left of the trace, spread evenly over the d − r dimensions outside
(`flat`), or 0 (`drop`). r is a number, or as large as the spectrum asks (`thetau.linalg.leading.followed`) within what the joint span of all tasks
can hold at a profit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from thetau.linalg.leading import FIRST, Leading, followed, leading, leading_flops
from thetau.linalg.sketch import Bits
from thetau.methods.fields import Directions
from thetau.methods.quadratic import Quadratic
from thetau.parts import Cost

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TOLERANCE = 0.2  # of ‖τ‖² may lie outside the directions of `auto`; measured, see docs/sketches.md
SMALLEST = 256  # a smaller side is decomposed whole sooner than it is sketched
EXPECTED = 64  # directions of a task that the plan counts for `auto`, which only the values tell
Count = int | Literal["auto", "full"]
Counted = Annotated[
    int | str,
    Directions(),
    "directions of each task that stand in for its inputs: a number, as many as its spectrum asks for (`auto`), or all (`full`).",
]
Tail = Literal["flat", "drop"]
Tailed = Annotated[
    Tail, "what the other directions weigh: all the same (`flat`), by what they hold of ‖τ_i‖², or nothing (`drop`)."
]


@dataclass(frozen=True)
class Sketch:
    """RᵀR + c in the place of a Gram matrix: the `rows` R, `images` τRᵀ, and c, the `rest`."""

    rows: Float[Tensor, "r d_in"]
    images: Float[Tensor, "d_out r"]
    rest: float


def limit(shape: tuple[int, int], tasks: int) -> int:
    """The most directions of a task with which a sketch is cheaper than the whole: together no more than d_in, and half of the smaller side."""
    return max(1, min(shape[1] // tasks, min(shape) // 2))


def directions(vector: Float[Tensor, "d_out d_in"], count: Count, tasks: int, square: float, bits: Bits) -> Leading | None:
    """The leading directions of a vector that is not zero; None where all of them are wanted, or are as cheap."""
    shape = (vector.shape[0], vector.shape[1])
    most = limit(shape, tasks)
    if count == "auto":
        found = followed(vector, most, bits, tolerance=TOLERANCE, square=square)
        return found if found.enough else None
    if count == "full" or int(count) > most:
        return None
    return leading(vector, int(count), bits, square=square)


def sketch(found: Leading, tail: Tail, *, power: float = 1.0, scale: float = 1.0) -> Sketch:
    """The sketch of `scale` · (MᵀM)^power, M being the vector at unit length."""
    d_in, r = found.vectors.shape
    small = min(found.images.shape[0], d_in)
    length = found.square**0.5
    values = found.values / length
    weights, rest = values ** (2 * power), 0.0
    if tail == "flat" and found.rest > 0 and small > r:
        left = small - r
        rest = left / (d_in - r) * (found.rest / found.square / left) ** power
    roots = (scale * (weights - rest).clamp(min=0)).sqrt()
    return Sketch(
        rows=roots.to(found.vectors)[:, None] * found.vectors.T,
        images=found.images * roots.to(found.images),
        rest=scale * rest,
    )


def taken(
    total: Quadratic,
    vector: Float[Tensor, "d_out d_in"],
    count: Count,
    tail: Tail,
    weight: float,
    bits: Bits,
    squares: Float[Tensor, " d_out"],
) -> bool:
    """Whether one task more, whose own Gram matrix is its reference, has been taken in as a sketch.

    `squares` are the squared lengths of the vector's rows, not all 0.
    """
    square = float(squares.sum())
    found = directions(vector, count, total.sketches, square, bits)
    if found is None:
        total.unfold()
        return False
    made = sketch(found, tail, scale=square)
    total.take_sketch(vector, made.rows, made.images, made.rest, weight, squares)
    return True


def sketched_cost(shape: tuple[int, int], tasks: int, count: Count) -> Cost:
    """Operations and working memory of one matrix: the sketches, and the solution in their joint span."""
    d_out, d_in = shape
    entries = d_out * d_in
    each = min(limit(shape, tasks), EXPECTED if count == "auto" else int(count))
    width = tasks * each
    build = tasks * leading_flops(d_out, d_in, each)
    solve = 2.0 * width * entries * (2 + 1 + 1) + 2.0 * width**2 * d_in + 9.0 * width**3 + 6.0 * width**2 * d_out
    memory = 8 * entries + width * (3 * d_in + 4 * d_out) + 8 * width**2
    return Cost(flops=build + solve, memory=4 * memory)


def whole(count: Count, shape: tuple[int, int], tasks: int) -> bool:
    """Whether nothing is sketched whatever the values."""
    if count == "auto":
        return min(shape) < SMALLEST or limit(shape, tasks) < FIRST
    return count == "full" or int(count) > limit(shape, tasks)
