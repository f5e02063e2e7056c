"""Several adapters merged into one again, by any method of task vectors, in one of three spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.adapters.adding import all_paths, remade, saved, shared_config, summed_bias, together
from thetau.adapters.factors import Cut, Factors
from thetau.adapters.reading import Adapter, Module
from thetau.adapters.spaces import CorePlace, KnotsPlace, Place, Products, Space, name_of, turned
from thetau.adapters.streaming import tensors_of
from thetau.adapters.writing import Fit, Made
from thetau.checkpoint.memory import MemorySource
from thetau.checkpoint.naming import view_of
from thetau.checkpoint.source import Source
from thetau.engine.executor import Engine
from thetau.errors import RecipeError
from thetau.facade import Expression
from thetau.facade import merge as merge_vectors
from thetau.parts import Method

if TYPE_CHECKING:
    from torch import Tensor


def merge(
    adapters: Sequence[Adapter],
    method: Method,
    *,
    space: Space = "product",
    cut: Cut | None = None,
    base: Source | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    engine: Engine | None = None,
) -> Made:
    """One adapter of several, by a method on their products, their cores or their shared directions.

    Args:
        adapters: opened ones, of one base.
        method: any that merges task vectors and needs no base and no data.
        space: `product` makes one whole tensor at a time; `core` and `knots` make none of the base's size.
        cut: to which rank or error; by default all there is in core space and KnOTS, and the sum of the ranks of the products.
        base: the model, which only tensors that are saved whole need; of these and of biases the mean is taken.
        names: the tasks' identities; by default the adapters' labels.
        seed: of randomised methods.
        engine: workers and memory.

    Raises:
        RecipeError: the method looks at the base or at data, or a field does not fit.
        AlignmentError: adapters of other bases.
    """
    chain = method.chain()
    if chain.models or chain.needs_base or chain.needs:
        raise RecipeError(
            [
                "adapters can be merged only by methods of task vectors that look at neither the base nor data. Write the models instead."
            ],
            "method",
        )
    labels = list(names) if names is not None else [f"{number:04d} {adapter.label}" for number, adapter in enumerate(adapters)]
    if not adapters or len(labels) != len(adapters):
        raise RecipeError([f"`names` must be one for each of {len(adapters)} adapters. Got {len(labels)}."], "merge")
    mean = [1 / len(adapters)] * len(adapters)
    likes: dict[str, Module] = {}
    places: dict[str, Place] = {}
    vectors: list[dict[str, Tensor]] = [{} for _ in adapters]
    ranks: dict[str, int] = {}
    biases: dict[str, Tensor | None] = {}
    for path in all_paths(adapters):
        parts, weights = together(adapters, path, mean)
        likes[path], ranks[path], biases[path] = parts[0], sum(part.factors.rank for part in parts), summed_bias(parts, weights)
        if space == "product":
            continue
        place = (CorePlace if space == "core" else KnotsPlace).of([part.factors for part in parts])
        places[path] = place
        holders = [vector for vector, adapter in zip(vectors, adapters, strict=True) if path in adapter.paths]
        for part, vector in zip(parts, holders, strict=True):
            cores = place.project(part.factors)
            for copy, core in enumerate(cores):
                name = name_of(path, copy, len(cores))
                vector[name] = (core.T if _core_turned(name, core) else core).float().contiguous()
    if space == "product":
        sources: list[Source] = [Products(adapter) for adapter in adapters]
    else:
        sources = [MemorySource(vector, label=adapter.label, degree=0) for vector, adapter in zip(vectors, adapters, strict=True)]
    expressions = [Expression(((1.0, source),), name=label) for source, label in zip(sources, labels, strict=True)]
    merged = merge_vectors(expressions, method, names=labels, seed=seed, engine=engine)
    owners = {
        name_of(path, copy, len(like.factors.b)): (path, copy)
        for path, like in likes.items()
        for copy in range(len(like.factors.b))
    }
    pending: dict[str, dict[int, Tensor]] = {}
    modules: dict[str, Module] = {}
    fits: list[Fit] = []
    for name, tensor in tensors_of(merged, engine=engine):
        path, copy = owners[name]
        like, copies = likes[path], pending.setdefault(path, {})
        copies[copy] = tensor.T if _stored_turned(like, name, tensor, space) else tensor.flatten(1)
        if len(copies) < len(like.factors.b):
            continue
        layer = torch.stack([value for _, value in sorted(pending.pop(path).items())])
        factors, norm, lost = (
            places[path].lift(layer, cut or Cut()) if places else _cut_dense(layer, cut or Cut(rank=ranks[path]))
        )
        modules[path] = remade(like, factors, biases[path])
        fits.append(Fit(layer=path, rank=factors.rank, norm=norm, lost=lost))
    return Made(modules=modules, fits=fits, config=shared_config(adapters), saved=saved(adapters, mean, base))


def _stored_turned(like: Module, name: str, tensor: Tensor, space: Space) -> bool:
    """Whether a merged tensor lies `[d_in, d_out]`."""
    if space == "product":
        return turned(like, name, tuple(tensor.shape))
    return view_of(name, tuple(tensor.shape)).transposed


def _cut_dense(layer: Tensor, cut: Cut) -> tuple[Factors, float, float]:
    """The best product for a whole layer, ‖the layer‖ and ‖what is lost‖."""
    u, s, vt = torch.linalg.svd(layer, full_matrices=False)
    rank = cut.ranks(s)
    return Factors.of(u[:, :, :rank], s[:, :rank], vt[:, :rank]), float(layer.norm()), float(s[:, rank:].norm())


def _core_turned(name: str, core: Tensor) -> bool:
    """Whether a method takes a tensor of this name for a transposed one, so that it must lie so."""
    return view_of(name, (core.shape[1], core.shape[0])).transposed
