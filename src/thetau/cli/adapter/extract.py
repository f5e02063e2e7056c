"""`thetau adapter extract`: an adapter out of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from thetau.cli.adapter.common import Output, Ranks
from thetau.cli.common import Json, LeftOut, Machine, Out, check_folder
from thetau.cli.options import with_options
from thetau.errors import RecipeError


@with_options
def extract(
    base: Annotated[str, typer.Argument(help="The model that the other was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="Fine-tuned model, adapter of any kind, or saved task vector.")],
    out: Out,
    *,
    ranks: Ranks,
    left_out: LeftOut,
    output: Output,
    machine: Machine,
    json: Json,
) -> None:
    """Write the LoRA adapter nearest to model − base: the best product of a rank, or of an error, layer by layer.

    thetau adapter extract base sst2 --rank 16 -o sst2-lora
    """
    from thetau.adapters import extract as run
    from thetau.cli.vector.common import operands

    json.check()
    cut = ranks.cut()
    if cut is None:
        raise RecipeError(["give `--rank N`, `--error SHARE`, or both."], "options")
    check_folder(out)
    _, (vector,) = operands(base, [model])
    made = run(vector, cut, exclude=left_out.exclude, name=base, engine=machine.engine(bar=False))
    output.write(made, out, json, quiet=machine.quiet)
