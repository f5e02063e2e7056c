"""SLERP: from the base towards one other model along the great circle between them, tensor by tensor.

Shoemake, SIGGRAPH 1985, <https://doi.org/10.1145/325334.325242>, with mergekit's rules: weights that are sines of angles on the tensors as
they are, not on unit vectors; where |cos| > 0.9995 the straight line; a tensor of norm up to 1e-8 counts as it is. `t` may lie outside
[0, 1], beyond either model, as there.

Use it to blend two models of one ancestor so that norms hold; it costs two passes over both. It takes one model besides the base, at t = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import TYPE_CHECKING, Annotated, ClassVar

from thetau.methods.fields import Varies
from thetau.methods.reductions import InSpan
from thetau.methods.registry import register
from thetau.parts import Chain, Method, Varying, value_at

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

STRAIGHT = 0.9995
SHORT = 1e-8


@register("slerp", paper="Shoemake, SIGGRAPH 1985, https://doi.org/10.1145/325334.325242")
@dataclass(frozen=True, kw_only=True)
class Slerp(Method, InSpan):
    r"""$\theta = \frac{\sin((1-t)\Omega)}{\sin\Omega}\theta_0 + \frac{\sin(t\Omega)}{\sin\Omega}\theta_1$, $\Omega$ being the angle between them."""

    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Annotated[
        Varying, Varies(pattern=True), "how far: 0 is the base, 1 the other model; a number, or one a pattern of tensor names."
    ] = 0.5

    def chain(self) -> Chain:
        """Models, the base first."""
        return Chain(reduction=self, models=True, with_base=True)

    def coefficients(self, gram: Float[Tensor, "2 2"], name: str, tasks: tuple[str, ...]) -> list[float]:
        """Of the base and of the other model."""
        t = value_at(self.t, name)
        norms = [sqrt(max(float(gram[i, i]), 0.0)) for i in range(2)]
        lengths = [norm if norm > SHORT else 1.0 for norm in norms]
        cosine = max(-1.0, min(1.0, float(gram[0, 1]) / lengths[0] / lengths[1]))
        if abs(cosine) > STRAIGHT:
            return [1 - t, t]
        angle = acos(cosine)
        return [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]
