"""`thetau vector analogy`: A is to B as C is to the result."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.common import BaseOption, Machine, Out
from thetau.cli.options import with_options
from thetau.cli.vector.common import Scale, Sum, operands


@with_options
def analogy(
    base: BaseOption,
    a: Annotated[str, typer.Option("--a", help="A, as in: A is to B …")],
    b: Annotated[str, typer.Option("--b", help="B")],
    c: Annotated[str, typer.Option("--c", help="… as C is to the result.")],
    out: Out,
    scale: Scale = 1.0,
    *,
    result: Sum,
    machine: Machine,
) -> None:
    """Write base + λ·(τ_C + τ_B − τ_A): A is to B as C is to the result.

    thetau vector analogy --base base --a amazon-lm --b amazon-sentiment --c yelp-lm -o yelp-sentiment
    """
    opened, (first, second, third) = operands(base, [a, b, c])
    result.write(opened, scale * (third + second - first), out, machine)
