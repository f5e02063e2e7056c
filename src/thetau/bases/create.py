"""A bank from task vectors, offline: one pass for their inner products, one to write the bases (and what the inner method asks for).

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Algorithm 1. The folder appears whole, under its name, at the very end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thetau._version import __version__
from thetau.bases.bank import Bank, Basis, Member, Operation, Settings, State, lower
from thetau.bases.build import (
    Evidence,
    check_evidence,
    merge_groups,
    named_vectors,
    refuse_far,
    refuse_other_base,
    similarities,
    space_of,
)
from thetau.bases.change import write_manifest
from thetau.bases.cluster import OPPOSED, Clustering, Groups, Similarity, cluster, named_groups, refuse_zero
from thetau.bases.members import at_home, describe, recorded
from thetau.bases.store import DENSE, bytes_of, check_store, coefficient, dense_bytes, lossless, slack_of, write_basis
from thetau.checkpoint.disk import new_folder
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.engine.work import gigabytes
from thetau.errors import AlignmentError, RecipeError
from thetau.facade import Expression, gram
from thetau.facade import open as open_weights
from thetau.methods import Average, plain
from thetau.parts import Method


def build(
    path: str | os.PathLike[str],
    vectors: Sequence[Expression],
    base: Expression,
    *,
    names: Sequence[str] | None = None,
    inner: Method | None = None,
    k: int | Literal["auto"] = "auto",
    k_min: int | None = None,
    k_max: int | None = None,
    clusters: Clustering | None = None,
    given: Mapping[tuple[str, ...], Expression] | None = None,
    opposed: float | None = OPPOSED,
    join: float | None = None,
    max_bases: int | None = None,
    max_bytes: int | None = None,
    store: Mapping[str, Any] | None = None,
    evidence: Evidence | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    allow_far: bool = False,
    engine: Engine | None = None,
) -> Bank:
    """Make a bank of bases in the new folder `path`.

    Args:
        vectors: task vectors over `base`, at least two (one with `k=1`, to begin a bank that grows).
        names: what the tasks are called; by default the vectors' own names.
        inner: merge_in, any method; the mean by default.
        k, k_min, k_max, opposed: as in `cluster`.
        clusters: a whole partition, instead of clustering: `given_groups`, `random_partition`.
        given: members of a cluster → the vector that is its basis (joint training on their data, say), instead of `inner`.
        join, max_bases, max_bytes: for later insertions, and the budget of this build; see `Settings`.
        store: `{"form": "dense"}`, or `sparse`, `low_rank`, `precision` with the fields of that form (`thetau.compress`).
        evidence: what `inner` must know of the tasks' data, by kind and task: `{"fisher": {"sst2": "sst2.safetensors", …}}`; each cluster gets its
            members'. The bank records where the files lie, for `forget` and `rebuild`.
        allow_far: take vectors that are too long for fine-tuning of this base.

    Raises:
        AlignmentError: vectors are models, zero, of other bases or of two paradigms, or do not fit.
        RecipeError: an option is out of range, or the budget is too small.
        OutputError: the folder exists or cannot be written; nothing is left behind.
    """
    target = Path(path)
    began = time.perf_counter()
    listed = named_vectors(vectors, names)
    inner = inner or Average()
    check_evidence(evidence, inner, list(listed))
    form = check_store(store or DENSE)
    _check_budget(max_bases, max_bytes, join)
    source = base.terms[0][1]
    every = {**listed, **{"+".join(sorted(members)): vector for members, vector in (given or {}).items()}}
    refuse_other_base(every, source)
    space = space_of(every, source)
    with new_folder(target) as folder:
        similarity = similarities(listed, base, exclude=exclude, engine=engine)
        read = bytes_of([base, *listed.values()])
        refuse_zero(similarity)
        if not allow_far:
            refuse_far(similarity, base.label)
            _refuse_stray(given or {}, similarity, base, exclude, engine)
        size = dense_bytes(next(iter(listed.values())), exclude)
        top = _top(k_max, max_bases, max_bytes, size, form)
        found = clusters or _cluster(similarity, k, k_min, top, opposed, seed)
        groups = _checked(found, listed, top)
        vectors_of = merge_groups(
            listed,
            groups,
            inner,
            given=_by_basis(given or {}, groups),
            evidence=evidence,
            seed=seed,
            exclude=exclude,
            engine=engine,
        )
        bases: dict[str, Basis] = {}
        written = 0
        for name, vector in vectors_of.items():
            how: Literal["member", "merged", "given"] = (
                "given" if tuple(groups[name]) in _keys(given) else "member" if len(groups[name]) == 1 else "merged"
            )
            options: dict[str, Any] = {"store": form, "exclude": exclude, "engine": engine}
            basis, more = write_basis(folder, f"{name}-000001.safetensors", name, groups[name], vector, how, **options)
            bases[name] = basis
            read, written = read + more, written + basis.nbytes
        if max_bytes is not None and written > max_bytes:
            raise RecipeError(
                [
                    f"the bases take {gigabytes(written)}, more than `max_bytes`, {gigabytes(max_bytes)}. Give a smaller k, or store them smaller."
                ],
                "bank",
            )
        products, more = _products(folder, similarity, groups, inner, bases, form, exclude, engine)
        norms = products.diagonal().clamp(min=0).sqrt().tolist()
        slack = {
            name: _slack(similarity, groups[name], inner, basis, norm)
            for (name, basis), norm in zip(bases.items(), norms, strict=True)
        }
        bases = {
            name: replace(basis, norm=norm, slack=slack[name]) for (name, basis), norm in zip(bases.items(), norms, strict=True)
        }
        label = found.label()
        members: dict[str, Member] = {
            name: describe(name, label[name], vector, similarity.norms[name]) for name, vector in listed.items()
        }
        operation = Operation(
            kind="build",
            names=tuple(listed),
            read=read + more,
            written=written,
            seconds=round(time.perf_counter() - began, 3),
            said=(f"{len(listed)} tasks in {len(groups)} bases; k chosen by: {found.chosen}.", *found.notes),
        )
        state = State(
            base=at_home(source.label),
            base_fingerprint=source.fingerprint(),
            base_norm=similarity.base_norm or 0.0,
            space=space,
            settings=Settings(
                inner=plain(inner),
                evidence=recorded(evidence),
                opposed=opposed,
                join=join,
                max_bases=max_bases,
                max_bytes=max_bytes,
                store=form,
                exclude=tuple(exclude),
                seed=seed,
            ),
            members=members,
            bases=bases,
            gram=lower(similarity.gram),
            basis_gram=tuple(map(tuple, products.tolist())),
            spectrum=found.spectrum,
            log=(operation,),
            thetau=__version__,
        )
        write_manifest(folder, state)
    return Bank(target, state).use_base(base)


def _check_budget(max_bases: int | None, max_bytes: int | None, join: float | None) -> None:
    problems = [
        f"`{name}` must be at least 1. Got {value}."
        for name, value in (("max_bases", max_bases), ("max_bytes", max_bytes))
        if value is not None and value < 1
    ]
    if join is not None and not 0 <= join <= 1:
        problems.append(f"`join` must be in [0, 1]. Got {join:g}.")
    if problems:
        raise RecipeError(problems, "bank")


def _top(k_max: int | None, max_bases: int | None, max_bytes: int | None, size: int, form: Mapping[str, Any]) -> int | None:
    """The largest number of bases that bounds and budget allow; a byte budget bounds it before the work only for dense bases."""
    fits = None if max_bytes is None or not lossless(form) else max_bytes // max(1, size)
    if fits == 0:
        raise RecipeError(
            [f"`max_bytes` must hold at least one basis, {gigabytes(size)} in float32. Got {gigabytes(max_bytes or 0)}."], "bank"
        )
    return min((limit for limit in (k_max, max_bases, fits) if limit is not None), default=None)


def _cluster(
    similarity: Similarity, k: int | Literal["auto"], k_min: int | None, top: int | None, opposed: float | None, seed: int
) -> Clustering:
    names = similarity.names
    if len(names) == 1 and k == 1:
        return Clustering(groups=named_groups([names]), k=1, chosen="given", notes=("A bank of one task.",))
    if len(names) == 1:
        raise RecipeError(
            ["clustering needs at least two task vectors. Got 1. To begin a bank that grows by insertion, give k = 1."], "bank"
        )
    if k != "auto" and top is not None and k > top:
        raise RecipeError([f"`k` must be at most {top}, which `k_max` or the budget allows. Got {k}."], "bank")
    bound = None if top is None or (top >= len(names) and k == "auto") else min(top, len(names))
    return cluster(similarity, k, k_min=k_min, k_max=bound, opposed=opposed, seed=seed)


def _checked(found: Clustering, vectors: Mapping[str, Expression], top: int | None) -> Groups:
    listed = sorted(name for members in found.groups.values() for name in members)
    if listed != sorted(vectors):
        raise RecipeError(
            [f"the clusters must be of the tasks {', '.join(sorted(vectors))}, each once. Got {', '.join(listed)}."], "bank"
        )
    if top is not None and len(found.groups) > top:
        raise RecipeError(
            [
                f"there would be {len(found.groups)} bases, and `k_max` or the budget allows {top}. Give a smaller k, or do not split "
                "opposed vectors (`--opposed none`)."
            ],
            "bank",
        )
    return found.groups


def _keys(given: Mapping[tuple[str, ...], Expression] | None) -> set[tuple[str, ...]]:
    return {tuple(sorted(members)) for members in given or {}}


def _by_basis(given: Mapping[tuple[str, ...], Expression], groups: Groups) -> dict[str, Expression]:
    """The given bases under their clusters' names."""
    names = {tuple(members): name for name, members in groups.items()}
    lost = [members for members in _keys(given) if members not in names]
    if lost:
        there = "; ".join(", ".join(members) for members in groups.values())
        raise RecipeError([f"a basis is given for {', '.join(lost[0])}, which is no cluster. Clusters: {there}."], "bank")
    return {names[tuple(sorted(members))]: vector for members, vector in given.items()}


