"""What the verbs that collect evidence of one model share: its options, and the last words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from thetau.options import Option

if TYPE_CHECKING:
    from thetau.evidence.jobs import Opened

TunedModel = Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model: folder, file, adapter or hub id.")]
TaskName = Annotated[
    str | None, typer.Option("--task", "-t", help="Name of its task, or its folder; by default as its record says.")
]
BaseName = Annotated[
    str | None, typer.Option("--base", "-b", help="The model that it was fine-tuned from; by default as its record says.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]


@final
@dataclass(frozen=True, kw_only=True)
class Workers:
    """What runs a collection that is a sum over examples."""

    jobs: Annotated[int, Option("Processes that share the examples, each with a model of its own.", least=1)] = 1
    device: Annotated[str | None, Option("cpu, cuda, cuda:1; several jobs on cuda take a GPU each. Default cpu.")] = None


@final
@dataclass(frozen=True, kw_only=True)
class Opening:
    """Opens a fine-tuned model with its task, here or in another process; the fields are those of `open_subject`."""

    model: str
    task: str | None
    base: str | None
    data: Path | None
    kind: str | None
    purpose: str

    def __call__(self) -> Opened:
        """The model, its task and its weights. Raises as `open_subject` and `read_weights` do."""
        from thetau.cli.subject import open_subject
        from thetau.evidence.jobs import Opened
        from thetau.models import read_weights

        subject = open_subject(self.model, self.task, self.base, self.data, self.kind, purpose=self.purpose)
        weights = read_weights(self.model, base=subject.encoder.folder)
        return Opened(encoder=subject.encoder, task=subject.task, weights=weights, head=subject.head)


def tell(sentence: str, notes: Sequence[str], *, cached: bool = False, quiet: bool = False) -> None:
    """The notes, then the sentence, and whether the result was there already; nothing where it is to be quiet."""
    if quiet:
        return
    for note in notes:
        typer.echo(f"· {note}", err=True)
    typer.echo(f"{sentence}{' (from before)' if cached else ''}")
