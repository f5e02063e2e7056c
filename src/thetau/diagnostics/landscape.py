r"""Loss and accuracy on a plane of weights, and along the lines between its corners.

AWD's Fig. 5 (Xiong et al., 2024, <https://arxiv.org/abs/2411.18729>) draws L_i + L_j at θ₀ + α τ_i + β τ_j: the plane through the base and two models. Through
three models it is θ_a + α (θ_b − θ_a) + β (θ_c − θ_a), and the base lies beside it. A merged model is marked where it falls on the plane,
with how far off it lies: the colours below a mark are not its own where that is much, so its own loss is measured and given too. A line's
*barrier* is the most that the loss rises above the straight line between its ends (Frankle et al., ICML 2020, <https://arxiv.org/abs/1912.05671>). In the
tangent space every point is exact and costs nothing more than its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import dist, sqrt
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from thetau._lazy import torch
from thetau.diagnostics.results import Matrix, Result
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import measure
from thetau.evaluate.spaces import Space
from thetau.pace import counted, doing
from thetau.tasks.inputs import label_tensor

if TYPE_CHECKING:
    from torch import Tensor

Vector: TypeAlias = "Mapping[str, Tensor]"

BASE = "base"  # what the base is called on a plane
ROUNDED = 1e-5  # of a side: how far off the plane rounding to float32 leaves what lies on it
FLAT = 1e-12  # of the squared lengths: the squared area below which two directions are one
Point = tuple[float, float]


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """From one point of the plane to another: `loss` of each task at each of `steps`, and how far it rises above the straight line.

    `joint`: the barrier of the sum of the tasks' losses.
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
    """A merged model, or the base beside a plane of models: `at` (α, β) is where it falls on the plane.

    - `outside`: the share of its squared distance that is off the plane, from the base; from the middle of three models.
    - `distance`: how far off the plane it is, in the length of weights.
    """

    name: str
    at: tuple[float, float]
    outside: float
    distance: float | None = None
    loss: Mapping[str, float]
    accuracy: Mapping[str, float]


Through = Literal["base", "models"]


@final
@dataclass(frozen=True, kw_only=True)
class Landscape(Result):
    """`loss[task][i][j]` and `accuracy[task][i][j]` at α = grid[i], β = grid[j].

    - `through`: `base` and two models, θ₀ + α τ_a + β τ_b; or three `models`, θ_a + α (θ_b − θ_a) + β (θ_c − θ_a). `tasks` are those of the models.
    - `frame`: where a step of α, and one of β, goes on the plane in lengths of weights, the first along the first axis.
    """

    tasks: tuple[str, ...]
    space: str
    split: str
    n: Mapping[str, int]
    grid: tuple[float, ...]
    loss: Mapping[str, Matrix]
    accuracy: Mapping[str, Matrix]
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    through: Through = "base"
    frame: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def corners(self) -> dict[str, Point]:
        """The base and the models that the plane goes through, and where they stand on it."""
        return corners_of(self.tasks)

    @property
    def joint(self) -> Matrix:
        """The sum of the tasks' losses."""
        return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*self.loss.values(), strict=True))

    @property
    def mean_accuracy(self) -> Matrix:
        """The mean of the tasks' accuracies."""
        count = len(self.tasks)
        return tuple(
            tuple(sum(cells) / count for cells in zip(*rows, strict=True)) for rows in zip(*self.accuracy.values(), strict=True)
        )

    @property
    def least(self) -> Point:
        """(α, β) where the sum is least on the grid."""
        joint = self.joint
        places = [(joint[i][j], i, j) for i in range(len(self.grid)) for j in range(len(self.grid))]
        _, i, j = min(places)
        return self.grid[i], self.grid[j]

    @property
    def sides(self) -> dict[tuple[str, str], float]:
        """How far each two corners lie apart, in lengths of weights; empty in results without a frame."""
        if self.frame is None:
            return {}
        spots = {name: on_frame(self.frame, at) for name, at in self.corners.items()}
        return {(a, b): dist(spots[a], spots[b]) for a, b in combinations(spots, 2)}


