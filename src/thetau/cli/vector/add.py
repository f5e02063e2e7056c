"""`thetau vector add`: a base and several vectors."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.common import BaseOption, Machine, Out
from thetau.cli.options import with_options
from thetau.cli.vector.common import Sum, finite, operands
from thetau.errors import RecipeError


@with_options
def add(
    base: BaseOption,
    vector: Annotated[list[str], typer.Option("--vector", "-v", help="Task vector, model or adapter; repeat.")],
    out: Out,
    scale: Annotated[
        list[float] | None,
        typer.Option("--scale", "-s", callback=finite, help="λ: one for all, or one a vector in their order."),
    ] = None,
    *,
    result: Sum,
    machine: Machine,
) -> None:
    """Write base + Σ λ·τ (task addition).

    thetau vector add --base base -v sst2 -v mnli --scale 0.3 -o both
    """
    scales = scale or [1.0]
    if len(scales) not in (1, len(vector)):
        raise RecipeError([f"`--scale` must be given once, or once a vector ({len(vector)}). Got {len(scales)}."], "options")
    opened, vectors = operands(base, vector)
    scales = scales * len(vectors) if len(scales) == 1 else scales
    total = sum((s * v for s, v in zip(scales[1:], vectors[1:], strict=True)), start=scales[0] * vectors[0])
    result.write(opened, total, out, machine)
