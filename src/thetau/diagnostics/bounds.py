r"""What task arithmetic costs in loss, beside what theory says that it may cost.

Zeng et al., 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>: Theorems 4.5, 4.6 and 4.8 (the
formulas are in `theorems`), Figs. 3 and 6, Tables 3 and 9. The losses, gradients and Hessians are all of the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from thetau.diagnostics.gaps import Comparison, Gaps, HalfSum, TaskConstants
from thetau.diagnostics.hessian import MAX_ITERATIONS, TOLERANCE, LossOperator, dot, spectral_norm
from thetau.diagnostics.results import Correlation, Matrix, Result, correlate
from thetau.diagnostics.theorems import Geometry
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.spaces import WeightSpace
from thetau.pace import each

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Bounds(Result):
    """Constants, bounds and gaps of some task vectors over one base.

    - `size`: C = max ‖τ‖². `epsilon`: max |cos|. `parameters`: how many numbers the vectors move, which is where the Hessian lives.
    - `by_task`: for each target alone, cosine and gap over the other vectors (Fig. 3 fixes the target).
    - `correlations`: over all ordered pairs: cosine and gap; L and gap; second-order term and gap.
    """

    tasks: tuple[str, ...]
    split: str
    parameters: int
    size: float
    epsilon: float
    constants: tuple[TaskConstants, ...]
    cosine: Matrix
    comparisons: tuple[Comparison, ...]
    halves: tuple[HalfSum, ...]
    by_task: dict[str, Correlation]
    correlations: tuple[Correlation, ...]

    @property
    def unconverged(self) -> tuple[str, ...]:
        """Tasks whose L is only a lower estimate."""
        return tuple(one.task for one in self.constants if one.smoothness is not None and not one.smoothness.converged)


def bounds(
    space: WeightSpace,
    evaluator: Evaluator,
    vectors: Mapping[str, Mapping[str, Tensor]],
    *,
    split: str = "test",
    scale: float | None = None,
    smoothness: bool = True,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Bounds:
    """Measure `vectors` (task → τ by the checkpoint's names), which `space` holds too.

    - `scale`: besides the mean, α = 1/T, add the vectors with this λ each: outside the conditions unless it is 1/T.
    - `smoothness`: find the Hessians' norms, by far the longest part; without them there are gaps and constants, and no bounds.

    Raises `DataError`: fewer than two vectors, a `scale` that is not finite, options of the iteration out of range.
    """
    names = tuple(vectors)
    if len(names) < 2:
        raise DataError(f"the bounds are about several task vectors; at least two are needed. Got {len(names)}.")
    if scale is not None and not math.isfinite(scale):
        raise DataError(f"`scale` must be a finite number. Got {scale!r}.")
    live = {name: evaluator.encoder.parameters(vector) for name, vector in vectors.items()}
    moved = [
        key for key in dict.fromkeys(key for tau in live.values() for key in tau) if any(_moves(live[n], key) for n in names)
    ]
    if not moved:
        raise DataError("the task vectors are all zero on the model's parameters, so that there is nothing to bound.")
    live = {name: {key: tau[key] for key in moved if key in tau} for name, tau in live.items()}
    geometry = Geometry.of(live)
    start = evaluator.encoder.parameters(space.weights({}))
    theta = math.sqrt(float(Geometry.of({"base": {key: start[key] for key in moved}}).gram[0, 0]))
    before = {name: loss.value for name, loss in space.losses({}, names, split).items()}
    constants, slopes = [], {}
    for name in each("task", names):
        own = space.losses({name: 1.0}, [name], split)[name]
        evaluator.encoder.load(space.weights({name: 1.0}), name)
        operator = LossOperator(evaluator.encoder, evaluator.heads[name], evaluator.inputs(name, split), moved)
        gradient = operator.gradient()
        steep = math.sqrt(dot(gradient, gradient))
        slopes[name] = {other: _along(gradient, moved, live[other]) for other in names}
        del gradient  # as long as the model
        found = None
        if smoothness:
            found = spectral_norm(operator.product, operator.start(), tolerance=tolerance, max_iterations=max_iterations)
        norm = math.sqrt(geometry.squared({name: 1.0}))
        constants.append(
            TaskConstants(
                task=name,
                n=own.n,
                norm=norm,
                ratio=norm / theta if theta else 0.0,
                gradient=steep,
                smoothness=found,
                base=before[name],
                own=own.value,
            )
        )
    evaluator.load_base()
    measured = Gaps(space=space, split=split, geometry=geometry, constants={c.task: c for c in constants}, slopes=slopes)
    halves = measured.halves()
    by_task = {
        name: correlate(*_columns([half for half in halves if half.task == name], "cosine"), names=("cosine", "loss gap"))
        for name in names
    }
    pooled = [correlate(*_columns(halves, "cosine"), names=("cosine", "loss gap"))]
    if smoothness:
        pooled.append(correlate(*_columns(halves, "smoothness"), names=("L", "loss gap")))
        pooled.append(correlate(*_columns(halves, "second_order"), names=("second-order term", "loss gap")))
    return Bounds(
        tasks=names,
        split=split,
        parameters=sum(start[key].numel() for key in moved),
        size=geometry.size,
        epsilon=geometry.epsilon,
        constants=tuple(constants),
        cosine=geometry.cosine,
        comparisons=(*measured.addition(scale), *measured.negation(), *measured.out_of_distribution()),
        halves=halves,
        by_task=by_task,
        correlations=tuple(pooled),
    )


def _moves(vector: Mapping[str, Tensor], name: str) -> bool:
    return name in vector and bool(vector[name].any())


def _along(gradient: Sequence[Tensor], names: Sequence[str], vector: Mapping[str, Tensor]) -> float:
    pairs = [(slope, vector[name]) for slope, name in zip(gradient, names, strict=True) if name in vector]
    return dot(*zip(*pairs, strict=True)) if pairs else 0.0


def _columns(halves: Sequence[HalfSum], name: str) -> tuple[list[float], list[float]]:
    return [getattr(half, name) for half in halves], [half.gap for half in halves]
