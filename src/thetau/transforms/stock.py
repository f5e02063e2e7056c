"""The step of Model Stock: how far along the mean of the task vectors the centre of fine-tuned models lies.

Jang et al., ECCV 2024, <https://arxiv.org/abs/2403.19522>: with θ the mean angle between K task vectors, tensor by tensor,
t = K cos θ / (1 + (K − 1) cos θ). Departs once: t stays in [0, 1]. Below a mean cosine of 0 the formula walks away from every model,
without bound; the base is then the best that the geometry can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.parts import Op, Site, Transform
from thetau.statistics import Gram
from thetau.statistics.gram import cosines


@dataclass(frozen=True, kw_only=True)
class StockRatio(Transform):
    """Multiplies every task's entries in a tensor by that tensor's t."""

    def requires(self) -> Gram:
        """Inner products, tensor by tensor."""
        return Gram(per_tensor=True)

    def prepare(self, result: Mapping[str, Tensor], tasks: tuple[str, ...]) -> dict[str, float]:
        """t by tensor."""
        return {name: stock_ratio(gram) for name, gram in result.items()}

    def notes(self, state: Mapping[str, float]) -> list[str]:
        """The ratios' range, for the summary."""
        if not state:
            return []
        low, high = min(state, key=lambda name: state[name]), max(state, key=lambda name: state[name])
        return [f"model stock: t from {state[low]:.3f} ({low}) to {state[high]:.3f} ({high})."]

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: Mapping[str, float], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("weigh", by_task=(state[site.name],) * len(site.tasks))]

    def apply(self, stack: Float[Tensor, "task *block"], state: Mapping[str, float], site: Site) -> Float[Tensor, "task *block"]:
        """A block, multiplied."""
        return stack * state[site.name]


def stock_ratio(gram: Float[Tensor, "task task"]) -> float:
    """t in [0, 1] from a Gram matrix; vectors of zero length count as at right angles to all others. One task alone has t = 1."""
    count = len(gram)
    if count == 1:
        return 1.0
    cos = cosines(gram)
    mean = float((cos.sum() - cos.diagonal().sum()) / (count * (count - 1)))
    if mean <= 0:
        return 0.0
    return float(torch.tensor(min(1.0, count * mean / (1 + (count - 1) * mean)), dtype=torch.float32))
