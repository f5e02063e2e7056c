"""NearSwap: the base, moved towards one other model, in no entry by more than t.

alchemonaut 2024, <https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001>, and mergekit's `nearswap`, whose weights come to the same for
t of at least 1e-6; t is 1e-4 there by the model's name, and must be given in mergekit.

Use it to take over what two models nearly agree on, and little of what they do not; one pass over both. It takes one model besides the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau.methods.fields import Coefficient, Varies, Within
from thetau.methods.reductions import Scale, Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Op, Site, Transform, Varying

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clip(Transform):
    """Each entry, brought to the nearest number in [−bound, bound]; the bound varies by pattern."""

    bound: Varying

    def compiles(self, site: Site) -> bool:
        """At any tensor."""
        return True

    def program(self, state: None, site: Site, element: int) -> list[Op]:
        """The same for the compiled loop."""
        return [Op("clip", value=site.value(self.bound))]

    def apply(self, stack: Float[Tensor, "task *block"], state: None, site: Site) -> Float[Tensor, "task *block"]:
        """A block, clipped."""
        bound = stack.new_tensor(site.value(self.bound))
        return stack.clamp(-bound, bound)


@register("nearswap", paper="alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001")
@dataclass(frozen=True, kw_only=True)
class Nearswap(Method):
    r"""$\tau = \lambda\,\mathrm{clip}(\tau_1, -t, t)$."""

    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Annotated[
        Varying,
        Varies(pattern=True),
        Within("[0, inf)"),
        "how far an entry may move, in the unit of the weights; a number, or one a pattern of tensor names.",
    ] = 1e-4
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """Clip, scale."""
        return Chain(transforms=(Clip(bound=self.t),), reduction=Sum(), post=(Scale(scale=self.scale),))
