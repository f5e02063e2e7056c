"""From a suite's choice of a method to merged weights at any λ, with one merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.memory import MemorySource
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, RecipeError
from thetau.facade import Expression, merge
from thetau.facade import open as open_weights
from thetau.methods import build
from thetau.tasks.suite import MethodChoice


def build_method(choice: MethodChoice, where: str | None = None) -> Any:
    """The method of a choice, with `scale=1` wherever it has one; as its fields say where no λ is chosen: where each task has a model of its
    own, or MLPs are mixed by input.

    Raises `RecipeError` naming the row, or `where`.
    """
    try:
        made = build(choice.method, choice.fields)
        return made if choice.each or choice.wemoe is not None else _at_one(made)
    except RecipeError as error:
        raise RecipeError(error.problems, where=where or f"method {choice.name!r} of the suite") from error


def _at_one(method: Any) -> Any:
    """The same method with λ = 1, in the methods that it takes as fields too."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    inner = {name: _at_one(value) for name, value in values.items() if hasattr(value, "chain")}
    return replace(method, **inner, **({"scale": 1.0} if "scale" in values else {}))


def inner_method(name: str, fields: Mapping[str, Any] | None = None) -> Any:
    """merge_in by its name, with the fields given; `mean` is `average`, and `sum` task arithmetic at λ = 1. Raises `RecipeError`."""
    values = dict(fields or {})
    return build("task_arithmetic", {"scale": 1.0, **values}) if name == "sum" else build(_known(name), values)


def outer_method(name: str, fields: Mapping[str, Any] | None = None) -> Any | None:
    """merge_out by its name, at λ = 1, since λ is what is chosen; None is the sum. Raises `RecipeError`."""
    if name == "sum":
        if fields:
            raise RecipeError(["a sum has no fields."], "--set")
        return None
    return build_method(MethodChoice(name=name, method=_known(name), fields=dict(fields or {})), "--outer")


def _known(name: str) -> str:
    return "average" if name == "mean" else name


def merged_vector(base: Path, models: Sequence[Path], names: Sequence[str], method: Any) -> dict[str, Tensor]:
    """The merged task vector of fine-tuned checkpoints, or adapters over `base`, at λ = 1."""
    start = open_weights(base)
    vectors = {name: open_weights(model, base=start) - start for name, model in zip(names, models, strict=True)}
    return merge_out(vectors, method).state_dict()


def held(vector: Mapping[str, Tensor], base: Expression, name: str) -> Expression:
    """A task vector that lies in memory by the base's names, as what is merged: no merge of it reads a file of its model again."""
    (_, source), *_ = base.terms
    return Expression(((1.0, MemorySource(vector, label=name, degree=0)),), reference=source, name=name)


def merge_out(vectors: Mapping[str, Expression], method: Any | None, *, engine: Engine | None = None) -> Expression:
    """The merge of named vectors, lazily; their sum without a method. Raises `AlignmentError` where there is none to merge."""
    listed = list(vectors.values())
    if not listed:
        raise AlignmentError("A merge needs at least one task vector. Got none.")
    if method is None:
        return sum(listed[1:], start=listed[0])
    return merge(listed, method, names=list(vectors), engine=engine)


def at_scale(base: Mapping[str, Tensor], vector: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """θ₀ + λ·τ by the base's names and dtypes, computed in float32; tensors that τ does not have or that are not floats stay
    the base's.
    """
    with torch.inference_mode():
        return {
            name: (tensor.float() + scale * vector[name].float()).to(tensor.dtype)
            if name in vector and tensor.is_floating_point()
            else tensor
            for name, tensor in base.items()
        }
