"""The step of Model Stock: how far along the mean of the task vectors the centre of fine-tuned models lies.

Jang et al., ECCV 2024, <https://arxiv.org/abs/2403.19522>: with θ the mean angle between K task vectors, tensor by tensor,
t = K cos θ / (1 + (K − 1) cos θ). Departs once: t stays in [0, 1]. Below a mean cosine of 0 the formula walks away from every model,
without bound; the base is then the best that the geometry can say. Without `clamp` the rule is mergekit's: t as it comes, 0 only at the
pole of the formula, and the product of two lengths counts as at least 1e-6. With `filter_wise` each row has its own t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from thetau._lazy import torch
from thetau.parts import Op, Site, Transform
from thetau.statistics import Gram
from thetau.statistics.gram import cosines

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHORT = 1e-6  # the product of two lengths, without the clamp
POLE = 1e-6  # how near to 0 the formula's divisor may come, without the clamp


@dataclass(frozen=True, kw_only=True)
class StockRatio(Transform):
    """Multiplies every task's entries in a tensor by that tensor's t, or in a row (what lies along the last axis) by that row's."""

    clamp: bool = True
    filter_wise: bool = False
    per_task: ClassVar[bool] = False

    def requires(self) -> Gram:
        """Inner products, tensor by tensor."""
        return Gram(per_tensor=True)

    def prepare(self, result: Mapping[str, Tensor], tasks: tuple[str, ...]) -> dict[str, float]:
        """t by tensor."""
        return {name: stock_ratio(gram, clamp=self.clamp) for name, gram in result.items()}

    def notes(self, state: Mapping[str, float]) -> list[str]:
        """The ratios' range, for the summary."""
        if not state or self.filter_wise:
            return []
        low, high = min(state, key=lambda name: state[name]), max(state, key=lambda name: state[name])
        return [f"model stock: t from {state[low]:.3f} ({low}) to {state[high]:.3f} ({high})."]

    def compiles(self, site: Site) -> bool:
        """Where a tensor has one t."""
        return not self._by_row(site)

    def program(self, state: Mapping[str, float], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("weigh", by_task=(state[site.name],) * len(site.tasks))]

    def apply(self, stack: Float[Tensor, "task *block"], state: Mapping[str, float], site: Site) -> Float[Tensor, "task *block"]:
        """A block, multiplied."""
        if not self._by_row(site):
            return stack * state[site.name]
        rows = stack.double().movedim(0, -2)
        return stack * _ratios(rows @ rows.mT, clamp=self.clamp).to(stack.dtype)[..., None]

    def _by_row(self, site: Site) -> bool:
        return self.filter_wise and len(site.shape) >= 2


def stock_ratio(gram: Float[Tensor, "task task"], *, clamp: bool = True) -> float:
    """t from a Gram matrix; vectors of zero length count as at right angles to all others. One task alone has t = 1."""
    return float(_ratios(gram, clamp=clamp).float())


def _ratios(gram: Float[Tensor, "*row task task"], *, clamp: bool) -> Float[Tensor, "*row"]:
    """t by row."""
    count = gram.shape[-1]
    if count == 1:
        return torch.ones_like(gram[..., 0, 0])
    if clamp:
        cos = cosines(gram)
    else:
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        cos = (gram / (norm[..., :, None] * norm[..., None, :]).clamp(min=SHORT)).clamp(-1, 1)
    mean = (cos.sum((-2, -1)) - cos.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))
    below = 1 + (count - 1) * mean
    none = (mean <= 0) if clamp else below.abs() < POLE
    ratio = (count * mean / below.masked_fill(none, 1)).masked_fill(none, 0)
    return ratio.clamp(max=1) if clamp else ratio
