r"""The weight-disentanglement error over a grid of coefficients.

Ortiz-Jimenez et al., NeurIPS 2023, <https://arxiv.org/abs/2305.12827>; Eq. 2 of the τJp paper (at the classifier) and of the attention-only
paper (at the representation, Fig. 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Literal, final

from thetau._lazy import torch
from thetau.diagnostics.results import Matrix, Result
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.spaces import Space
from thetau.pace import counted, doing, each

if TYPE_CHECKING:
    from torch import Tensor

GRID = tuple(round(-2 + 4 * i / 14, 12) for i in range(15))
"""The attention-only paper's: 15 values in [−2, 2]."""


@final
@dataclass(frozen=True, kw_only=True)
class Disentanglement(Result):
    r"""$\xi(\alpha_1, \alpha_2) = \sum_t E_{x \in D_t}[\mathrm{dist}(f(x;\theta_0 + \alpha_t\tau_t),\, f(x;\theta_0 + \alpha_1\tau_1 + \alpha_2\tau_2))]$.

    - `error[i][j]`: at α₁ = `grid[i]`, α₂ = `grid[j]`, the sum of the two `parts`.
    - `distance`: `disagreement`, the share of examples whose predicted label differs (each part in 0..1); `kl`, the divergence of
      the softmax of the features in nats, of the single vector from both, and where `symmetric` the mean of both directions.
    - `n`: the examples that were really averaged, of each task.
    - `features`: `unit`, brought to unit length; `raw`, as the papers' code takes them.
    """

    tasks: tuple[str, str]
    space: str
    split: str
    grid: tuple[float, ...]
    distance: Literal["disagreement", "kl"]
    symmetric: bool
    n: dict[str, int]
    parts: dict[str, Matrix]
    error: Matrix
    features: Literal["unit", "raw"] = "unit"

    @property
    def cells(self) -> list[float]:
        """Every error of the grid."""
        return [value for row in self.error for value in row]

    @property
    def inside(self) -> list[float]:
        """Those where both α are in 0..1, in which they are sought."""
        held = [place for place, alpha in enumerate(self.grid) if 0 <= alpha <= 1]
        return [self.error[i][j] for i in held for j in held]


def disentanglement(
    space: Space,
    evaluator: Evaluator,
    tasks: tuple[str, str],
    *,
    grid: Sequence[float] = GRID,
    distance: Literal["disagreement", "kl"] = "disagreement",
    symmetric: bool = True,
    split: str = "test",
    name: str = "weights",
) -> Disentanglement:
    """Measure ξ for the vectors of two tasks in `space`; `name` is what the result calls the space.

    `symmetric` is for `kl`: halved sum of both directions, as the authors' code; the paper writes one. Raises `DataError`.
    """
    if tasks[0] == tasks[1]:
        raise DataError(f"the disentanglement error is of two different tasks. Got {tasks[0]!r} twice.")
    if not grid or not all(map(isfinite, grid)) or any(a >= b for a, b in pairwise(grid)):
        raise DataError(f"the grid of α must be finite numbers that rise. Got {list(grid)}.")
    if distance not in ("disagreement", "kl"):
        raise DataError(f"`distance` must be disagreement or kl. Got {distance!r}.")
    parts: dict[str, Matrix] = {}
    n: dict[str, int] = {}
    for place, task in enumerate(each("task", tasks)):
        head = evaluator.heads[task]

        def told(features: Tensor) -> Tensor:
            return head.predict(features) if distance == "disagreement" else features.double().log_softmax(-1)  # noqa: B023

        alone = [told(space.features({task: alpha}, task, split)) for alpha in grid]
        rows = []
        with doing(f"{tasks[0]} with {tasks[1]} on {task}"), counted(len(grid) ** 2, "points") as advance:
            for i, first in enumerate(grid):
                row = []
                for j, second in enumerate(grid):
                    both = told(space.features({tasks[0]: first, tasks[1]: second}, task, split))
                    found = _distance(alone[(i, j)[place]], both, distance, symmetric)
                    row.append(float(found.mean()))
                    n[task] = len(found)
                    advance(1)
                rows.append(tuple(row))
        parts[task] = tuple(rows)
    a, b = (parts[task] for task in tasks)
    return Disentanglement(
        tasks=tasks,
        space=name,
        split=split,
        grid=tuple(map(float, grid)),
        distance=distance,
        symmetric=symmetric and distance == "kl",
        n=n,
        parts=parts,
        features="raw" if evaluator.encoder.raw else "unit",
        error=tuple(tuple(x + y for x, y in zip(one, other, strict=True)) for one, other in zip(a, b, strict=True)),
    )


def _distance(alone: Tensor, both: Tensor, distance: str, symmetric: bool) -> Tensor:
    """Of each example: `[example]` labels, or `[example, feature]` log-probabilities."""
    if distance == "disagreement":
        return (alone != both).double()
    forward = divergence(alone, both)
    return (forward + divergence(both, alone)) / 2 if symmetric else forward


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats along the last axis, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=torch.zeros((), dtype=p.dtype))
