r"""How much task vectors interfere: τJp, beside cosine and what addition really loses.

Yoshida et al., NeurIPS 2024 workshop, "Mastering Task Arithmetic: τJp as a Key Indicator for Weight Disentanglement": Eq. 9, Figs. 2, 6, 7, 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

from thetau._lazy import torch
from thetau.diagnostics.results import Correlation, Matrix, Result, correlate
from thetau.errors import DataError
from thetau.evaluate.means import normalised
from thetau.evaluate.measures import Measure
from thetau.evaluate.spaces import Space, TangentSpace
from thetau.pace import each

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tasks. `tau_jp` is Eq. 9, in squared units of the features.

    - `accuracy`: of each on its test examples with both vectors added at α = 1. `normalised`: the mean of the two, each relative to
      its own vector alone, where that is worth something.
    """

    a: str
    b: str
    tau_jp: float
    cosine: float
    normalised: float
    accuracy: dict[str, Measure]


@final
@dataclass(frozen=True, kw_only=True)
class Interference(Result):
    r"""`products[i][j]`: the mean over the examples of task j of $\lVert J(x;\theta_0)\,\tau_i \rVert^2$; on the diagonal, what a vector
    does to its own task.

    - `unit`: the mean of ‖f(x; θ₀)‖² on each task, to compare with (1 for features of unit length).
    - `n`: examples of each task. `space`: where the accuracies were measured.
    - `correlations`: over pairs: τJp and normalised accuracy (Fig. 2), cosine and normalised accuracy, τJp and cosine (Fig. 8).
    """

    tasks: tuple[str, ...]
    space: str
    split: str
    n: dict[str, int]
    products: Matrix
    unit: dict[str, float]
    cosine: Matrix
    pairs: tuple[Pair, ...]
    correlations: tuple[Correlation, ...]


def interference(
    space: Space, tangent: TangentSpace, vectors: Mapping[str, Mapping[str, Tensor]], *, split: str = "test"
) -> Interference:
    """Measure every pair of `vectors` (task → τ), which `space` and `tangent` hold too.

    `tangent` gives J(x; θ₀) τ, `space` the accuracies: the model itself for ordinary vectors, `tangent` again for linear ones. Raises
    `DataError` for fewer than two vectors.
    """
    names = tuple(vectors)
    if len(names) < 2:
        raise DataError(f"interference is between task vectors; at least two are needed. Got {len(names)}.")
    products, unit, n = [], {}, {}
    for vector in each("vector", names):
        row = []
        for task in names:
            first, change = tangent.terms(vector, task, split)
            row.append(float(change.double().square().sum(-1).mean()))
            unit[task], n[task] = float(first.double().square().sum(-1).mean()), len(change)
        products.append(tuple(row))
    cosines = cosine_matrix([vectors[name] for name in names])
    own = {name: space.accuracy({name: 1.0}, name, split) for name in names}
    pairs = []
    for i, j in each("pair", list(combinations(range(len(names)), 2)), lambda pair: " and ".join(names[k] for k in pair)):
        a, b = names[i], names[j]
        both = {a: 1.0, b: 1.0}
        found = {name: space.accuracy(both, name, split) for name in (a, b)}
        pairs.append(
            Pair(
                a=a,
                b=b,
                tau_jp=(products[i][j] + products[j][i]) / 2,
                cosine=cosines[i][j],
                normalised=normalised(found, own),
                accuracy=found,
            )
        )
    jp, cos, kept = ([getattr(pair, name) for pair in pairs] for name in ("tau_jp", "cosine", "normalised"))
    return Interference(
        tasks=names,
        space="tangent" if space is tangent else "weights",
        split=split,
        n=n,
        products=tuple(products),
        unit=unit,
        cosine=cosines,
        pairs=tuple(pairs),
        correlations=(
            correlate(jp, kept, ("τJp", "normalised accuracy")),
            correlate(cos, kept, ("cosine", "normalised accuracy")),
            correlate(jp, cos, ("τJp", "cosine")),
        ),
    )


@runtime_checkable
class Terms(Protocol):
    """What gives f₀ and Jτ of a task's examples; a `TangentSpace` does."""

    def terms(self, vector: str, task: str, split: str) -> tuple[Tensor, Tensor]:
        """`[example, feature]` both."""
        ...


def mean_tau_jp(tangent: Terms, names: Sequence[str], split: str) -> float:
    r"""The mean over ordered pairs of tasks of $\mathbb{E}\,\lVert J(x_j)\,\tau_i \rVert^2$, i ≠ j (Eq. 9), in squared units of the features."""
    if len(names) < 2:
        raise DataError(f"τJp is between task vectors; at least two are needed. Got {len(names)}.")
    pairs = [(vector, task) for vector in names for task in names if vector != task]
    found = [float(tangent.terms(vector, task, split)[1].double().square().sum(-1).mean()) for vector, task in pairs]
    return sum(found) / len(found)


def cosine_matrix(vectors: Sequence[Mapping[str, Tensor]]) -> Matrix:
    """The cosine of each pair over all tensors, in float64; a tensor that one lacks counts as 0 there, and so does a zero vector."""
    gram = [[_dot(a, b) for b in vectors] for a in vectors]
    norms = [gram[i][i] ** 0.5 for i in range(len(vectors))]
    return tuple(
        tuple(gram[i][j] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for j in range(len(vectors)))
        for i in range(len(vectors))
    )


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float(torch.dot(a[name].double().flatten(), b[name].double().flatten())) for name in a if name in b)
