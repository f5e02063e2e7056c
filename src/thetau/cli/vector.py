"""`thetau vector`: the arithmetic of task vectors on files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thetau.cli.common import BaseOption, Dtype, Exclude, MaxMemory, Out, Quiet, Workers, engine, save
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.facade import Expression

vector_app = typer.Typer(
    help="Task vectors as files: extract, add, negate, analogy, apply, info; compress, localize, stitch, storage.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Fine-tuned model, LoRA adapter or saved task vector.")]


def _finite(value: float | list[float] | None) -> float | list[float] | None:
    if not all(map(math.isfinite, value if isinstance(value, list) else [value or 0.0])):
        raise RecipeError([f"`--scale` must be a finite number. Got {value}."], "options")
    return value


Scale = Annotated[float, typer.Option("--scale", "-s", callback=_finite, help="λ, by which the task vector is multiplied.")]
AsVector = Annotated[bool, typer.Option("--vector-only", help="Write the task vector instead of the model.")]


@vector_app.command()
def extract(
    base: BaseOption,
    model: Model,
    out: Out,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write τ = model − base, in float32 unless --dtype says otherwise.

    thetau vector extract --base base --model sst2 -o sst2-vector.safetensors
    """
    _, vectors = operands(base, [model])
    save(vectors[0], out, quiet=quiet, dtype=dtype, exclude=exclude or [], engine=engine(workers, max_memory, quiet))


@vector_app.command()
def add(
    base: BaseOption,
    vector: Annotated[list[str], typer.Option("--vector", "-v", help="Task vector, model or adapter; repeat.")],
    out: Out,
    scale: Annotated[
        list[float] | None,
        typer.Option("--scale", "-s", callback=_finite, help="λ: one for all, or one a vector in their order."),
    ] = None,
    vector_only: AsVector = False,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write base + Σ λ·τ (task addition).

    thetau vector add --base base -v sst2 -v mnli --scale 0.3 -o both
    """
    scales = scale or [1.0]
    if len(scales) not in (1, len(vector)):
        raise RecipeError([f"`--scale` must be given once, or once a vector ({len(vector)}). Got {len(scales)}."], "options")
    opened, vectors = operands(base, vector)
    scales = scales * len(vectors) if len(scales) == 1 else scales
    total = sum((s * v for s, v in zip(scales[1:], vectors[1:], strict=True)), start=scales[0] * vectors[0])
    _write(opened, total, out, vector_only, exclude, dtype, workers, max_memory, quiet)


@vector_app.command()
def negate(
    base: BaseOption,
    model: Model,
    out: Out,
    scale: Scale = 1.0,
    vector_only: AsVector = False,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write base − λ·τ: forget what the model learnt.

    thetau vector negate --base base --model toxic --scale 0.5 -o detoxified
    """
    opened, vectors = operands(base, [model])
    _write(opened, -(scale * vectors[0]), out, vector_only, exclude, dtype, workers, max_memory, quiet)


@vector_app.command()
def analogy(
    base: BaseOption,
    a: Annotated[str, typer.Option("--a", help="A, as in: A is to B …")],
    b: Annotated[str, typer.Option("--b", help="B")],
    c: Annotated[str, typer.Option("--c", help="… as C is to the result.")],
    out: Out,
    scale: Scale = 1.0,
    vector_only: AsVector = False,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write base + λ·(τ_C + τ_B − τ_A): A is to B as C is to the result.

    thetau vector analogy --base base --a amazon-lm --b amazon-sentiment --c yelp-lm -o yelp-sentiment
    """
    opened, (first, second, third) = operands(base, [a, b, c])
    _write(opened, scale * (third + second - first), out, vector_only, exclude, dtype, workers, max_memory, quiet)


@vector_app.command()
def apply(
    base: BaseOption,
    vector: Annotated[str, typer.Option("--vector", "-v", help="A saved task vector.")],
    out: Out,
    scale: Scale = 1.0,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write base + λ·τ from a saved task vector.

    thetau vector apply --base base --vector sst2-vector.safetensors -o sst2-again
    """
    opened, vectors = operands(base, [vector])
    _write(opened, scale * vectors[0], out, False, exclude, dtype, workers, max_memory, quiet)


@vector_app.command()
def info(
    vector: Annotated[str, typer.Argument(help="A saved task vector.")],
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Tensors, parameters, norm, form and provenance of a saved task vector.

    thetau vector info sst2-vector.safetensors
    """
    from thetau.checkpoint.compressed import CompressedSource
    from thetau.facade import open as open_weights

    opened = open_weights(vector)
    if not opened.is_vector:
        raise RecipeError(
            [f"{vector} is a model. Make its task vector first: `thetau vector extract --base BASE --model {vector} -o OUT`."],
            "vector",
        )
    specs = opened.specs()
    metadata = opened.terms[0][1].metadata
    typer.echo(f"{vector}: task vector of {len(specs)} tensors, {sum(s.elements for s in specs.values()):,} parameters")
    typer.echo(f"norm {opened.norm(engine=engine(workers, None, quiet)):.6g}")
    if isinstance(source := opened.terms[0][1], CompressedSource):
        held = sum(spec.nbytes for spec in source.stored.specs.values())
        dense = sum(spec.nbytes for spec in specs.values())
        share = f" ({100 * held / dense:.1f} %)" if dense else ""
        typer.echo(
            f"form {source.form.replace('_', ' ')}, format {metadata['thetau.format']}: {held:,} of {dense:,} bytes{share}"
        )
        for kind, names in source.by_kind().items():
            typer.echo(f"stored {kind.replace('_', ' ')}: {len(names)} tensors")
    for key in ("thetau.version", "thetau.base", "thetau.density", "thetau.compression", "thetau.recipe"):
        if key in metadata:
            typer.echo(f"{key.removeprefix('thetau.')}: {metadata[key]}")


def operands(base: str, operands: list[str]) -> tuple[Expression, list[Expression]]:
    """The base, and each operand as a task vector: a saved one, or a model minus the base."""
    from thetau.facade import as_vector, open_base
    from thetau.facade import open as open_weights

    opened = open_base(base)
    return opened, [as_vector(open_weights(operand, base=opened), opened) for operand in operands]


def _write(
    base: Expression,
    vector: Expression,
    out: Path,
    vector_only: bool,
    exclude: list[str] | None,
    dtype: str | None,
    workers: int | None,
    max_memory: str | None,
    quiet: bool,
) -> None:
    result = vector if vector_only else base + vector
    save(result, out, quiet=quiet, dtype=dtype, exclude=exclude or [], engine=engine(workers, max_memory, quiet))
