"""What the methods that mask task vectors share: how what a mask leaves is rescaled, and TIES's election and mean after any mask."""

from __future__ import annotations

from typing import Literal

from thetau.fields import by_pattern
from thetau.methods.reductions import DisjointMean, Scale
from thetau.parts import Chain, Method, Transform, Varying
from thetau.transforms import Elect, Rescale, Weigh


def consensus(
    masks: tuple[Transform, ...],
    *,
    weights: Varying,
    normalise: bool,
    cancelled: Literal["zero", "majority", "positive"],
    scale: Varying,
) -> Chain:
    """Masks, then TIES without its trim: weigh, elect a sign, average what agrees, scale."""
    return Chain(
        transforms=(*masks, Weigh(weights=weights), Elect(cancelled=cancelled)),
        reduction=DisjointMean(counting=weights, normalise=normalise),
        post=(Scale(scale=scale),),
    )


def rescaled(masking: Transform, rescale: str, scope: Literal["vector", "tensor"] = "tensor") -> Transform:
    """A mask, rescaled to the magnitudes that there were before it where `rescale` says `l1`."""
    return Rescale(masking=masking, scope=scope) if rescale == "l1" else masking


def refuse_patterns(method: Method, trim: str, **values: Varying) -> None:
    """Nothing, unless a share varies by pattern where whole vectors are ranked.

    Raises:
        ValueError: one does; the message names it.
    """
    for name, value in values.items():
        if trim == "vector" and by_pattern(value):
            raise ValueError(
                f'`{type(method).__name__}({name}=...)` may vary by pattern only with `trim="tensor"`: with `trim="vector"` one cut '
                f"holds for all tensors. Got {value!r}."
            )