def _refuse_stray(
    given: Mapping[tuple[str, ...], Expression],
    similarity: Similarity,
    base: Expression,
    exclude: Sequence[str],
    engine: Engine | None,
) -> None:
    for members, vector in given.items():
        length, whole = vector.norm(exclude=exclude, engine=engine), similarity.base_norm or 0.0
        if not 0 < length <= FAR * whole:
            raise AlignmentError(
                f"the vector given for {', '.join(members)} has the length {length:.4g}, and ‖θ₀‖ is {whole:.4g}: it is zero, or of another base. "
                f"Give a model that was trained from {base.label}."
            )


def _slack(similarity: Similarity, members: Sequence[str], inner: Method, basis: Basis, norm: float) -> float | None:
    """How far the basis can be from the exact merge of its members."""
    if basis.how == "given":
        return None
    factor = coefficient(inner, len(members))
    parts = [] if factor is None else [(factor, similarity.norms[name], 0.0) for name in members]
    return slack_of(parts, basis.error, norm)


def _products(
    folder: Path,
    similarity: Similarity,
    groups: Groups,
    inner: Method,
    bases: Mapping[str, Basis],
    form: Mapping[str, Any],
    exclude: Sequence[str],
    engine: Engine | None,
) -> tuple[Tensor, int]:
    """Inner products of the bases: from those of the tasks where a basis is linear in them, else from the files."""
    factors = [None if bases[name].how == "given" else coefficient(inner, len(members)) for name, members in groups.items()]
    if lossless(form) and all(factor is not None for factor in factors):
        weights = torch.zeros(len(groups), len(similarity.names), dtype=torch.float64)
        for row, (members, factor) in enumerate(zip(groups.values(), factors, strict=True)):
            weights[row, [similarity.names.index(name) for name in members]] = float(factor or 0)
        return weights @ similarity.gram @ weights.T, 0
    stored = [open_weights(folder / basis.file, name=name) for name, basis in bases.items()]
    return gram(stored, exclude=exclude, engine=engine), bytes_of(stored)
