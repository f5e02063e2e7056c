"""`thetau vector stitch`: localised task vectors, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, final

import typer

from thetau.cli.common import BaseOption, Machine, Out
from thetau.cli.options import with_options
from thetau.cli.vector.common import Masks, Scale, Sum, operands
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Whether masks are shared."""

    sharing: Annotated[
        Literal["none", "mask", "twice"],
        Option("Of masks within clusters: none, mask (Mask Sharing), twice (Stitch Twice)."),
    ] = "none"


@with_options
def stitch(
    base: BaseOption,
    vector: Annotated[
        list[str], typer.Option("--vector", "-v", help="Localised task vector (vector localize, vector compress); repeat.")
    ],
    out: Out,
    whole: Annotated[
        list[str] | None,
        typer.Option("--whole", help="Model or whole task vector of each --vector, in their order; Mask Sharing needs them."),
    ] = None,
    scale: Scale = 1.0,
    *,
    sharing: Sharing,
    masks: Masks,
    result: Sum,
    machine: Machine,
) -> None:
    """Write base + λ · Σ γ/Σγ ⊙ τ over localised task vectors: the stitch of Localize-and-Stitch, with masks that exist already.

    thetau vector stitch --base base -v sst2-mask.safetensors -v cr-mask.safetensors -o both
    """
    from thetau.compression import stitch as run

    opened, localised = operands(base, vector)
    full = operands(base, whole)[1] if whole else None
    merged = run(
        localised,
        vectors=full,
        sharing=sharing.sharing,
        clusters=masks.cluster or None,
        rounding=masks.rounding,
        scale=scale,
        exclude=result.writing.left_out.exclude,
        engine=machine.engine(),
    )
    result.write(opened, merged, out, machine)
