"""NuSLERP: two models, or two task vectors, along the great circle between them, of whole tensors, of rows or of columns.

mergekit's `nuslerp`; over task vectors where a `base_model` is given there (`of="vectors"`). `along` says which vectors are turned:

- `tensor`: each tensor as one vector; mergekit's `nuslerp_flatten: true`, its default.
- `rows`: what lies along the last axis, in a matrix `[d_out, d_in]` a row; `nuslerp_flatten: false`.
- `columns`: what lies along the first axis; `nuslerp_flatten: false` with `nuslerp_row_wise: true`, which turns columns.

Departs from it once: vectors that are parallel or antiparallel up to the rounding of float32 are joined by the straight line; there the
noise in the sine of an angle of nearly π is divided by, and a result can be 10⁷ times too long.

Use it as `slerp` where the two models stand side by side, by weights, or where rows should turn on their own; two passes over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from thetau._lazy import torch
from thetau.methods.fields import Origin, Shares
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Op, Site, Statistic, Varying, values_at
from thetau.statistics import ColumnProducts, Gram
from thetau.sums import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHORT = 1e-7  # a shorter vector counts as if it had this length
EVEN = 1e-6  # weights that add up to less stand for one half each
ROUNDING = 4 * 2.0**-23  # four times float32's ε: a sine below it is rounding


@dataclass(frozen=True, kw_only=True)
class Arc(BlockReduction):
    """The point of two vectors' great circle that their `shares` of the way say; of whole tensors, of rows or of columns."""

    shares: Varying
    along: Literal["tensor", "rows", "columns"]

    def requires(self) -> Statistic:
        """Inner products, of columns or of tensors; those of rows are made on the way, but a vector's, which blocks may cut."""
        return ColumnProducts() if self.along == "columns" else Gram(per_tensor=True)

    def prepare(self, result: Mapping[str, Tensor], tasks: tuple[str, ...]) -> dict[str, Float[Tensor, "2 *rest"]]:
        """Both coefficients by tensor, or by column of it."""
        products = {name: _of_gram(one) if self.along != "columns" else one for name, one in result.items()}
        return {name: arc(one, self._share(name, tasks)) for name, one in products.items()}

    def reduce(
        self, stack: Float[Tensor, "2 *block"], state: Mapping[str, Float[Tensor, "2 *rest"]], site: Site
    ) -> Float[Tensor, "*block"]:
        """A block, each vector turned."""
        if len(site.shape) < 2 or self.along == "tensor":
            return weighted_sum(stack, state[site.name].tolist())
        wide = stack.double()
        factors = state[site.name][:, None]
        if self.along == "rows":
            first, second = wide
            products = torch.stack([(one * other).sum(-1) for one, other in ((first, first), (first, second), (second, second))])
            factors = arc(products, self._share(site.name, site.tasks))[..., None]
        return (wide * factors).sum(0).to(stack.dtype)

    def compiles(self, site: Site) -> bool:
        """Where a tensor is turned as a whole."""
        return len(site.shape) < 2 or self.along == "tensor"

    def program(self, state: Mapping[str, Float[Tensor, "2 *rest"]], site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("sum", by_task=tuple(state[site.name].tolist()))]

    def _share(self, name: str, tasks: tuple[str, ...]) -> float:
        """t, the second's share."""
        first, second = values_at(self.shares, name, tasks)
        return second / (first + second) if abs(first + second) >= EVEN else 0.5


@register("nuslerp", paper="mergekit, https://github.com/arcee-ai/mergekit")
@dataclass(frozen=True, kw_only=True)
class Nuslerp(Method):
    r"""$\frac{\sin((1-t)\Omega)}{\sin\Omega}x_1 + \frac{\sin(t\Omega)}{\sin\Omega}x_2$ with $t = \frac{w_2}{w_1 + w_2}$, and ½ where the weights add up to 0.

    - `along`: which vectors are turned on their own: each whole `tensor`, its `rows` (the last axis), or its `columns` (the first).
    """

    takes: ClassVar[tuple[int, int | None]] = (2, 2)
    weights: Shares = 1.0
    of: Origin = "models"
    along: Literal["tensor", "rows", "columns"] = "tensor"

    def chain(self) -> Chain:
        """Two models or two vectors."""
        return Chain(reduction=Arc(shares=self.weights, along=self.along), models=self.of == "models")


def arc(products: Float[Tensor, "3 *many"], t: float) -> Float[Tensor, "2 *many"]:
    """Both coefficients, from ⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ in float64."""
    lengths = products[::2].clamp(min=0).sqrt().clamp(min=SHORT)
    cosine = (products[1] / lengths[0] / lengths[1]).clamp(-1, 1)
    straight = 1 - cosine.square() <= ROUNDING**2
    angle = torch.acos(cosine.masked_fill(straight, 0))
    turned = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)]) / torch.sin(angle)
    line = torch.stack([torch.full_like(angle, 1 - t), torch.full_like(angle, t)])
    return torch.where(straight, line, turned)


def _of_gram(gram: Float[Tensor, "2 2"]) -> Float[Tensor, " 3"]:
    return torch.stack([gram[0, 0], gram[0, 1], gram[1, 1]])
