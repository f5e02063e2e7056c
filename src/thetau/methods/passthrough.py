"""Passthrough: one model as it is, or some of its tensors multiplied.

mergekit's method of that name, for layers that are stacked or repeated (`scale` there is `scale` here).

Use it to take a model, or slices of it, into another one unchanged, or to scale single tensors by name; it costs a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thetau.methods.fields import Coefficient
from thetau.methods.reductions import Sum
from thetau.methods.registry import register
from thetau.parts import Chain, Method


@register("passthrough", paper="mergekit, https://github.com/arcee-ai/mergekit")
@dataclass(frozen=True, kw_only=True)
class Passthrough(Method):
    r"""$\theta = s\,\theta_1$.

    - `scale`: s, what the model's tensors are multiplied by; a number, or one a pattern of tensor names (`per_pattern`).
    """

    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    scale: Coefficient = 1.0

    def chain(self) -> Chain:
        """A sum of one."""
        return Chain(reduction=Sum(scale=self.scale), models=True)
