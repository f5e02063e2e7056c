"""`thetau basis`: few vectors that stand for many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thetau.cli.basis_arith import add, compare, negate, ood
from thetau.cli.basis_report import drift_table, report, table_of, told, write_state
from thetau.cli.common import Exclude, MaxMemory, Quiet, Workers, check_folder, engine, parse_fields
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.bases import Bank
    from thetau.facade import Expression

basis_app = typer.Typer(
    help="A bank of task vector bases: cluster a library of task vectors, keep few, and still add, negate and generalise from them.",
    no_args_is_help=True,
)

BankFolder = Annotated[Path, typer.Argument(help="The bank's folder.", metavar="BANK")]
Vectors = Annotated[
    list[str] | None,
    typer.Option("--vector", "-v", help="A fine-tuned model, adapter or saved task vector; NAME=PATH names its task. Repeat."),
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="Where the bank's base lies now, if it was moved.")]
Drift = Annotated[
    bool, typer.Option("--drift", help="Measure how far the bank is from one built offline; reads every original vector again.")
]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait while another process changes the bank.", min=0)]
AllowFar = Annotated[bool, typer.Option("--allow-far", help="Take vectors that are too long for fine-tuning of this base.")]


@basis_app.command()
def build(
    vectors: Annotated[
        list[str] | None, typer.Argument(help="Fine-tuned models, adapters or saved task vectors; NAME=PATH names the task.")
    ] = None,
    *,
    base: Annotated[str, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bank: a new folder.")],
    vector: Vectors = None,
    inner: Annotated[
        str, typer.Option("--inner", help="How a cluster is merged: a name from `thetau methods`, or mean.")
    ] = "mean",
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the inner method, as density=0.1; may be repeated.")
    ] = None,
    k: Annotated[str, typer.Option("-k", help="Clusters: a number, or auto for the largest gap of the spectrum.")] = "auto",
    k_min: Annotated[int, typer.Option("--k-min", help="auto: at least so many.")] = 1,
    k_max: Annotated[
        int | None, typer.Option("--k-max", help="auto: at most so many; by default one less than the tasks.")
    ] = None,
    partition: Annotated[
        str, typer.Option(help="spectral; random (k clusters, by the seed); one; or all, each task alone.")
    ] = "spectral",
    cluster: Annotated[
        list[str] | None, typer.Option("--cluster", help="A,B,…: a cluster by hand; repeat. Tasks in none stand alone.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--given", help="A,B=PATH: the basis of the cluster A,B is this model (joint training, say). Repeat."),
    ] = None,
    opposed: Annotated[str, typer.Option(help="Cosine below which a cluster is split in two; none never splits.")] = "-0.5",
    join: Annotated[float | None, typer.Option(help="Similarity from which a later vector joins a basis.")] = None,
    max_bases: Annotated[int | None, typer.Option("--max-bases", help="The bank's budget in bases.")] = None,
    max_bytes: Annotated[str | None, typer.Option("--max-bytes", help="The bank's budget in bytes, such as 10GB.")] = None,
    store: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, int8, sparse=0.05 or rank=16: how a basis is stored.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of clustering, random partitions and randomised methods.")] = 0,
    allow_far: AllowFar = False,
    exclude: Exclude = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write clusters, eigenvalues and gaps here too.")] = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Cluster task vectors, merge each cluster into a basis, and write the bank.

    thetau basis build --base base sst2 mr cr mnli qnli rte -o bank
    """
    from thetau.bases import Clustering, given_groups, random_partition
    from thetau.bases import build as make
    from thetau.bases.cluster import named_groups
    from thetau.facade import open_base

    check_folder(json)
    listed = [*(vectors or []), *(vector or [])]
    if not listed:
        raise RecipeError(["no task vector was given."], "options")
    opened = open_base(base)
    names, expressions = _operands(opened, listed)
    wanted = _k(k)
    clusters: Clustering | None = None
    if sum((partition != "spectral", bool(cluster))) > 1:
        raise RecipeError(["--partition and --cluster both say the clusters: give one of them."], "options")
    if wanted != "auto" and (cluster or partition in ("one", "all")):
        raise RecipeError(
            ["-k is for spectral and random clusters: --cluster, --partition one and all say them themselves."], "options"
        )
    if cluster:
        clusters = given_groups([part.split(",") for part in cluster], names)
    elif partition == "random":
        if wanted == "auto":
            raise RecipeError(["--partition random needs -k."], "options")
        clusters = random_partition(names, wanted, seed)
    elif partition in ("one", "all"):
        groups = named_groups([names] if partition == "one" else [[name] for name in names])
        clusters = Clustering(groups=groups, k=len(groups), chosen=partition)
    elif partition != "spectral":
        raise RecipeError([f"--partition must be spectral, random, one or all. Got {partition!r}."], "options")
    bank = make(
        out,
        expressions,
        opened,
        names=names,
        inner=_inner(inner, fields),
        k=wanted,
        k_min=k_min,
        k_max=k_max,
        clusters=clusters,
        given=_given(given or [], opened),
        opposed=_opposed(opposed),
        join=join,
        max_bases=max_bases,
        max_bytes=None if max_bytes is None else _size(max_bytes),
        store=store_of(store),
        exclude=exclude or [],
        seed=seed,
        allow_far=allow_far,
        engine=engine(workers, max_memory, quiet),
    )
    report(bank, quiet=quiet)
    if json is not None:
        write_state(bank, json)


