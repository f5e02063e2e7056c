"""`thetau vector compress`: a task vector in less room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, final

import typer

from thetau.cli.common import File, Json, LeftOut, Machine, summary
from thetau.cli.options import with_options
from thetau.cli.vector.common import operands, size
from thetau.errors import RecipeError
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.compression import Compressed, Form, TaskStore
    from thetau.methods.emr import Emr
    from thetau.methods.tall_masks import TallMasks


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
        raise RecipeError(
            [
                "say how: `--density 0.05`, `--rank 16` or `--dtype bfloat16` (float16, int8). Several tasks: `--method tall` or `emr`."
            ],
            "options",
        )


@final
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How several vectors are written as one and a bit an entry for each."""

    method: Annotated[
        Literal["tall", "emr"] | None, Option("Of several vectors: tall (TALL masks) or emr (elect, mask and rescale).")
    ] = None
    selectivity: Annotated[float | None, Option("tall: λ of the masks; more keeps fewer entries. Default 0.4.")] = None
    merged: Annotated[
        Literal["task_arithmetic", "ties"] | None, Option("tall: the vector that the tasks share. Default task_arithmetic.")
    ] = None
    rescale: Annotated[
        Literal["means", "sums", "none"] | None, Option("emr: the rescalers, as its method page says. Default means.")
    ] = None

    def keeping(self, form: FormOptions) -> TallMasks | Emr | None:
        """The method, or None where a vector is written alone. Raises `RecipeError`: options that do not go together."""
        from thetau.compression.forms import DTYPES
        from thetau.fields import OneOf
        from thetau.methods import Emr, TallMasks

        tall = {"selectivity": self.selectivity, "vector": self.merged}
        given = {name: value for name, value in tall.items() if value is not None}
        if given and self.method != "tall":
            raise RecipeError(["`--selectivity` and `--merged` belong to `--method tall`."], "options")
        if self.rescale is not None and self.method != "emr":
            raise RecipeError(["`--rescale` belongs to `--method emr`."], "options")
        if self.method is None:
            return None
        if form.density is not None or form.rank is not None:
            raise RecipeError(["`--density` and `--rank` are of one vector; leave them out with `--method`."], "options")
        try:
            if form.dtype is not None:
                OneOf(DTYPES).check("options", "dtype", form.dtype)
            return TallMasks(**cast("Any", given)) if self.method == "tall" else Emr(rescale=self.rescale or "means")
        except ValueError as error:
            raise RecipeError([str(error)], "options") from error


@with_options
def compress(
    out: File,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model that --model was fine-tuned from: folder, file or hub id.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Fine-tuned model or LoRA adapter; several with --method.")
    ] = None,
    vector: Annotated[
        list[str] | None, typer.Option("--vector", "-v", help="A saved task vector, in place of --model; several with --method.")
    ] = None,
    *,
    options: FormOptions,
    tasks: TaskOptions,
    left_out: LeftOut,
    json: Json,
    machine: Machine,
) -> None:
    """Write a task vector in less room: sparse, low rank or in fewer bits. Every command reads the file as a task vector.

    thetau vector compress --base base --model sst2 --density 0.05 -o sst2-sparse.safetensors

    Or several as one vector and a bit an entry for each, of which FILE#NAME is one:

    thetau vector compress --base base -m sst2 -m cr --method emr -o both.safetensors
    """
    from thetau.compression import compress as write
    from thetau.compression import compress_tasks
    from thetau.facade import open as open_weights

    json.check()
    given = [*(model or []), *(vector or [])]
    method = tasks.keeping(options)
    if method is None and len(given) != 1:
        raise RecipeError(
            ["give either `--model` (with `--base`) or `--vector`. Several go with `--method tall` or `emr`."], "options"
        )
    if not given:
        raise RecipeError(["give the vectors: `--model` (with `--base`) or `--vector`, once for each."], "options")
    if model and base is None:
        raise RecipeError(["`--model` needs `--base`, the model that it was fine-tuned from."], "options")
    form = options.form() if method is None else None
    opened = [open_weights(one) for one in given] if base is None else operands(base, given)[1]
    if form is not None:
        result = write(opened[0], out, form, engine=machine.engine(), exclude=left_out.exclude)
        _show(result, quiet=machine.quiet)
        json.write(result.to_json())
        return
    assert method is not None
    dtype = cast("Any", options.dtype or "float32")
    store = compress_tasks(opened, out, method, dtype=dtype, exclude=left_out.exclude, engine=machine.engine())
    _show_tasks(store, quiet=machine.quiet)
    json.write(store.to_json())


def _show_tasks(store: TaskStore, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from thetau.engine.save import Report

    summary(Report(store.path, store.tensors, store.nbytes, store.notes, store.warnings), quiet=quiet)
    if quiet:
        return
    share = store.nbytes / store.dense_bytes if store.dense_bytes else 1.0
    typer.echo(
        f"{store.method}: {len(store.rescalers)} tasks in {size(store.nbytes)}, of {size(store.dense_bytes)} in float32 ({100 * share:.1f} %)"
    )
    table = Table("task", "open as", "mask", "rescaler", "relative error", box=None, pad_edge=False)
    for task, rescaler in store.rescalers.items():
        kept, error = f"{100 * store.density[task]:.1f} %", f"{store.error[task]:.4f}"
        table.add_row(task, f"{store.path.name}#{task}", kept, f"{rescaler:.3f}", error)
    Console(soft_wrap=True, highlight=False).print(table)


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
