"""`thetau vector compress | localize | stitch | storage`: task vectors in less room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from thetau.cli.common import BaseOption, Dtype, Exclude, MaxMemory, Out, Quiet, Workers, check_folder, engine, save, summary
from thetau.cli.vector import AsVector, Scale, operands
from thetau.cli.vector import vector_app as vector_app
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.compression import Compressed, Form

File = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes: a new file, NAME.safetensors.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON too.")]
Clusters = Annotated[
    list[int] | None, typer.Option("--cluster", help="Number of each vector's cluster, in their order; once a vector.")
]
Sharing = Annotated[str, typer.Option(help="Of masks within clusters: none, mask (Mask Sharing), twice (Stitch Twice).")]
Rounding = Annotated[str, typer.Option(help="What 1/2 becomes in a shared mask: half_up or half_even.")]


@vector_app.command()
def compress(
    out: File,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model that --model was fine-tuned from: folder, file or hub id.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Fine-tuned model or LoRA adapter.")] = None,
    vector: Annotated[str | None, typer.Option("--vector", "-v", help="A saved task vector, in place of --model.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Sparse: share of the entries that is kept; 1 keeps all that is not zero.")
    ] = None,
    scope: Annotated[str, typer.Option(help="Sparse: what is ranked, the whole vector or each tensor.")] = "vector",
    rank: Annotated[int | None, typer.Option(help="Low rank: of each matrix.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the values: float32, bfloat16, float16; alone (or int8) it is the form itself.")
    ] = None,
    exclude: Exclude = None,
    json: Json = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write a task vector in less room: sparse, low rank or in fewer bits. Every command reads the file as a task vector.

    thetau vector compress --base base --model sst2 --density 0.05 -o sst2-sparse.safetensors
    """
    import json as serialiser

    from thetau.compression import compress as write
    from thetau.facade import open as open_weights

    check_folder(json)
    if (model is None) == (vector is None):
        raise RecipeError(["give either `--model` (with `--base`) or `--vector`."], "options")
    if model is not None and base is None:
        raise RecipeError(["`--model` needs `--base`, the model that it was fine-tuned from."], "options")
    form = _form(density, scope, rank, dtype)
    opened = open_weights(str(vector)) if base is None else operands(base, [str(model or vector)])[1][0]
    result = write(opened, out, form, engine=engine(workers, max_memory, quiet), exclude=exclude or [])
    _show(result, quiet=quiet)
    if json is not None:
        json.write_text(serialiser.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")


@vector_app.command()
def localize(
    model: Annotated[str, typer.Argument(help="Fine-tuned model, adapter or saved task vector.")],
    base: BaseOption,
    out: File,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Its task; by default what the model's record says.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of task folders; looked at before the shipped tasks.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries that the mask begins with. Default 0.01.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share that it ends with; by default what the mask rounds to.")] = None,
    regulariser: Annotated[str | None, typer.Option(help="l1 (the paper) or polarise (the published code). Default l1.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of the regulariser. Default 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of gradient descent. Default 10.")] = None,
    lr: Annotated[float | None, typer.Option(help="Relative learning rate. Default 10.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Training examples of each class. Default 64.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the values: float32, bfloat16 or float16.")] = "float32",
    kind: Annotated[
        str | None, typer.Option(help="How the base is read: sentence, image, mask or text_to_text; by default as its files say.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other field of the config, as batch_size=32.")] = None,
    exclude: Exclude = None,
    json: Json = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Learn on a few examples a class which entries of a task vector matter, and write these as a sparse task vector.

    thetau vector localize models/sst2 --base all-MiniLM-L6-v2 -o sst2-mask.safetensors
    """
    import json as serialiser

    from thetau.cli.common import parse_fields
    from thetau.compression.forms import DTYPES
    from thetau.errors import DataError
    from thetau.evaluate.tuned import is_tangent, open_tuned
    from thetau.evidence import MaskConfig
    from thetau.evidence import localize as run
    from thetau.finetune.progress import bar
    from thetau.models import load_encoder
    from thetau.models.loading import kind_named
    from thetau.tasks import load_task

    check_folder(json)
    check_folder(out)
    given = {
        "density": density,
        "keep": keep,
        "regulariser": regulariser,
        "strength": strength,
        "steps": steps,
        "lr": lr,
        "per_class": per_class,
    }
    given = {name: value for name, value in given.items() if value is not None} | parse_fields(set_ or [])
    if dtype not in DTYPES:
        raise RecipeError([f"`--dtype` must be one of {', '.join(DTYPES)}. Got {dtype!r}."], "options")
    config = MaskConfig.of(given, "thetau vector localize")
    path = Path(model)
    name = task if task is not None else open_tuned(model).task
    if path.exists() and is_tangent(path):
        raise DataError(f"{model}: belongs to the tangent space; a mask is learned for models of the model's own space.")
    loaded = load_task(name, data)
    heads = open_tuned(f"{name}={model}").heads() if path.is_dir() else {}
    encoder = load_encoder(base, kind_named(kind))
    _, (vector,) = operands(base, [model])
    with bar(f"localise {name}", config.steps, "steps") as progress:
        result = run(
            encoder,
            loaded,
            vector,
            out,
            config,
            head=heads.get(name),
            dtype=cast("Any", dtype),
            exclude=exclude or [],
            engine=engine(workers, max_memory, quiet=True),
            tick=lambda step, loss: progress.advance(1, f"localise {name}, loss {loss:.3f}"),
        )
    if json is not None:
        json.write_text(serialiser.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if quiet:
        return
    for note in result.notes:
        typer.echo(f"· {note}", err=True)
    typer.echo(
        f"{out}: {name}, {result.examples} examples, {100 * result.density:.2f} % of the entries, {_size(result.file.nbytes)}"
    )
    typer.echo(f"relative error ‖τ − γ⊙τ‖ / ‖τ‖ = {result.error:.4f}")
    typer.echo(
        f"loss: base {result.base:.3f}, largest {100 * config.density:g} % {result.start:.3f}, "
        f"this mask {result.last:.3f}, all of τ {result.whole:.3f}"
    )


@vector_app.command()
def stitch(
    base: BaseOption,
    vector: Annotated[
        list[str], typer.Option("--vector", "-v", help="Localised task vector (vector localize, vector compress); repeat.")
    ],
    out: Out,
    whole: Annotated[
        list[str] | None,
        typer.Option("--whole", help="Model or whole task vector of each --vector, in their order; Mask Sharing needs them."),
    ] = None,
    sharing: Sharing = "none",
    cluster: Clusters = None,
    rounding: Rounding = "half_up",
    scale: Scale = 1.0,
    vector_only: AsVector = False,
    exclude: Exclude = None,
    dtype: Dtype = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Write base + λ · Σ γ/Σγ ⊙ τ over localised task vectors: the stitch of Localize-and-Stitch, with masks that exist already.

    thetau vector stitch --base base -v sst2-mask.safetensors -v cr-mask.safetensors -o both
    """
    from thetau.compression import stitch as run

    opened, localised = operands(base, vector)
    full = operands(base, whole)[1] if whole else None
    _choices(sharing, rounding)
    merged = run(
        localised,
        vectors=full,
        sharing=cast("Any", sharing),
        clusters=cluster or None,
        rounding=cast("Any", rounding),
        scale=scale,
        exclude=exclude or [],
        engine=engine(workers, max_memory, quiet),
    )
    result = merged if vector_only else opened + merged
    save(result, out, quiet=quiet, dtype=dtype, exclude=exclude or [], engine=engine(workers, max_memory, quiet))


@vector_app.command()
def storage(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models, adapters or task vectors.")],
    base: BaseOption,
    density: Annotated[float, typer.Option(help="Share of the entries that each mask keeps; 1 for localised vectors.")] = 0.05,
    cluster: Clusters = None,
    rounding: Rounding = "half_up",
    dtype: Annotated[str, typer.Option(help="Of the values: float32, bfloat16 or float16.")] = "float32",
    folder: Annotated[Path | None, typer.Option(help="A new folder for the files of every way, whose real size is told.")] = None,
    exclude: Exclude = None,
    json: Json = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """What a bank of task vectors takes: dense, Localize-and-Stitch, and with --cluster Mask Sharing and Stitch Twice.

    thetau vector storage sst2 cr qnli --base base --cluster 0 --cluster 0 --cluster 1
    """
    import json as serialiser

    from rich.console import Console
    from rich.table import Table

    from thetau.compression import storage as count

    check_folder(json)
    _choices("none", rounding, dtype)
    _, vectors = operands(base, models)
    if folder is not None:
        check_folder(folder)
        folder.mkdir(exist_ok=True)
    result = count(
        vectors,
        density=density,
        clusters=cluster or None,
        rounding=cast("Any", rounding),
        dtype=cast("Any", dtype),
        exclude=exclude or [],
        engine=engine(workers, None, quiet),
        folder=folder,
    )
    if json is not None:
        json.write_text(serialiser.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    table = Table("", "models", "density", "models × density × size", "with masks", "files", box=None, pad_edge=False)
    for row in result.rows:
        files = _size(row.on_disk) if row.on_disk is not None else "–"
        table.add_row(row.name, str(row.masks), f"{100 * row.density:.2f} %", _size(row.values), _size(row.nbytes), files)
    Console(soft_wrap=True, highlight=False).print(table)


def _form(density: float | None, scope: str, rank: int | None, dtype: str | None) -> Form:
    """The form that the options say.

    Raises:
        RecipeError: they say none, or several.
    """
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


def _choices(sharing: str, rounding: str, dtype: str = "float32") -> None:
    from thetau.compression.forms import DTYPES
    from thetau.fields import OneOf

    try:
        OneOf(("none", "mask", "twice")).check("options", "sharing", sharing)
        OneOf(("half_up", "half_even")).check("options", "rounding", rounding)
        OneOf(DTYPES).check("options", "dtype", dtype)
    except ValueError as error:
        raise RecipeError([str(error)], "options") from error


def _show(result: Compressed, *, quiet: bool) -> None:
    from thetau.engine.save import Report

    summary(Report(result.path, result.tensors, result.nbytes, result.notes, result.warnings), quiet=quiet)
    if quiet:
        return
    share = result.nbytes / result.dense_bytes if result.dense_bytes else 1.0
    typer.echo(f"{result.form}: {_size(result.nbytes)} of {_size(result.dense_bytes)} in float32 ({100 * share:.1f} %)")
    typer.echo(
        f"relative error ‖τ − τ̂‖ / ‖τ‖ = {result.error:.4g}; worst {result.worst_error:.4g} in {result.worst or 'no tensor'}"
    )


def _size(count: int) -> str:
    from thetau.engine.executor import gigabytes

    return gigabytes(count)