@basis_app.command()
def show(
    bank: BankFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, and compare with what was written.")] = False,
    drift: Drift = False,
    base: Base = None,
    vector: Vectors = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write what is known of the bank here too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw clusters and eigenvalues here (PNG).")] = None,
) -> None:
    """Bases, members, similarities, budget and history of a bank.

    thetau basis show bank --verify
    """
    from rich.console import Console

    from thetau.bases import drift_of
    from thetau.errors import BankError

    opened = _open(bank, base)
    table_of(opened)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for operation in opened.state.log:
        console.print(told(operation.kind, operation))
    if drift:
        found, _ = drift_of(opened, _named(opened, vector))
        drift_table(found)
    if json is not None:
        write_state(opened, json)
    if plot is not None:
        from thetau.plots.bases import clusters_chart

        clusters_chart(opened, plot)
    if verify:
        problems = opened.verify()
        if problems:
            raise BankError("\n".join(problems))
        console.print(f"All {len(opened.bases)} files hold what was written.")


@basis_app.command()
def insert(
    bank: BankFolder,
    vector: Annotated[str, typer.Argument(help="A fine-tuned model, adapter or saved task vector; NAME=PATH names its task.")],
    to: Annotated[str | None, typer.Option("--to", help="The basis that it joins, or new for one of its own.")] = None,
    base: Base = None,
    allow_far: AllowFar = False,
    drift: Drift = False,
    wait: Wait = 600,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Add a task vector under the bank's budget: it joins a basis, opens one, or two others make room.

    thetau basis insert bank agnews
    """
    from thetau.bases import insert as put

    opened = _open(bank, base)
    names, vectors = _operands(opened.base(), [vector])
    options: dict[str, Any] = {"to": to, "allow_far": allow_far, "drift": drift, "wait": wait}
    report(put(opened, vectors[0], names[0], engine=engine(workers, max_memory, quiet), **options), quiet=quiet)


@basis_app.command()
def forget(
    bank: BankFolder,
    task: Annotated[str, typer.Argument(help="The task whose contribution is to go.")],
    vector: Vectors = None,
    drop_basis: Annotated[
        bool, typer.Option("--drop-basis", help="Where nothing else can be done, remove the whole basis, with its other tasks.")
    ] = False,
    base: Base = None,
    drift: Drift = False,
    wait: Wait = 600,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Take a task out of the bank, and say how exact that is.

    thetau basis forget bank agnews
    """
    from thetau.bases import forget as drop

    opened = _open(bank, base)
    options: dict[str, Any] = {"drop_basis": drop_basis, "drift": drift, "wait": wait}
    done = drop(opened, task, vectors=_named(opened, vector), engine=engine(workers, max_memory, quiet), **options)
    report(done, quiet=quiet)


@basis_app.command()
def rebuild(
    bank: BankFolder,
    k: Annotated[str, typer.Option("-k", help="Clusters: a number, or auto for the largest gap of the spectrum.")] = "auto",
    k_min: Annotated[int, typer.Option("--k-min", help="auto: at least so many.")] = 1,
    k_max: Annotated[int | None, typer.Option("--k-max", help="auto: at most so many.")] = None,
    vector: Vectors = None,
    base: Base = None,
    drift: Drift = False,
    wait: Wait = 600,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Cluster anew: from the tasks' vectors where they are still at hand, from the stored bases where not.

    thetau basis rebuild bank -k 3
    """
    from thetau.bases import rebuild as make

    opened = _open(bank, base)
    options: dict[str, Any] = {"k": _k(k), "k_min": k_min, "k_max": k_max, "drift": drift, "wait": wait}
    done = make(opened, vectors=_named(opened, vector), engine=engine(workers, max_memory, quiet), **options)
    report(done, quiet=quiet)


def store_of(text: str) -> dict[str, Any]:
    """How a basis is stored, from one word. Raises `RecipeError`."""
    if text == "float32":
        return {"form": "dense"}
    if text in ("bfloat16", "float16", "int8"):
        return {"form": "precision", "dtype": text}
    form, equals, number = text.partition("=")
    try:
        if equals and form == "sparse":
            return {"form": "sparse", "density": float(number)}
        if equals and form == "rank":
            return {"form": "low_rank", "rank": int(number)}
    except ValueError:
        pass
    raise RecipeError([f"must be float32, bfloat16, float16, int8, sparse=SHARE or rank=NUMBER. Got {text!r}."], "--store")


def _k(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise RecipeError([f"must be a number or auto. Got {text!r}."], "-k") from error


def _opposed(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError([f"must be a number in [−1, 0), or none. Got {text!r}."], "--opposed") from error


def _size(text: str) -> int:
    from thetau.recipes.schema import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise RecipeError([str(error)], "--max-bytes") from error


def _inner(name: str, fields: Sequence[str] | None) -> Any:
    from thetau.methods import build as build_method

    return build_method("average" if name == "mean" else name, parse_fields(fields or []))


def _open(bank: Path, base: str | None) -> Bank:
    from thetau.bases import open_bank
    from thetau.facade import open_base

    opened = open_bank(bank)
    return opened if base is None else opened.use_base(open_base(base))


def _operands(base: Expression, given: Sequence[str]) -> tuple[list[str], list[Expression]]:
    """Names and task vectors of models, adapters or saved vectors, as `path` or `name=path`."""
    from thetau.facade import as_vector
    from thetau.facade import open as open_weights
    from thetau.vectors.identity import identities

    vectors, own = [], []
    for text in given:
        name, equals, path = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        file = path if named else text
        label = Path(file).name.removesuffix(".safetensors") if Path(file).exists() else None
        vectors.append(as_vector(open_weights(file, base=base, name=label), base))
        own.append(name if named else None)
    found = identities(vectors)
    return [name or other for name, other in zip(own, found, strict=True)], vectors


def _named(bank: Bank, given: Sequence[str] | None) -> dict[str, Expression]:
    """Vectors that are given for tasks of the bank."""
    if not given:
        return {}
    names, vectors = _operands(bank.base(), given)
    if len(set(names)) != len(names):
        raise RecipeError([f"each task's vector can be given once. Got {', '.join(names)}."], "--vector")
    for name in names:
        bank.basis_of(name)
    return dict(zip(names, vectors, strict=True))


def _given(listed: Sequence[str], base: Expression) -> dict[tuple[str, ...], Expression]:
    from thetau.facade import as_vector
    from thetau.facade import open as open_weights

    found = {}
    for text in listed:
        members, equals, path = text.partition("=")
        if not equals or not members or not path:
            raise RecipeError([f"must be TASK,TASK=PATH. Got {text!r}."], "--given")
        found[tuple(sorted(members.split(",")))] = as_vector(open_weights(path, base=base), base)
    return found


for verb in (add, negate, ood, compare):
    basis_app.command()(verb)
