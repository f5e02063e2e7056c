"""`thetau vector compress`: a task vector in less room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast, final

import typer

from thetau.cli.common import File, Json, LeftOut, Machine, summary
from thetau.cli.options import with_options
from thetau.cli.vector.common import operands, size
from thetau.errors import RecipeError
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.compression import Compressed, Form


@final
@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """In which form the vector is written."""

    density: Annotated[float | None, Option("Sparse: share of the entries that is kept; 1 keeps all that is not zero.")] = None
    scope: Annotated[str, Option("Sparse: what is ranked, the whole vector or each tensor.")] = "vector"
    rank: Annotated[int | None, Option("Low rank: of each matrix.")] = None
    dtype: Annotated[str | None, Option("Of the values: float32, bfloat16, float16; alone (or int8) it is the form itself.")] = (
        None
    )

    def form(self) -> Form:
        """The form that the options say. Raises `RecipeError`: they say none, or several."""
        density, scope, rank, dtype = self.density, self.scope, self.rank, self.dtype
        from thetau.compression import LowRank, Precision, Sparse
        from thetau.compression.forms import DTYPES
        from thetau.fields import OneOf

        if density is not None and rank is not None:
            raise RecipeError(["give `--density` or `--rank`, not both: one form a file."], "options")
        try:
            OneOf(("vector", "tensor")).check("options", "scope", scope)
            if dtype is not None:
                known = DTYPES if density is not None or rank is not None else ("bfloat16", "float16", "int8")
                OneOf(known).check("options", "dtype", dtype)
            if density is not None:
                return Sparse(density=density, scope=cast("Any", scope), dtype=cast("Any", dtype or "float32"))
            if rank is not None:
                return LowRank(rank=rank, dtype=cast("Any", dtype or "float32"))
            if dtype is not None:
                return Precision(dtype=cast("Any", dtype))
        except ValueError as error:
            raise RecipeError([str(error)], "options") from error
        raise RecipeError(["say how: `--density 0.05`, `--rank 16` or `--dtype bfloat16` (float16, int8)."], "options")


@with_options
def compress(
    out: File,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model that --model was fine-tuned from: folder, file or hub id.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Fine-tuned model or LoRA adapter.")] = None,
    vector: Annotated[str | None, typer.Option("--vector", "-v", help="A saved task vector, in place of --model.")] = None,
    *,
    options: FormOptions,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Write a task vector in less room: sparse, low rank or in fewer bits. Every command reads the file as a task vector.

    thetau vector compress --base base --model sst2 --density 0.05 -o sst2-sparse.safetensors
    """
    from thetau.compression import compress as write
    from thetau.facade import open as open_weights

    json.check()
    if (model is None) == (vector is None):
        raise RecipeError(["give either `--model` (with `--base`) or `--vector`."], "options")
    if model is not None and base is None:
        raise RecipeError(["`--model` needs `--base`, the model that it was fine-tuned from."], "options")
    form = options.form()
    opened = open_weights(str(vector)) if base is None else operands(base, [str(model or vector)])[1][0]
    result = write(opened, out, form, engine=machine.engine(), exclude=left_out.exclude)
    _show(result, quiet=machine.quiet)
    json.write(result.to_json())


def _show(result: Compressed, *, quiet: bool) -> None:
    from thetau.engine.save import Report

    summary(Report(result.path, result.tensors, result.nbytes, result.notes, result.warnings), quiet=quiet)
    if quiet:
        return
    share = result.nbytes / result.dense_bytes if result.dense_bytes else 1.0
    typer.echo(f"{result.form}: {size(result.nbytes)} of {size(result.dense_bytes)} in float32 ({100 * share:.1f} %)")
    typer.echo(
        f"relative error ‖τ − τ̂‖ / ‖τ‖ = {result.error:.4g}; worst {result.worst_error:.4g} in {result.worst or 'no tensor'}"
    )
