"""`thetau adapter convert`: an adapter in another spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from thetau.cli.adapter.common import Ranks, Values
from thetau.cli.options import with_options
from thetau.options import Option


@with_options
def convert(
    adapter: Annotated[str, typer.Argument(help="A PEFT folder, or a LoRA file of kohya's scripts or of diffusers.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for peft, a new file NAME.safetensors for the others.")],
    to: Annotated[Literal["peft", "kohya", "diffusers"], Option("The spelling that is written.", flags=("--to",))] = "peft",
    component: Annotated[
        str, typer.Option(help="Of a pipeline, where the names do not say it: unet, transformer, text_encoder.")
    ] = "unet",
    dtype: Values = "float32",
    *,
    ranks: Ranks,
) -> None:
    """Write a LoRA adapter as PEFT, kohya's scripts or diffusers read it, exactly unless --rank or --error cuts it.

    thetau adapter convert style-lora --to kohya -o style.safetensors
    """
    from thetau.adapters import add, open_adapter
    from thetau.checkpoint import FLOATS

    opened = open_adapter(adapter)
    add([opened], cut=ranks.cut()).save(out, dtype=FLOATS[dtype].torch, layout=to, component=component)
    typer.echo(f"{out}: {len(opened.paths)} layers")
