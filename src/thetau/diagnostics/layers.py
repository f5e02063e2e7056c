r"""What fine-tuning and merging do at every linear layer, on data: do inputs stay, does a vector span them, how far are outputs off.

Cheng et al., ICML 2025, "WUDI-Merging", <https://arxiv.org/abs/2503.08099>. Of the input x of a layer in the base and in a task's own model:
$1 - \cos(x_\text{own}, x_\text{base})$ (Eq. 7) and $(\lVert x_\text{own}\rVert - \lVert x_\text{base}\rVert)/\lVert x_\text{base}\rVert$ (Eq. 8). Of x and
the task's vector: what its leading directions leave out of x (ε of Eq. 13; all rows of a full fine-tune span everything, so that the paper's
equality holds trivially, and the question is how few directions do). Of the outputs under a merge and under the task's own model:
$\lVert y_m - y_i\rVert/\lVert y_i\rVert$ (Eq. 83), with everything below the layer merged too.

A row is a position (token or patch) of an example, without padding; means are over rows. The same rows are taken under all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, final

from thetau._lazy import torch
from thetau.checkpoint.naming import kind_of, layer_of
from thetau.diagnostics.results import Result
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evidence.layers import Layer, batched, measurable, watched
from thetau.linalg.svd import truncated_svd
from thetau.models import Encoder
from thetau.pace import each
from thetau.random import stream
from thetau.tasks.inputs import Inputs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Weights: TypeAlias = "Mapping[str, Tensor]"

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of a layer's inputs: how many directions of the vector are taken
BATCH = 16
FEATURES = "features"  # the last row: what the head reads


@final
@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer and one task.

    - `layer`: the name of its weight, or `features`. `block`: its block's number.
    - `rows`: positions that were looked at.
    - `direction`, `magnitude`: Eqs. 7 and 8 of the layer's inputs, own model against base; None of the features.
    - `moved`: ‖y_own − y_base‖/‖y_base‖ of the outputs.
    - `missed`: share of directions → mean share of ‖x‖² outside the vector's leading ones (Eq. 13). `missed_by_others`: the same of the other
      tasks' vectors, mean; None for one task. Chance misses 1 − share. Empty where the vector is zero here.
    - `error`: merge → Eq. 83. `drift`: merge → ‖y_m − y_base‖/‖y_base‖.
    """

    task: str
    layer: str
    kind: str
    block: int | None
    rows: int
    direction: float | None
    magnitude: float | None
    moved: float
    missed: tuple[float, ...] = ()
    missed_by_others: tuple[float, ...] | None = None
    error: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Layers(Result):
    """All layers in the order in which they run, task after task. `shares`: of `missed`. `n`: examples of each task."""

    tasks: tuple[str, ...]
    merged: tuple[str, ...]
    split: str
    n: Mapping[str, int]
    shares: tuple[float, ...]
    rows: tuple[LayerRow, ...]

    def of(self, task: str) -> list[LayerRow]:
        """A task's rows."""
        return [row for row in self.rows if row.task == task]


def layers(
    evaluator: Evaluator,
    base: Weights,
    models: Mapping[str, Weights],
    merged: Mapping[str, Weights],
    *,
    split: str = "test",
    rows: int = 256,
) -> Layers:
    """Run the base, each task's own model and every merge on the task's inputs, and compare them layer by layer.

    `rows`: positions of each layer that are kept, about. The evaluator's encoder holds the base before and after.

    Raises:
        DataError: no model, no example, no linear layer that runs, or outputs that are not finite.
    """
    if not models:
        raise DataError("layers are looked at on the tasks of fine-tuned models. Give at least one model.")
    encoder = evaluator.encoder
    found: list[LayerRow] = []
    n: dict[str, int] = {}
    try:
        for task, own in each("task", list(models.items()), lambda item: item[0]):
            inputs = evaluator.inputs(task, split)
            if not len(inputs):
                raise DataError(f"task {task!r}: the split {split!r} has no example.")
            n[task] = len(inputs)
            start, tuned = (
                activations(encoder, weights, inputs, rows, origin) for weights, origin in ((base, "the base"), (own, task))
            )
            if not start:
                raise DataError(f"{encoder.folder}: has no linear layer that runs and whose weight is in its checkpoint.")
            others = {name: activations(encoder, weights, inputs, rows, name) for name, weights in merged.items()}
            vectors = {name: weights for name, weights in models.items() if name != task}
            for layer, before in start.items():
                found.append(
                    _row(
                        task, layer, before, tuned[layer], {name: one[layer] for name, one in others.items()}, base, own, vectors
                    )
                )
    finally:
        evaluator.load_base()
    return Layers(tasks=tuple(models), merged=tuple(merged), split=split, n=n, shares=SHARES, rows=tuple(found))


@dataclass
class Seen:
    """Some rows of one layer: inputs `[row, d_in]`, None of the features, and outputs `[row, d_out]`."""

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor | None:
        """The inputs."""
        return torch.cat(self.before).double() if self.before else None

    @property
    def y(self) -> Tensor:
        """The outputs."""
        return torch.cat(self.after).double()


