"""`thetau adapter add`: a weighted sum of adapters, exactly."""

from __future__ import annotations

from typing import Annotated

from thetau.cli.adapter.common import Adapters, Base, Output, Ranks, source_of
from thetau.cli.common import Json, Out, check_folder
from thetau.cli.options import with_options
from thetau.options import Option


@with_options
def add(
    adapters: Adapters,
    out: Out,
    weights: Annotated[
        tuple[float, ...], Option("One each, signs and all: 1,-0.5. By default 1.", flags=("--weights", "-w"), commas=True)
    ] = (),
    base: Base = None,
    quiet: Annotated[bool, Option("No summary.", flags=("--quiet", "-q"))] = False,
    *,
    ranks: Ranks,
    output: Output,
    json: Json,
) -> None:
    """Write Σ w·Δ as one adapter. Ranks add up and nothing is lost, unless --rank or --error cuts them.

    thetau adapter add sst2-lora cr-lora --weights 1,-0.5 -o both
    """
    from thetau.adapters import add as run
    from thetau.adapters import open_adapter

    json.check()
    check_folder(out)
    opened = [open_adapter(adapter) for adapter in adapters]
    output.write(run(opened, weights or None, cut=ranks.cut(), base=source_of(base)), out, json, quiet=quiet)
