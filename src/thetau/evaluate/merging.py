"""From a suite's choice of a method to merged weights at any λ, with one merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thetau.errors import RecipeError
from thetau.tasks.suite import MethodChoice


def build_method(choice: MethodChoice) -> Any:
    """The method of a choice, with `scale=1` wherever it has one. Raises `RecipeError` naming the row."""
    import thetau

    try:
        return _at_one(thetau.methods.build(choice.method, choice.fields))
    except RecipeError as error:
        raise RecipeError(error.problems, where=f"method {choice.name!r} of the suite") from error


def _at_one(method: Any) -> Any:
    """The same method with λ = 1, in the methods that it takes as fields too."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    inner = {name: _at_one(value) for name, value in values.items() if hasattr(value, "chain")}
    return replace(method, **inner, **({"scale": 1.0} if "scale" in values else {}))


def merged_vector(base: Path, models: Sequence[Path], names: Sequence[str], method: Any) -> dict[str, Tensor]:
    """The merged task vector of fine-tuned checkpoints, or adapters over `base`, at λ = 1."""
    import thetau

    start = thetau.open(base)
    merged = thetau.merge([thetau.open(model, base=base) - start for model in models], method, names=list(names))
    vector: dict[str, Tensor] = merged.state_dict()
    return vector


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