def corners_of(tasks: Sequence[str]) -> dict[str, Point]:
    """Where the base and two models, or three models, stand."""
    spots: tuple[Point, ...] = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    names = (BASE, *tasks) if len(tasks) == 2 else tasks
    return dict(zip(names, spots, strict=True))


def on_frame(frame: tuple[Point, Point], at: Point) -> Point:
    """(α, β) as a place on the plane, in lengths of weights."""
    (right, up), (other, high) = frame
    return at[0] * right + at[1] * other, at[0] * up + at[1] * high


def landscape(
    space: Space,
    evaluator: Evaluator,
    vectors: Mapping[str, Vector],
    *,
    grid: Sequence[float],
    steps: int = 11,
    merged: Mapping[str, Mapping[str, Tensor]] | None = None,
    base: Mapping[str, Tensor] | None = None,
    split: str = "test",
    name: str = "weights",
) -> Landscape:
    """Measure the plane of two or three `vectors` (task → τ), which `space` holds too, on the tasks.

    `merged`: models by name, as weights over `base`; they are marked, and measured as they are. `name`: of the space, `weights` or
    `tangent`, where no model can be marked.

    Raises:
        DataError: neither two vectors nor three, some that span no plane, one called `base`, or models in the tangent space.
    """
    if len(vectors) not in (2, 3):
        raise DataError(f"a landscape is the plane of the base and two models, or of three models. Got {len(vectors)}.")
    if BASE in vectors:
        raise DataError(f"on a landscape {BASE!r} is the base: call the model by another name, NAME=PATH.")
    if merged and name == "tangent":
        raise DataError("merged models are marked in the model's own space; these vectors belong to the tangent space.")
    plane = _Plane(vectors)
    tasks = tuple(vectors)
    loss: dict[str, list[list[float]]] = {task: [] for task in tasks}
    accuracy: dict[str, list[list[float]]] = {task: [] for task in tasks}
    points = corners_of(tasks)
    sides = tuple(combinations(points, 2))
    with doing("points of the plane and its lines"), counted(len(grid) ** 2 + len(sides) * steps, "points") as advance:

        def measured(at: Point) -> tuple[dict[str, float], dict[str, float]]:
            found = _at(space, evaluator, plane.coefficients(at), tasks, split)
            advance(1)
            return found

        for x in grid:
            rows = [measured((x, y)) for y in grid]
            for task in tasks:
                loss[task].append([row[0][task] for row in rows])
                accuracy[task].append([row[1][task] for row in rows])
        lines = tuple(_line(measured, start, end, points, tasks, steps) for start, end in sides)
    marks = [_mark(word, weights, base or {}, plane, evaluator, tasks, split) for word, weights in (merged or {}).items()]
    if len(tasks) == 3:
        marks.insert(0, _base_mark(space, evaluator, plane, tasks, split))
    return Landscape(
        tasks=tasks,
        space=name,
        split=split,
        n={task: len(evaluator.inputs(task, split)) for task in tasks},
        grid=tuple(grid),
        loss={task: tuple(map(tuple, values)) for task, values in loss.items()},
        accuracy={task: tuple(map(tuple, values)) for task, values in accuracy.items()},
        lines=lines,
        marks=tuple(marks),
        through="base" if len(tasks) == 2 else "models",
        frame=plane.frame,
    )


