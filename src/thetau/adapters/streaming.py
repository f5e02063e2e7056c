"""Tensors of an expression, whole, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.engine.executor import Engine
from thetau.engine.save import Output
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor


def tensors_of(
    expression: Combination, exclude: Sequence[str] = (), engine: Engine | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and values, float64, of which one is held at a time; passes over all of them come first, where a method asks for them."""
    engine = engine or Engine()
    output = Output.plan(expression, dtype=None, exclude=exclude)
    output.prepare()
    for name, spec in output.specs.items():
        if spec.dtype.is_floating_point and spec.elements and spec.shape:
            whole = torch.cat([rows for _, rows in output.rows(name, engine)])
            yield name, whole.reshape(spec.shape).double()
