"""`thetau export gguf`: a model as one file that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def gguf(
    model: Annotated[str, typer.Argument(help="A model: a folder with its tokenizer, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new file NAME.gguf.")],
    kind: Annotated[
        Literal["f16", "bf16", "q8_0", "f32"], typer.Option("--type", help="How matrices are stored; vectors stay in f32.")
    ] = "f16",
    pre: Annotated[
        str | None, typer.Option(help="llama.cpp's name of the rule by which texts are cut, where it is not known here.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; that of its folder otherwise.")] = None,
) -> None:
    """Write a model of the Llama, Mistral, Qwen2 or Qwen3 family as GGUF, with tokenizer, chat template and end tokens.

    thetau export gguf merged --type q8_0 -o merged.gguf
    """
    from thetau.checkpoint.hub import bring
    from thetau.checkpoint.opening import open_source
    from thetau.engine.work import gigabytes
    from thetau.export import to_gguf

    source = open_source(model)
    bring([source])
    written = to_gguf(source, out, kind=kind, pre=pre, name=name)
    for note in written.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{out}: {written.tensors} tensors, {gigabytes(written.nbytes)}")