def activations(encoder: Encoder, weights: Weights, inputs: Inputs, rows: int, origin: str) -> dict[str, Seen]:
    """What goes into each layer and comes out under these weights, at evenly spaced positions, about `rows` of them; the features last.

    Raises:
        DataError: something is not finite.
    """
    encoder.load(weights, origin)
    encoder.module.eval()
    known: dict[str, Layer] = measurable(encoder)
    batches = batched(inputs.lengths, BATCH)
    quota = max(1, -(-rows // len(batches)))
    found: dict[str, Seen] = {}
    features = Seen()

    def take(rows: Tensor) -> Tensor:
        places = torch.linspace(0, len(rows) - 1, min(quota, len(rows))).round().long()
        return rows[places].float().clone()

    with (
        torch.inference_mode(),
        watched(
            encoder,
            known,
            seen=lambda name, x: found.setdefault(name, Seen()).before.append(take(place.rows(x))),
            made=lambda name, y: found.setdefault(name, Seen()).after.append(take(place.rows(y))),
        ) as place,
    ):
        for batch in batches:
            place.columns = inputs.batch(batch)
            features.after.append(encoder.module(**dict(place.columns)).float())
    if not all(bool(torch.cat(one.after).isfinite().all()) for one in (features, *found.values())):
        raise DataError(f"{origin}: gives NaN or Inf on this task. Look at the weights: `thetau inspect --tensors`.")
    return {**found, FEATURES: features}


def _row(
    task: str,
    layer: str,
    base: Seen,
    own: Seen,
    merged: Mapping[str, Seen],
    origin: Weights,
    model: Weights,
    others: Mapping[str, Weights],
) -> LayerRow:
    x, tuned, start, mine = base.x, own.x, base.y, own.y
    missed: tuple[float, ...] = ()
    beside: list[tuple[float, ...]] = []
    if tuned is not None and layer in model:
        d_in = tuned.shape[1]
        missed = outside(tuned, matrix_of(model[layer].float() - origin[layer].float(), d_in), layer)
        beside = [
            outside(tuned, matrix_of(weights[layer].float() - origin[layer].float(), d_in), layer) for weights in others.values()
        ]
        beside = [one for one in beside if one]
    shape = tuple(origin[layer].shape) if layer in origin else ()
    return LayerRow(
        task=task,
        layer=layer,
        kind=str(kind_of(layer, shape)) if shape else FEATURES,
        block=layer_of(layer),
        rows=len(mine),
        direction=None if x is None or tuned is None else direction_change(tuned, x),
        magnitude=None if x is None or tuned is None else magnitude_change(tuned, x),
        moved=relative_error(mine, start),
        missed=missed,
        missed_by_others=tuple(math.fsum(column) / len(beside) for column in zip(*beside, strict=True)) if beside else None,
        error={name: relative_error(one.y, mine) for name, one in merged.items()},
        drift={name: relative_error(one.y, start) for name, one in merged.items()},
    )


def direction_change(own: Float[Tensor, "row d_in"], base: Float[Tensor, "row d_in"]) -> float:
    """Eq. 7, mean over rows; rows that are zero in either count as 1."""
    return float((1 - torch.nn.functional.cosine_similarity(own, base, dim=1, eps=1e-30)).mean())


def magnitude_change(own: Float[Tensor, "row d_in"], base: Float[Tensor, "row d_in"]) -> float:
    """Eq. 8, mean over rows that are not zero in the base."""
    there, here = base.norm(dim=1), own.norm(dim=1)
    kept = there > 0
    return float(((here - there)[kept] / there[kept]).mean()) if bool(kept.any()) else 0.0


def relative_error(made: Float[Tensor, "row d_out"], wanted: Float[Tensor, "row d_out"]) -> float:
    """Eq. 83: the mean over rows of ‖made − wanted‖/‖wanted‖; rows that are zero where they are wanted do not count.

    Examples:
        >>> relative_error(torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        1.0
    """
    length = wanted.norm(dim=1)
    kept = length > 0
    return float(((made - wanted).norm(dim=1)[kept] / length[kept]).mean()) if bool(kept.any()) else 0.0


def matrix_of(weight: Tensor, d_in: int) -> Float[Tensor, "d_out d_in"]:
    """A weight as `[d_out, d_in]`: a convolution's kernels flattened, GPT-2's turned."""
    flat = weight.reshape(len(weight), -1)
    return flat if flat.shape[1] == d_in else flat.T


def outside(x: Float[Tensor, "row d_in"], vector: Float[Tensor, "d_out d_in"], name: str) -> tuple[float, ...]:
    """For each of `SHARES`, the mean over rows of the share of ‖x‖² that so many leading right directions of a vector leave out.

    Empty for a zero vector.
    """
    if not bool(vector.any()):
        return ()
    small = min(vector.shape)
    ranks = [min(small, max(1, round(share * vector.shape[1]))) for share in SHARES]
    directions = truncated_svd(vector, max(ranks), stream("layers", name))[2].double()
    whole = x.square().sum(1)
    kept = whole > 0
    shares = (x @ directions).square()[kept] / whole[kept, None]
    return tuple(max(0.0, 1 - float(shares[:, :rank].sum(1).mean())) for rank in ranks)


def ordered(rows: Sequence[LayerRow]) -> list[str]:
    """The layers' names in the order in which they run, each once."""
    return list(dict.fromkeys(row.layer for row in rows))
