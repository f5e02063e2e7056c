"""`thetau basis build`: cluster task vectors, a basis for each cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from thetau.cli.basis.common import AllowFar, Clusters, Evidence, Given
from thetau.cli.basis.report import report, write_state
from thetau.cli.common import BaseOption, Json, LeftOut, Machine
from thetau.cli.options import with_options
from thetau.errors import RecipeError
from thetau.options import Option

if TYPE_CHECKING:
    from thetau.bases import Clustering
    from thetau.facade import Expression


@final
@dataclass(frozen=True, kw_only=True)
class Build:
    """How a bank is built, and what it keeps to."""

    inner: Annotated[str, Option("How a cluster is merged: a name from `thetau methods`, or mean.", flags=("--inner",))] = "mean"
    fields: Annotated[
        Mapping[str, Any], Option("A field of the inner method, as density=0.1; may be repeated.", flags=("--set",))
    ] = field(default_factory=dict)
    clusters: Clusters = field(default_factory=Clusters)
    partition: Annotated[str, Option("spectral; random (k clusters, by the seed); one; or all, each task alone.")] = "spectral"
    cluster: Annotated[
        tuple[str, ...], Option("A,B,…: a cluster by hand; repeat. Tasks in none stand alone.", flags=("--cluster",))
    ] = ()
    given: Annotated[
        tuple[str, ...],
        Option("A,B=PATH: the basis of the cluster A,B is this model (joint training, say). Repeat.", flags=("--given",)),
    ] = ()
    opposed: Annotated[str, Option("Cosine below which a cluster is split in two; none never splits.")] = "-0.5"
    join: Annotated[float | None, Option("Similarity from which a later vector joins a basis.")] = None
    max_bases: Annotated[int | None, Option("The bank's budget in bases.", flags=("--max-bases",))] = None
    max_bytes: Annotated[str | None, Option("The bank's budget in bytes, such as 10GB.", flags=("--max-bytes",))] = None
    store: Annotated[str, Option("float32, bfloat16, float16, int8, sparse=0.05 or rank=16: how a basis is stored.")] = "float32"
    seed: Annotated[int, Option("Of clustering, random partitions and randomised methods.")] = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def clustering(self, names: Sequence[str]) -> Clustering | None:
        """The clusters that the options say by themselves; None where the spectrum does. Raises `RecipeError`."""
        from thetau.bases import Clustering, given_groups, random_partition
        from thetau.bases.cluster import named_groups

        if self.partition not in ("spectral", "random", "one", "all"):
            raise RecipeError([f"--partition must be spectral, random, one or all. Got {self.partition!r}."], "options")
        if self.partition != "spectral" and self.cluster:
            raise RecipeError(["--partition and --cluster both say the clusters: give one of them."], "options")
        k = self.clusters.k
        if k != "auto" and (self.cluster or self.partition in ("one", "all")):
            raise RecipeError(
                ["-k is for spectral and random clusters: --cluster, --partition one and all say them themselves."], "options"
            )
        if self.cluster:
            return given_groups([part.split(",") for part in self.cluster], names)
        if self.partition == "random":
            if k == "auto":
                raise RecipeError(["--partition random needs -k."], "options")
            return random_partition(names, k, self.seed)
        if self.partition == "spectral":
            return None
        groups = named_groups([names] if self.partition == "one" else [[name] for name in names])
        return Clustering(groups=groups, k=len(groups), chosen=self.partition)


@with_options
def build(
    vectors: Annotated[
        list[str] | None, typer.Argument(help="Fine-tuned models, adapters or saved task vectors; NAME=PATH names the task.")
    ] = None,
    *,
    base: BaseOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The bank: a new folder.")],
    more: Given,
    options: Build,
    evidence: Evidence,
    allow_far: AllowFar = False,
    json: Json,
    machine: Machine,
) -> None:
    """Cluster task vectors, merge each cluster into a basis, and write the bank.

    thetau basis build --base base sst2 mr cr mnli qnli rte -o bank
    thetau basis build --base base sst2 mr --inner fisher --evidence fisher:sst2=sst2.safetensors --evidence fisher:mr=mr.safetensors -o bank
    """
    from thetau.bases import build as make
    from thetau.evaluate.merging import inner_method
    from thetau.evaluate.tuned import task_vectors
    from thetau.facade import open_base

    json.check()
    listed = [*(vectors or []), *more.vector]
    if not listed:
        raise RecipeError(["no task vector was given."], "options")
    opened = open_base(base)
    names, expressions = task_vectors(listed, opened)
    bank = make(
        out,
        expressions,
        opened,
        names=names,
        inner=inner_method(options.inner, options.fields),
        k=options.clusters.k,
        k_min=options.clusters.k_min,
        k_max=options.clusters.k_max,
        clusters=options.clustering(names),
        given=_given(options.given, opened),
        opposed=_opposed(options.opposed),
        join=options.join,
        max_bases=options.max_bases,
        max_bytes=None if options.max_bytes is None else _size(options.max_bytes),
        store=store_of(options.store),
        evidence=evidence.by_kind(),
        exclude=options.left_out.exclude,
        seed=options.seed,
        allow_far=allow_far,
        engine=machine.engine(),
    )
    report(bank, quiet=machine.quiet)
    if json.json is not None:
        write_state(bank, json.json)


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
