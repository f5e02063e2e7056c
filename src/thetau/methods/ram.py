"""RAM: what one task changed alone is kept whole, what several changed is averaged.

Reinforced Agent Merging, Yuan et al. 2026, <https://arxiv.org/abs/2601.13572>, for agents trained by reinforcement learning, whose task
vectors are sparse and hardly overlap. An entry is changed where |τ| > ε. `ram` is the mean over the tasks that changed an entry.
`ramplus_tl` also enlarges what a task changed alone by 1 + r · min(ρ, α), ρ being its shared entries over its unique ones, in each tensor
as in mergekit; `scope="vector"` counts over the whole vector as in the authors' code (there with r = 0.05 and α = 1).

Use it where task vectors are sparse, so that a plain mean would only make each smaller; `ram` takes one pass over the inputs,
`ramplus_tl` two. Both need a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.methods.fields import Coefficient, NotNegative
from thetau.methods.reductions import DisjointMean, Scale
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Op, Site, Transform
from thetau.statistics import OverlapCounts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PAPER = "Yuan et al. 2026, https://arxiv.org/abs/2601.13572"
Least = Annotated[NotNegative, "ε; entries of at most this magnitude count as unchanged."]


@dataclass(frozen=True, kw_only=True)
class Changed(Transform):
    """Entries of magnitude above `epsilon`; the others become 0."""

    epsilon: float

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop, which keeps what reaches a cut."""
        above = float(np.nextafter(np.float32(self.epsilon), np.float32(np.inf)))
        return [Op("trim", by_task=(above,) * len(site.tasks))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """A block without what is unchanged."""
        return stack.masked_fill(stack.abs() <= stack.new_tensor(np.float32(self.epsilon).item()), 0)


@dataclass(frozen=True, kw_only=True)
class Reinforce(Transform):
    """Multiplies what a task alone changed by 1 + r · min(ρ, α); a task with no such entry has ρ = α, if it shares any."""

    r: float
    alpha: float
    epsilon: float
    scope: Literal["vector", "tensor"]
    per_task: ClassVar[bool] = False

    def requires(self) -> OverlapCounts:
        """Shared and unique entries."""
        return OverlapCounts(per_tensor=self.scope == "tensor")

    def prepare(self, result: Any, tasks: tuple[str, ...]) -> Any:
        """The factors by task, in each tensor where they are by tensor."""
        return {name: self._factors(one) for name, one in result.items()} if self.scope == "tensor" else self._factors(result)

    def apply(self, stack: Float[Tensor, "task *block"], state: Any, site: Site) -> Float[Tensor, "task *block"]:
        """A block with its unique entries enlarged."""
        factors: list[float] = state[site.name] if self.scope == "tensor" else state
        alone = (stack != 0).sum(0) == 1
        return torch.stack([torch.where(alone, row * factor, row) for row, factor in zip(stack, factors, strict=True)])

    def _factors(self, counts: Tensor) -> list[float]:
        found = []
        for shared, unique in counts.tolist():
            ratio = shared / max(unique, self.epsilon) if unique or self.epsilon else (self.alpha if shared else 0.0)
            found.append(1 + self.r * min(ratio, self.alpha))
        return found


@register("ram", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Ram(Method):
    r"""$\tau = \lambda\,\mathrm{mean}\{\tau_t : |\tau_t| > \varepsilon\}$ entrywise."""

    epsilon: Least = 1e-5
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """What is changed, disjoint mean, scale."""
        return Chain(transforms=(Changed(epsilon=self.epsilon),), reduction=DisjointMean(), post=(Scale(scale=self.scale),))


@register("ramplus_tl", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class RamPlus(Method):
    r"""`ram` with what task $t$ alone changed multiplied by $1 + r \min(\rho_t, \alpha)$.

    - `scope`: where shared and unique entries are counted: in each `tensor` (mergekit), or in the whole `vector` (the authors' code).
    """

    r: Annotated[NotNegative, "how much what is unique can grow, for each unit of ρ."] = 0.1
    alpha: Annotated[NotNegative, "α, the largest ρ that counts."] = 0.2
    epsilon: Least = 1e-5
    scope: Literal["tensor", "vector"] = "tensor"
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """What is changed, reinforced where it is unique, disjoint mean, scale."""
        reinforce = Reinforce(r=self.r, alpha=self.alpha, epsilon=self.epsilon, scope=self.scope)
        return Chain(
            transforms=(Changed(epsilon=self.epsilon), reinforce), reduction=DisjointMean(), post=(Scale(scale=self.scale),)
        )
