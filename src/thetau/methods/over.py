"""What methods over another method share: its chain with a stage after it, and its vectors where it works on models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from thetau.parts import BASE, Chain, Method, PostStage, Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def followed(chain: Chain, stage: PostStage) -> Chain:
    """A chain with one more stage after its last one."""
    return replace(chain, post=(*chain.post, stage))


def usual(method: Method) -> Method:
    """The same method with its default fields, and so the methods that it holds."""
    held = {name: usual(value) for name, value in method.__dict__.items() if isinstance(value, Method)}
    return type(method)(**held)


def base_of(site: Site, models: bool) -> Tensor | None:
    """What must be taken off to see a task vector: the base's rows in a chain over models, else nothing."""
    return site.base if models else None


def without_base(stack: Float[Tensor, "task *block"], site: Site, base: Tensor | None) -> Float[Tensor, "vector *block"]:
    """The task vectors of a stack, without the base where it is one of the models."""
    if base is None:
        return stack
    tuned = [index for index, task in enumerate(site.tasks) if task != BASE]
    return stack[tuned] - base
