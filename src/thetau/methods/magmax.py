"""MagMax: of every entry the task whose change is the largest.

Marczak et al., ECCV 2024, <https://arxiv.org/abs/2407.06322>. As in the authors' code, of equal magnitudes the later task's stays; later
is here in the order of the tasks' names, so that the order in which they are given changes nothing. Their script for eight
independently tuned models adds half of the result, which is the default.

Use it where the tasks changed different entries, above all for models tuned one after the other, each from the last; it needs no data
and one pass. Tasks with longer vectors win most entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Scale
from thetau.methods.registry import register
from thetau.parts import BlockReduction, Chain, Method, Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register("magmax", paper="Marczak et al., ECCV 2024, https://arxiv.org/abs/2407.06322")
@dataclass(frozen=True, kw_only=True)
class MagMax(Method, BlockReduction):
    r"""$\tau = \lambda\,\tau_{t^*}$ entrywise, $t^* = \arg\max_t |\tau_t|$."""

    scale: Coefficient = 0.5

    def chain(self) -> Chain:
        """The largest entries, then λ."""
        return Chain(reduction=self, post=(Scale(scale=self.scale),))

    def reduce(self, stack: Float[Tensor, "task *block"], state: object, site: Site) -> Float[Tensor, "*block"]:
        """The entries of largest magnitude of a block."""
        largest = stack[0].clone()
        for row in stack[1:]:
            largest = torch.where(row.abs() >= largest.abs(), row, largest)
        return largest
