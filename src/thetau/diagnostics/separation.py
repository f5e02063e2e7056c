r"""What disentangling does to task vectors, and which α to take.

AWD (Xiong et al. 2024, <https://arxiv.org/abs/2411.18729>): $\hat\tau_i = \tau_i - \delta$ with $\delta = \sum_k c_k \tau_k$ in the vectors' span
(`thetau.transforms.disentangle`). So the sum that task arithmetic takes is

$$\lambda \sum_i \hat\tau_i = \lambda \sum_i (1 - K c_i)\,\tau_i :$$

AWD before task arithmetic *is* task arithmetic with $\lambda_i = \lambda (1 - K c_i)$, on the tensors that AWD acts on. What it gains there is a gain of
other weights, which K numbers could be searched for directly. By row, before TIES or under `solver: adam` the sum is no such thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from thetau.checkpoint import kind_of
from thetau.diagnostics.results import Matrix, Result
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError
from thetau.facade import Expression, grams
from thetau.parts import Selection
from thetau.statistics.gram import cosines
from thetau.transforms.awd_gram import disentangled_gram, solve

if TYPE_CHECKING:
    from torch import Tensor

ALPHA, REVERSED = 1e-3, 0.5
TRIED = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # the paper's range
_NEAR = 0.1
_HALVINGS = 30


@final
@dataclass(frozen=True, kw_only=True)
class Separation(Result):
    """Of task vectors on the tensors that AWD acts on, the linear weights of the blocks.

    - `coefficients`: c, with δ = Σ c_k τ_k. `factors`: 1 − K c_i, by which task arithmetic's λ is multiplied for each task.
    - `length`: ‖δ‖. `before`, `after`: cosines; `mean_before`, `mean_after`: the means of their absolute values over pairs.
    """

    tasks: tuple[str, ...]
    alpha: float
    reverse: bool
    coefficients: dict[str, float]
    factors: dict[str, float]
    length: float
    before: Matrix
    after: Matrix
    mean_before: float
    mean_after: float


def separation(
    vectors: Mapping[str, Expression],
    *,
    alpha: float | Literal["auto"] | None = None,
    reverse: bool = False,
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Separation:
    """Solve AWD's problem for these vectors, in one pass over them.

    `alpha`: None for 1e-3, or 0.5 where `reverse`: at 1e-3 the reversed problem makes δ so long that nothing of a task is left, and the paper's tables
    show what a larger one gives. `auto`: `calibrated`. Raises `AlignmentError`: fewer than two vectors, or none with linear weights.
    """
    if len(vectors) < 2:
        raise AlignmentError(f"Disentangling is of at least two task vectors. Got {len(vectors)}.")
    names = sorted(vectors)
    gram = linear_gram([vectors[name] for name in names], exclude=exclude, engine=engine)
    chosen = calibrated(gram, reverse=reverse) if alpha == "auto" else alpha
    used = chosen if chosen is not None else REVERSED if reverse else ALPHA
    found = solve(gram, used, reverse=reverse)
    count = sum(found.alive)
    moved = disentangled_gram(gram, gram.new_tensor(found.coefficients))
    return Separation(
        tasks=tuple(names),
        alpha=used,
        reverse=reverse,
        coefficients=dict(zip(names, found.coefficients, strict=True)),
        factors={name: 1 - count * c for name, c in zip(names, found.coefficients, strict=True)},
        length=found.norm,
        before=_rows(cosines(gram)),
        after=_rows(cosines(moved)),
        mean_before=found.mean_before,
        mean_after=found.mean_after,
    )


def calibrated(gram: Tensor, *, reverse: bool = False) -> float:
    """α by a rule, without data.

    Forwards: the largest of the paper's values that leaves at most a tenth of the reduction of mean |cos| undone; a larger α moves the vectors less.
    Reversed: the α at which δ is as long as the forward one at 1e-3, so that the two are compared at one distance.
    """
    if not reverse:
        solved = {alpha: solve(gram, alpha) for alpha in TRIED}
        lowest = min(one.mean_after for one in solved.values())
        limit = lowest + _NEAR * (next(iter(solved.values())).mean_before - lowest)
        return max(alpha for alpha, one in solved.items() if one.mean_after <= limit)
    wanted = solve(gram, ALPHA).norm
    low, high = math.log(1e-6), math.log(1e6)  # ‖δ‖ falls as α rises
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if solve(gram, math.exp(middle), reverse=True).norm > wanted else (low, middle)
    return math.exp(high)


def linear_gram(vectors: Sequence[Expression], *, exclude: Sequence[str] = (), engine: Engine | None = None) -> Tensor:
    """Inner products over the linear weights of the blocks. Raises `AlignmentError`: there are none."""
    selection = Selection(tensors="linear")
    specs = vectors[0].specs()
    by_tensor = grams(vectors, exclude=exclude, engine=engine)
    taken = [
        gram
        for name, gram in by_tensor.items()
        if selection.takes(name, tuple(specs[name].shape), kind_of(name, tuple(specs[name].shape)))
    ]
    if not taken:
        raise AlignmentError("Disentangling acts on the linear weights of the blocks, and these vectors have none.")
    return sum(taken[1:], start=taken[0])


def _rows(matrix: Tensor) -> Matrix:
    return tuple(tuple(map(float, row)) for row in matrix.tolist())