class _Plane:
    """θ₀ + `start` + α `first` + β `second`, and how a point of it is said in the models' vectors."""

    def __init__(self, vectors: Mapping[str, Vector]) -> None:
        self.names = tuple(vectors)
        if len(vectors) == 2:
            self.start: Vector = {}
            self.first, self.second = vectors.values()
        else:
            self.start, b, c = vectors.values()
            self.first, self.second = _less(b, self.start), _less(c, self.start)
        gram = [[_dot(x, y) for y in (self.first, self.second)] for x in (self.first, self.second)]
        if gram[0][0] * gram[1][1] - gram[0][1] ** 2 <= FLAT * gram[0][0] * gram[1][1]:
            what = "two task vectors" if len(vectors) == 2 else "three models"
            raise DataError(f"the {what} lie on one line, or two are the same: they span no plane.")
        side = sqrt(gram[0][0])
        along = gram[0][1] / side
        self.frame: tuple[Point, Point] = ((side, 0.0), (along, sqrt(max(0.0, gram[1][1] - along**2))))

    def coefficients(self, at: Point) -> dict[str, float]:
        """A point as a sum of the models' vectors."""
        if len(self.names) == 2:
            return dict(zip(self.names, at, strict=True))
        return dict(zip(self.names, (1 - at[0] - at[1], *at), strict=True))

    def fall(self, vector: Vector) -> tuple[Point, float, float]:
        """Where a model (its vector) falls on the plane, the share of its squared distance that is off it, and how far off."""
        at, outside, square = _nearest(_less(vector, self.start), self.first, self.second)
        off = outside * square
        if self.start:  # from the middle of the three, which no order of them changes
            spot, middle = on_frame(self.frame, at), on_frame(self.frame, (1 / 3, 1 / 3))
            whole = dist(spot, middle) ** 2 + off
            outside = off / whole if off > (ROUNDED * self.frame[0][0]) ** 2 else 0.0
        return at, outside, sqrt(off)


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
    measured: Callable[[Point], tuple[dict[str, float], dict[str, float]]],
    start: str,
    end: str,
    points: Mapping[str, Point],
    tasks: Sequence[str],
    steps: int,
) -> Line:
    places = [number / (steps - 1) for number in range(steps)]
    found: dict[str, list[float]] = {task: [] for task in tasks}
    for place in places:
        x, y = ((1 - place) * points[start][side] + place * points[end][side] for side in (0, 1))
        for task, loss in measured((x, y))[0].items():
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
    plane: _Plane,
    evaluator: Evaluator,
    tasks: Sequence[str],
    split: str,
) -> Mark:
    vector = {
        key: weights[key].float() - value.float() for key, value in base.items() if key in weights and value.is_floating_point()
    }
    at, outside, distance = plane.fall(vector)
    accuracy = evaluator.evaluate(weights, split, tasks, origin=name)
    loss = evaluator.losses(weights, split, tasks, origin=name)
    return Mark(
        name=name,
        at=at,
        outside=outside,
        distance=distance,
        loss={task: loss[task].value for task in tasks},
        accuracy={task: accuracy[task].value for task in tasks},
    )


def _base_mark(space: Space, evaluator: Evaluator, plane: _Plane, tasks: Sequence[str], split: str) -> Mark:
    """The base beside a plane of three models."""
    at, outside, distance = plane.fall({})
    loss, accuracy = _at(space, evaluator, {}, tasks, split)
    return Mark(name=BASE, at=at, outside=outside, distance=distance, loss=loss, accuracy=accuracy)


def projected(vector: Vector, a: Vector, b: Vector) -> tuple[Point, float]:
    """(α, β) of the nearest α a + β b, and the share of ‖vector‖² that it leaves; tensors that one lacks are zero there.

    Raises:
        DataError: a and b do not span a plane.
    """
    at, outside, _ = _nearest(vector, a, b)
    return at, outside


def _nearest(vector: Vector, a: Vector, b: Vector) -> tuple[Point, float, float]:
    """As `projected`, and ‖vector‖²."""
    gram = torch.tensor([[_dot(a, a), _dot(a, b)], [_dot(a, b), _dot(b, b)]], dtype=torch.float64)
    if float(torch.linalg.det(gram)) <= FLAT * float(gram[0, 0] * gram[1, 1]):
        raise DataError("the two task vectors lie on one line, or one is zero: they span no plane.")
    right = torch.tensor([_dot(vector, a), _dot(vector, b)], dtype=torch.float64)
    found = torch.linalg.solve(gram, right)
    square = _dot(vector, vector)
    left = max(0.0, square - float(right @ found))
    return (float(found[0]), float(found[1])), left / square if square > 0 else 0.0, square


def _dot(x: Vector, y: Vector) -> float:
    return sum(float((x[key].double() * y[key].double()).sum()) for key in x if key in y)


def _less(x: Vector, y: Vector) -> dict[str, Tensor]:
    """x − y; tensors that one lacks are zero there."""
    return {
        **{key: x[key].double() - y[key].double() if key in y else x[key] for key in x},
        **{key: -y[key] for key in y if key not in x},
    }
