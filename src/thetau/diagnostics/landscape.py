r"""Loss and accuracy on the plane of the base and two task vectors, and along the lines between base and models.

AWD's Fig. 5 (Xiong et al., 2024, <https://arxiv.org/abs/2411.18729>) draws L_i + L_j at θ₀ + α τ_i + β τ_j. A merged model is marked where its vector
falls on that plane, with the share of ‖τ‖² that lies outside it: the colours below a mark are not its own where that share is large, so its own
loss is measured and given too. A line's *barrier* is the most that the loss rises above the straight line between its ends (Frankle et al.,
ICML 2020, <https://arxiv.org/abs/1912.05671>). In the tangent space every point is exact and costs nothing more than its terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thetau.diagnostics.results import Matrix, Result
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import measure
from thetau.evaluate.spaces import Space
from thetau.tasks.inputs import label_tensor


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """From one point of the plane to another: `loss` of each task at each of `steps`, and how far it rises above the straight line.

    `joint`: the barrier of the sum of both tasks' losses.
    """

    start: str
    end: str
    steps: tuple[float, ...]
    loss: Mapping[str, tuple[float, ...]]
    barrier: Mapping[str, float]
    joint: float


@final
@dataclass(frozen=True, kw_only=True)
class Mark:
    """A merged model: `at` (α, β) is its vector's projection, `outside` the share of its squared length that is off the plane."""

    name: str
    at: tuple[float, float]
    outside: float
    loss: Mapping[str, float]
    accuracy: Mapping[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class Landscape(Result):
    """`loss[task][i][j]` and `accuracy[task][i][j]` at θ₀ + grid[i] τ_a + grid[j] τ_b, `tasks` being (a, b)."""

    tasks: tuple[str, str]
    space: str
    split: str
    n: Mapping[str, int]
    grid: tuple[float, ...]
    loss: Mapping[str, Matrix]
    accuracy: Mapping[str, Matrix]
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]

    @property
    def joint(self) -> Matrix:
        """The sum of both tasks' losses."""
        a, b = (self.loss[task] for task in self.tasks)
        return tuple(tuple(x + y for x, y in zip(one, other, strict=True)) for one, other in zip(a, b, strict=True))

    @property
    def least(self) -> tuple[float, float]:
        """(α, β) where the sum is least on the grid."""
        joint = self.joint
        places = [(joint[i][j], i, j) for i in range(len(self.grid)) for j in range(len(self.grid))]
        _, i, j = min(places)
        return self.grid[i], self.grid[j]


def landscape(
    space: Space,
    evaluator: Evaluator,
    vectors: Mapping[str, Mapping[str, Tensor]],
    *,
    grid: Sequence[float],
    steps: int = 11,
    merged: Mapping[str, Mapping[str, Tensor]] | None = None,
    base: Mapping[str, Tensor] | None = None,
    split: str = "test",
    name: str = "weights",
) -> Landscape:
    """Measure the plane of two `vectors` (task → τ), which `space` holds too, on both tasks.

    `merged`: models by name, as weights over `base`; they are marked, and measured as they are. `name`: of the space, `weights` or
    `tangent`, where no model can be marked.

    Raises:
        DataError: not two vectors, one that is zero, or models in the tangent space.
    """
    if len(vectors) != 2:
        raise DataError(f"a landscape is the plane of two task vectors. Got {len(vectors)}.")
    if merged and name == "tangent":
        raise DataError("merged models are marked in the model's own space; these vectors belong to the tangent space.")
    a, b = vectors
    tasks = (a, b)
    loss: dict[str, list[list[float]]] = {task: [] for task in tasks}
    accuracy: dict[str, list[list[float]]] = {task: [] for task in tasks}
    for x in grid:
        rows = [_at(space, evaluator, {a: x, b: y}, tasks, split) for y in grid]
        for task in tasks:
            loss[task].append([row[0][task] for row in rows])
            accuracy[task].append([row[1][task] for row in rows])
    points = {"base": (0.0, 0.0), a: (1.0, 0.0), b: (0.0, 1.0)}
    ends = (("base", a), ("base", b), (a, b))
    marks = tuple(_mark(word, weights, base or {}, vectors, evaluator, tasks, split) for word, weights in (merged or {}).items())
    return Landscape(
        tasks=tasks,
        space=name,
        split=split,
        n={task: len(evaluator.inputs(task, split)) for task in tasks},
        grid=tuple(grid),
        loss={task: tuple(map(tuple, values)) for task, values in loss.items()},
        accuracy={task: tuple(map(tuple, values)) for task, values in accuracy.items()},
        lines=tuple(_line(space, evaluator, start, end, points, tasks, steps, split) for start, end in ends),
        marks=marks,
    )


