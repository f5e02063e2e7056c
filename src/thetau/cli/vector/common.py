"""What the verbs of `thetau vector` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import typer

from thetau.cli.common import Machine, Writing, save
from thetau.errors import RecipeError
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.facade import Expression

Model = Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model, LoRA adapter or saved task vector.")]
Values = Annotated[
    Literal["float32", "bfloat16", "float16"], Option("Of the values: float32, bfloat16 or float16.", flags=("--dtype",))
]


def finite(value: float | list[float] | None) -> float | list[float] | None:
    """The scales, if they are numbers. Raises `RecipeError`."""
    if not all(map(math.isfinite, value if isinstance(value, list) else [value or 0.0])):
        raise RecipeError([f"`--scale` must be a finite number. Got {value}."], "options")
    return value


Scale = Annotated[float, typer.Option("--scale", "-s", callback=finite, help="λ, by which the task vector is multiplied.")]


@final
@dataclass(frozen=True, kw_only=True)
class Sum:
    """What is written of base + vector."""

    vector_only: Annotated[bool, Option("Write the task vector instead of the model.", flags=("--vector-only",))] = False
    writing: Writing = field(default_factory=Writing)

    def write(self, base: Expression, vector: Expression, out: Path, machine: Machine) -> None:
        """The model, or the vector alone. Raises `OutputError`."""
        write(vector if self.vector_only else base + vector, out, self.writing, machine)


@final
@dataclass(frozen=True, kw_only=True)
class Masks:
    """Which vectors share a mask."""

    cluster: Annotated[
        tuple[int, ...],
        Option("Number of each vector's cluster, in their order; once a vector.", flags=("--cluster",)),
    ] = ()
    rounding: Annotated[Literal["half_up", "half_even"], Option("What 1/2 becomes in a shared mask: half_up or half_even.")] = (
        "half_up"
    )


def operands(base: str, given: Sequence[str]) -> tuple[Expression, list[Expression]]:
    """The base, and each operand as a task vector: a saved one, or a model minus the base."""
    from thetau.facade import as_vector, open_base
    from thetau.facade import open as open_weights

    opened = open_base(base)
    return opened, [as_vector(open_weights(operand, base=opened), opened) for operand in given]


def write(result: Expression, out: Path, writing: Writing, machine: Machine) -> None:
    """A model or a vector. Raises `OutputError`."""
    options: dict[str, Any] = {"dtype": writing.dtype, "quantise": writing.quantise, "exclude": writing.left_out.exclude}
    save(result, out, quiet=machine.quiet, engine=machine.engine(), **options)


def size(count: int) -> str:
    """Bytes in words."""
    from thetau.engine.work import gigabytes

    return gigabytes(count)
