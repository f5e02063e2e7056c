"""What the verbs that collect evidence of one model share: its options, and the last words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

TunedModel = Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model: folder, file, adapter or hub id.")]
TaskName = Annotated[
    str | None, typer.Option("--task", "-t", help="Name of its task, or its folder; by default as its record says.")
]
BaseName = Annotated[
    str | None, typer.Option("--base", "-b", help="The model that it was fine-tuned from; by default as its record says.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]


def tell(sentence: str, notes: Sequence[str], *, cached: bool = False, quiet: bool = False) -> None:
    """The notes, then the sentence, and whether the result was there already; nothing where it is to be quiet."""
    if quiet:
        return
    for note in notes:
        typer.echo(f"· {note}", err=True)
    typer.echo(f"{sentence}{' (from before)' if cached else ''}")
