"""`thetau doctor`: look at a base and its models from the weights alone, and say what to do with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Literal

from thetau._lazy import torch
from thetau.checkpoint import Source
from thetau.checkpoint.companions import compared as compare_configs
from thetau.checkpoint.config import config_for
from thetau.checkpoint.ties import Ties
from thetau.diagnostics.advice import advise, left_out
from thetau.diagnostics.doctor import Doctor, Group, Harm, Likeness, Pair, Spectrum, Subject
from thetau.diagnostics.findings import findings
from thetau.diagnostics.inspection import Model, inspect
from thetau.diagnostics.vectors import Measured, Products, TensorFigures, entries_for, measure, sums_for
from thetau.engine.executor import Engine
from thetau.errors import CheckpointError
from thetau.facade import Expression, as_vector, grams
from thetau.methods import build
from thetau.parts import Method
from thetau.recipes.beside import beside
from thetau.statistics.gram import cosines
from thetau.vectors.identity import identities

if TYPE_CHECKING:
    from torch import Tensor

TRIED: Mapping[str, tuple[str, Mapping[str, object]]] = {  # method as the result calls it → its name and fields
    "wudi": ("wudi", {"solver": "gradient_flow"}),
    "bilateral": ("bilateral", {}),
}
NEAR = 0.3  # |⟨a, b⟩/‖a‖² − 1| up to which a tensor of b holds that of a
VOCABULARY = ("another vocabulary", "its tokenizer differs")  # words of a problem, and of a warning


def examine(
    base: Expression,
    models: Sequence[Expression],
    *,
    candidates: Sequence[Expression] = (),
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
) -> Doctor:
    """Two streaming passes over a base and its models: lengths and distances of all, then the vectors of those that fit.

    Raises:
        CheckpointError: the base itself holds NaN or infinite values; a model that does is described with that problem.

    Examples:
        >>> import thetau
        >>> found = examine(thetau.open("base"), [thetau.open("a"), thetau.open("b")])
        >>> found.compared, [one.kind for one in found.findings]
        (('a', 'b'), [])
    """
    engine = engine or Engine()
    seen = inspect(base, models, candidates=candidates, exclude=exclude, engine=engine)
    names = identities(models)
    opened = dict(zip(names, models, strict=True))
    subjects = tuple(subject(opened[one.name], one, base) for one in seen.models)
    home = subject(base, seen.base, base)
    vectors = {name: as_vector(opened[name], base) for name in seen.compared}
    compared = tuple(vectors)
    likenesses = likenesses_of(grams(list(vectors.values()), exclude=exclude, engine=engine), compared) if vectors else ()
    vocabulary = {
        one.name: said for one in subjects for said in (*one.problems, *one.beside) if any(word in said for word in VOCABULARY)
    }
    found = findings(home, subjects, likenesses, seen.candidates, vocabulary)
    first = left_out(found)
    gone = {name for one in first if one.topic == "leave out" for name in one.models}
    staying = tuple(name for name in compared if name not in gone)
    tried: dict[str, Method] = {word: build(name, dict(fields)) for word, (name, fields) in TRIED.items()}
    measured = measure(vectors, tried=tried, among=staying, exclude=exclude, engine=engine) if vectors else Measured()
    pairs = pairs_of(measured.tensors, likenesses, compared)
    some = [one for one in measured.tensors if one.products is not None] if len(staying) > 1 else []
    scale = best_scale([one.products for one in some if one.products is not None], [compared.index(name) for name in staying])
    harms = harms_of(some, [compared.index(name) for name in staying], scale) if some else ()
    return Doctor(
        base=home,
        models=subjects,
        compared=compared,
        staying=staying,
        groups=groups_of(measured.tensors),
        spectra=spectra_of(measured.tensors, compared),
        pairs=pairs,
        harms=harms,
        best_scale=scale,
        candidates=seen.candidates,
        findings=found,
        advice=advise(home, subjects, vectors, pairs, harms, scale, first, staying, engine=engine, exclude=exclude),
        notes=tuple(_notes(measured, len(compared))),
    )


def subject(one: Expression, seen: Model, base: Expression) -> Subject:
    """What the files say of a model."""
    root = next((source for source in one.sources() if source.degree == 1), one.sources()[0])
    added = one.terms[-1][1]
    problems, beside_it, config = list(seen.problems), [], {}
    try:
        config = config_for(root)
        beside_it = _beside(base, root, seen.name)
    except CheckpointError as error:
        problems.append(str(error))
    told = {
        added.label: seen.name,
        root.label: seen.name,
        base.terms[0][1].label: base.name or base.label,
    }  # as they are called here

    def called(line: str) -> str:
        for path in sorted(told, key=len, reverse=True):
            line = line.replace(path, told[path])
        return line

    return Subject(
        name=seen.name,
        path=added.label,
        form=_form(one, added),
        architecture=_architecture(config),
        dtypes=seen.dtypes,
        quantised=root.quantised,
        tensors=seen.tensors,
        parameters=seen.parameters,
        norm=seen.norm,
        shift=seen.shift,
        tied=tuple(f"{name} = {keeper}" for name, keeper in sorted(Ties(root).copies().items())),
        beside=tuple(map(called, beside_it)),
        notes=tuple(map(called, seen.notes)),
        problems=tuple(map(called, problems)),
    )


def _form(one: Expression, added: Source) -> Literal["model", "adapter", "vector"]:
    if one.is_vector and added.over is None:
        return "vector"
    return "model" if added.degree == 1 else "adapter"


def _architecture(config: Mapping[str, object]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(config.get("model_type", ""))


def _beside(base: Expression, model: Source, name: str) -> list[str]:
    home = base.terms[0][1]
    refused, told = compare_configs(home, model)
    return [*([] if refused is None else [refused]), *told, *beside(home, {name: model})]


# Figures over tensors.


def _total(tensors: Sequence[TensorFigures]) -> Tensor:
    return torch.stack([one.gram for one in tensors]).sum(0)


def groups_of(tensors: Sequence[TensorFigures]) -> tuple[Group, ...]:
    """The whole, each block and each kind."""
    if not tensors:
        return ()
    found = [_group("whole", "", tensors)]
    for by, key in (("layer", _layer), ("kind", lambda one: str(one.kind))):
        members: dict[str, list[TensorFigures]] = {}
        for one in tensors:
            members.setdefault(key(one), []).append(one)
        found += [_group(by, name, some) for name, some in members.items()]
    return tuple(found)


def _layer(one: TensorFigures) -> str:
    return "outside" if one.layer is None else str(one.layer)


def _group(by: str, name: str, members: Sequence[TensorFigures]) -> Group:
    gram = _total(members)
    return Group(
        by="whole" if by == "whole" else "layer" if by == "layer" else "kind",
        name=name,
        tensors=len(members),
        parameters=sum(one.elements for one in members),
        base=math.sqrt(math.fsum(one.base for one in members)),
        norms=tuple(gram.diagonal().clamp(min=0).sqrt().tolist()),
        cosine=tuple(map(tuple, cosines(gram).tolist())),
    )


def spectra_of(tensors: Sequence[TensorFigures], names: Sequence[str]) -> tuple[Spectrum, ...]:
    """A row for each matrix of each model."""
    return tuple(
        Spectrum(
            model=name,
            tensor=one.name,
            kind=str(one.kind),
            layer=one.layer,
            full=found.full,
            stable_rank=found.stable_rank,
            effective_rank=found.effective_rank,
            exact=found.exact,
            shares=found.shares,
        )
        for one in tensors
        for name, found in zip(names, one.directions, strict=False)
    )


def likenesses_of(totals: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Likeness, ...]:
    """Every pair, the first given first, from inner products by tensor."""
    if len(names) < 2:
        return ()
    grams = torch.stack([totals[name] for name in sorted(totals)])
    gram = grams.sum(0)
    cosine = cosines(gram)
    squares = grams.diagonal(dim1=1, dim2=2)
    holds = (grams / squares[:, :, None] - 1).abs() <= NEAR  # [tensor, a, b]: ⟨a, b⟩/‖a‖²
    # Chance moves the share of a tensor of few entries; what is shorter than a thousandth of the vector says nothing.
    counts = squares > 1e-6 * gram.diagonal()
    return tuple(
        Likeness(
            a=a,
            b=b,
            cosine=float(cosine[i, j]),
            projection=_ratio(float(gram[i, j]), float(gram[i, i])),
            back=_ratio(float(gram[i, j]), float(gram[j, j])),
            steady=_share(holds[:, i, j], counts[:, i]),
            steady_back=_share(holds[:, j, i], counts[:, j]),
            distance=math.sqrt(max(0.0, float(gram[i, i] + gram[j, j] - 2 * gram[i, j]))),
        )
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    )


def pairs_of(tensors: Sequence[TensorFigures], likenesses: Sequence[Likeness], names: Sequence[str]) -> tuple[Pair, ...]:
    """Every pair, with what its entries, directions and products say."""
    if not likenesses:
        return ()
    least, against = (
        torch.stack(values).sum(0) for values in zip(*((one.overlap.least, one.overlap.against) for one in tensors), strict=True)
    )
    size = torch.stack([one.overlap.size for one in tensors]).sum(0)
    shares = [one.shares for one in tensors if one.shares is not None]
    products = [one.products for one in tensors if one.products is not None]
    acts = torch.stack([one.cross for one in products]).sum(0) if products else None

    def mean(values: Sequence[float]) -> float | None:
        return math.fsum(values) / len(values) if values else None

    def on(j: int, i: int) -> float | None:
        """What j does to the rows of i, relative to what i does."""
        return None if acts is None or not acts[i, i] > 0 else math.sqrt(float(acts[j, i] / acts[i, i]))

    found = []
    for like in likenesses:
        i, j = names.index(like.a), names.index(like.b)
        found.append(
            Pair(
                **asdict(like),
                overlap=_ratio(float(least[i, j]), float(size[i] + size[j] - least[i, j])),
                conflict=_ratio(float(against[i, j]), float(least[i, j])),
                inputs=mean([float(one.inputs[i, j]) for one in shares]),
                outputs=mean([float(one.outputs[i, j]) for one in shares]),
                inputs_by_chance=mean([one.inputs_by_chance for one in shares]),
                outputs_by_chance=mean([one.outputs_by_chance for one in shares]),
                a_on_b=on(i, j),
                b_on_a=on(j, i),
            )
        )
    return tuple(found)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


def _share(holds: Tensor, lived: Tensor) -> float:
    return _ratio(float((holds & lived).sum()), float(lived.sum()))


# What merges would do.


def best_scale(products: Sequence[Products], among: Sequence[int]) -> float | None:
    """λ of λ Σ τ that makes Eq. 21 least over all matrices, of the tasks `among`; None where there is none, or all are zero."""
    along, sums = (math.fsum(_weighed(pick(one), one.square, among) for one in products) for pick in (_along, _sums))
    return along / sums if sums > 0 else None


def _along(one: Products) -> Tensor:
    return one.along


def _sums(one: Products) -> Tensor:
    return one.sums


def _weighed(values: Tensor, square: Tensor, among: Sequence[int]) -> float:
    """Σ values/‖τ_i‖², zero vectors aside."""
    return math.fsum(float(values[i]) / float(square[i]) for i in among if square[i] > 0)


def harms_of(tensors: Sequence[TensorFigures], among: Sequence[int], scale: float | None) -> tuple[Harm, ...]:
    """Of averaging, of sums at λ = 1 and at the best λ, and of the methods that were tried: what they do to the tasks `among`."""
    layers: dict[str, list[Products]] = {}
    for one in tensors:
        if one.products is not None:
            layers.setdefault(_layer(one), []).append(one.products)
    every = [one for members in layers.values() for one in members]
    rows: list[tuple[str, float | None, Callable[[Products], Tensor]]] = [
        ("average", None, partial(Products.scaled, scale=1 / len(among))),
        ("task_arithmetic", 1.0, partial(Products.scaled, scale=1.0)),
    ]
    if scale is not None:
        rows.append(("task_arithmetic", scale, partial(Products.scaled, scale=scale)))
    rows += [(word, None, partial(_left, word=word)) for word in every[0].left]
    return tuple(
        Harm(
            method=method,
            scale=number,
            whole=_relative(every, left, among),
            layers={layer: _relative(members, left, among) for layer, members in layers.items()},
        )
        for method, number, left in rows
    )


def _left(one: Products, word: str) -> Tensor:
    return one.left[word]


def _relative(members: Sequence[Products], left: Callable[[Products], Tensor], among: Sequence[int]) -> tuple[float, ...]:
    above, below = (torch.stack(values).sum(0) for values in ([left(one) for one in members], [one.own for one in members]))
    return tuple(math.sqrt(max(0.0, float(above[i])) / float(below[i])) if below[i] > 0 else 0.0 for i in among)


def _notes(measured: Measured, tasks: int) -> list[str]:
    said = []
    if measured.sampled:
        said.append(
            f"overlap and sign conflict of {measured.sampled} tensors are told from evenly spaced places, about {entries_for(tasks):,} entries of each."
        )
    counts = [
        count for one in measured.tensors if one.products is not None and (count := sums_for(one.shape[0], tasks)) is not None
    ]
    if counts:
        sums = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        said.append(f"Eq. 21 of {len(counts)} matrices is estimated from {sums} random signed sums of their rows.")
    sketched = sum(not one.exact for figures in measured.tensors for one in figures.directions)
    if sketched:
        said.append(f"{sketched} effective ranks are upper bounds, from the leading directions of a sketch.")
    short = [one.name for one in measured.tensors if one.short]
    if short:
        said.append(
            f"{len(short)} matrices are too large for the memory budget: only lengths, cosines and entries of them are told; first {short[0]!r}."
        )
    said += [
        f"{name} was not tried: it takes {count:.2g} operations here. `thetau merge --dry-run` says what a merge takes."
        for name, count in measured.dropped.items()
    ]
    return said