def _at(
    space: Space, evaluator: Evaluator, at: Mapping[str, float], tasks: Sequence[str], split: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and accuracies at a point, from one run of each task."""
    losses, accuracies = {}, {}
    for task in tasks:
        inputs, head = evaluator.inputs(task, split), evaluator.heads[task]
        features = space.features(at, task, split)
        with torch.inference_mode():
            losses[task] = float(head.loss(features.float(), label_tensor(inputs.labels)))
            told = head.predict(features)
        accuracies[task] = measure(evaluator.tasks[task].metric, told, inputs.labels).value
    return losses, accuracies


def _line(
    space: Space,
    evaluator: Evaluator,
    start: str,
    end: str,
    points: Mapping[str, tuple[float, float]],
    tasks: tuple[str, str],
    steps: int,
    split: str,
) -> Line:
    places = [number / (steps - 1) for number in range(steps)]
    found: dict[str, list[float]] = {task: [] for task in tasks}
    for place in places:
        x, y = ((1 - place) * points[start][side] + place * points[end][side] for side in (0, 1))
        for task, loss in _at(space, evaluator, {tasks[0]: x, tasks[1]: y}, tasks, split)[0].items():
            found[task].append(loss)
    whole = [sum(values) for values in zip(*found.values(), strict=True)]
    return Line(
        start=start,
        end=end,
        steps=tuple(places),
        loss={task: tuple(values) for task, values in found.items()},
        barrier={task: barrier(values) for task, values in found.items()},
        joint=barrier(whole),
    )


def barrier(values: Sequence[float]) -> float:
    """The most that evenly spaced values rise above the straight line between the first and the last; 0 where they nowhere do.

    Examples:
        >>> barrier([1.0, 3.0, 2.0])
        1.5
        >>> barrier([1.0, 0.5, 2.0])
        0.0
    """
    last = len(values) - 1
    return max(value - ((last - place) * values[0] + place * values[last]) / last for place, value in enumerate(values))


def _mark(
    name: str,
    weights: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    vectors: Mapping[str, Mapping[str, Tensor]],
    evaluator: Evaluator,
    tasks: tuple[str, str],
    split: str,
) -> Mark:
    vector = {
        key: weights[key].float() - value.float() for key, value in base.items() if key in weights and value.is_floating_point()
    }
    at, outside = projected(vector, *vectors.values())
    accuracy = evaluator.evaluate(weights, split, tasks, origin=name)
    loss = evaluator.losses(weights, split, tasks, origin=name)
    return Mark(
        name=name,
        at=at,
        outside=outside,
        loss={task: loss[task].value for task in tasks},
        accuracy={task: accuracy[task].value for task in tasks},
    )


def projected(
    vector: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[tuple[float, float], float]:
    """(α, β) of the nearest α a + β b, and the share of ‖vector‖² that it leaves; tensors that one lacks are zero there.

    Raises:
        DataError: a and b do not span a plane.
    """

    def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
        return sum(float((x[key].double() * y[key].double()).sum()) for key in x if key in y)

    gram = torch.tensor([[dot(a, a), dot(a, b)], [dot(a, b), dot(b, b)]], dtype=torch.float64)
    if float(torch.linalg.det(gram)) <= 1e-12 * float(gram[0, 0] * gram[1, 1]):
        raise DataError("the two task vectors lie on one line, or one is zero: they span no plane.")
    right = torch.tensor([dot(vector, a), dot(vector, b)], dtype=torch.float64)
    found = torch.linalg.solve(gram, right)
    square = dot(vector, vector)
    left = max(0.0, square - float(right @ found))
    return (float(found[0]), float(found[1])), left / square if square > 0 else 0.0
