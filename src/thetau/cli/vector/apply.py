"""`thetau vector apply`: a base and one saved vector."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.common import BaseOption, Machine, Out, Writing
from thetau.cli.options import with_options
from thetau.cli.vector.common import Scale, operands, write


@with_options
def apply(
    base: BaseOption,
    vector: Annotated[str, typer.Option("--vector", "-v", help="A saved task vector.")],
    out: Out,
    scale: Scale = 1.0,
    *,
    writing: Writing,
    machine: Machine,
) -> None:
    """Write base + λ·τ from a saved task vector.

    thetau vector apply --base base --vector sst2-vector.safetensors -o sst2-again
    """
    opened, vectors = operands(base, [vector])
    write(opened + scale * vectors[0], out, writing, machine)
