"""`thetau vector localize`: which entries of a task vector matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, final

import typer

from thetau.cli.common import BaseOption, File, Json, LeftOut, Machine, check_folder
from thetau.cli.options import with_options
from thetau.cli.vector.common import Values, operands, size
from thetau.evaluate.options import DataFolder, Kind
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Mask:
    """How the mask is learned; what is not given is as `MaskConfig` has it."""

    density: Annotated[float | None, Option("Share of the entries that the mask begins with. Default 0.01.")] = None
    keep: Annotated[float | None, Option("Share that it ends with; by default what the mask rounds to.")] = None
    regulariser: Annotated[str | None, Option("l1 (the paper) or polarise (the published code). Default l1.")] = None
    strength: Annotated[float | None, Option("Of the regulariser. Default 1.")] = None
    steps: Annotated[int | None, Option("Of gradient descent. Default 10.")] = None
    lr: Annotated[float | None, Option("Relative learning rate. Default 10.")] = None
    per_class: Annotated[int | None, Option("Training examples of each class. Default 64.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as batch_size=32.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {
            "density": self.density,
            "keep": self.keep,
            "regulariser": self.regulariser,
            "strength": self.strength,
            "steps": self.steps,
            "lr": self.lr,
            "per_class": self.per_class,
        }
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def localize(
    model: Annotated[str, typer.Argument(help="Fine-tuned model, adapter or saved task vector.")],
    base: BaseOption,
    out: File,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Its task; by default what the model's record says.")] = None,
    data: DataFolder = None,
    dtype: Values = "float32",
    kind: Kind = None,
    *,
    options: Mask,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Learn on a few examples a class which entries of a task vector matter, and write these as a sparse task vector.

    thetau vector localize models/sst2 --base all-MiniLM-L6-v2 -o sst2-mask.safetensors
    """
    from thetau.cli.subject import open_subject
    from thetau.evidence import MaskConfig
    from thetau.evidence import localize as run
    from thetau.finetune.progress import bar

    json.check()
    check_folder(out)
    config = MaskConfig.of(options.given(), "thetau vector localize")
    subject = open_subject(model, task, base, data, kind, purpose="a mask is learned")
    name = subject.task.name
    _, (vector,) = operands(base, [model])
    with bar(f"localise {name}", config.steps, "steps") as progress:
        result = run(
            subject.encoder,
            subject.task,
            vector,
            out,
            config,
            head=subject.head,
            dtype=dtype,
            exclude=left_out.exclude,
            engine=machine.engine(bar=False),
            tick=lambda step, loss: progress.advance(1, f"localise {name}, loss {loss:.3f}"),
        )
    json.write(result.to_json())
    if machine.quiet:
        return
    for note in result.notes:
        typer.echo(f"· {note}", err=True)
    typer.echo(
        f"{out}: {name}, {result.examples} examples, {100 * result.density:.2f} % of the entries, {size(result.file.nbytes)}"
    )
    typer.echo(f"relative error ‖τ − γ⊙τ‖ / ‖τ‖ = {result.error:.4f}")
    typer.echo(
        f"loss: base {result.base:.3f}, largest {100 * config.density:g} % {result.start:.3f}, "
        f"this mask {result.last:.3f}, all of τ {result.whole:.3f}"
    )
