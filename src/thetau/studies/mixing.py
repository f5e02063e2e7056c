r"""Task vectors of two bases, mixed: what a wrong base costs in accuracy.

Zeng et al., 2025, "Efficient Model Editing with Task Vector Bases", <https://arxiv.org/abs/2502.01015>, Table 2. Its rows say where the models
$\theta_i$ were fine-tuned from, its columns which $\theta_0$ is used, and a task vector is $\theta_i - \theta_0$ for *that* $\theta_0$, so that
vectors of the other base's models hold the whole way between the two. In `50/50` each task has half of each. The paper leaves open
whether there the other half is taken from its own base instead: that is `minus="own"`.

Since $\theta_0 + \alpha \sum_t (\theta_t - \theta_0) = (1 - T\alpha)\,\theta_0 + \alpha \sum_t \theta_t$, the base cancels at α = 1/T, where the
other's row is the mean of the other's models: the wrong base does its harm at any other α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.means import average
from thetau.evaluate.measures import Measure
from thetau.evaluate.spaces import WeightSpace
from thetau.evaluate.tuned import difference

Row = Literal["own", "50/50", "other"]
_ROWS: dict[Row, float] = {"own": 1.0, "50/50": 0.5, "other": 0.0}


@final
@dataclass(frozen=True, kw_only=True)
class Family:
    """A base and what was fine-tuned from it: `models` is task → weights, all under the base's names.

    `evaluator` measures what is built on this base, with its heads; two families may share one.
    """

    name: str
    evaluator: Evaluator
    base: Mapping[str, Tensor]
    models: Mapping[str, Mapping[str, Tensor]]


@final
@dataclass(frozen=True, kw_only=True)
class MixedCell:
    """θ₀ + α Σ τ over the base `base`. `norm`: the largest ‖τ‖ of a task here. `absolute`: the mean over tasks, in 0..1."""

    base: str
    row: Row
    norm: float
    accuracy: dict[str, Measure]
    absolute: float


@final
@dataclass(frozen=True, kw_only=True)
class MixedBases:
    """Table 2: a cell for each of the two bases and each of own, 50/50 and other."""

    tasks: tuple[str, ...]
    split: str
    alpha: float
    minus: Literal["used", "own"]
    cells: tuple[MixedCell, ...]

    def cell(self, base: str, row: Row) -> MixedCell:
        """One of them. Raises `DataError`."""
        for cell in self.cells:
            if (cell.base, cell.row) == (base, row):
                return cell
        raise DataError(f"no cell {row!r} over the base {base!r}. Bases: {', '.join(dict.fromkeys(c.base for c in self.cells))}.")


def mixed_bases(
    first: Family, second: Family, *, alpha: float, split: str = "test", minus: Literal["used", "own"] = "used"
) -> MixedBases:
    """Add vectors of own models, of the other's, and of half of each, over both bases.

    `minus`: what the other's vectors are taken from: the base that is used, as in the paper, or their own. Raises `DataError`: other
    tasks, other tensors, names that are the same.
    """
    _check(first, second, alpha, minus)
    tasks = tuple(first.models)
    cells = []
    for used, other in ((first, second), (second, first)):
        start = used.base if minus == "used" else other.base
        for row, share in _ROWS.items():
            total: dict[str, Tensor] = {}
            norms = []
            for task in tasks:  # one at a time: their sum is all that is needed
                own, borrowed = difference(used.models[task], used.base), difference(other.models[task], start)
                vector = {name: share * tau + (1 - share) * borrowed[name] for name, tau in own.items()}
                total = {name: total[name] + tau if total else tau for name, tau in vector.items()}
                norms.append(math.sqrt(math.fsum(float(tau.double().square().sum()) for tau in vector.values())))
            weights = WeightSpace(used.evaluator, used.base, {"sum": total}).weights({"sum": alpha})
            found = used.evaluator.evaluate(weights, split, tasks, origin=f"{row} over {used.name}")
            cells.append(MixedCell(base=used.name, row=row, norm=max(norms), accuracy=found, absolute=average(found)))
    return MixedBases(tasks=tasks, split=split, alpha=alpha, minus=minus, cells=tuple(cells))


def _check(first: Family, second: Family, alpha: float, minus: str) -> None:
    if first.name == second.name:
        raise DataError(f"two bases must have different names. Got {first.name!r} twice.")
    if not first.models or set(first.models) != set(second.models):
        got = " and ".join(", ".join(family.models) or "none" for family in (first, second))
        raise DataError(f"both bases need models of the same tasks, at least one. Got {got}.")
    if not math.isfinite(alpha):
        raise DataError(f"`alpha` must be a finite number. Got {alpha!r}.")
    if minus not in ("used", "own"):
        raise DataError(f"`minus` must be used or own. Got {minus!r}.")
    shapes = {name: tensor.shape for name, tensor in first.base.items()}
    for what, weights in [
        (second.name, second.base),
        *((f"{family.name}'s {task}", model) for family in (first, second) for task, model in family.models.items()),
    ]:
        wrong = [name for name in {**shapes, **weights} if name not in weights or shapes.get(name) != weights[name].shape]
        if wrong:
            raise DataError(
                f"{what}: tensor {wrong[0]!r} does not fit the base {first.name!r}. Both bases must be of one architecture."
            )
