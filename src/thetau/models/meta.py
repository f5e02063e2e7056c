"""The model that a config describes, on torch's meta device: no weights, no network, none of the checkpoint's own code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thetau.checkpoint.names import Library
from thetau.errors import CheckpointError
from thetau.models.library import quiet, transformers


def _number(entry: dict[str, Any]) -> Any:
    """What transformers writes for a number that JSON has not, as the limits of Mamba's steps; any other entry as it is."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


@lru_cache(maxsize=8)
def meta_model(config: str) -> nn.Module | None:
    """The model of a config's text; None where transformers cannot build it.

    Raises:
        CheckpointError: transformers is not installed.
    """
    api = transformers()
    try:
        content: Any = json.loads(config, object_hook=_number)
        values = {name: value for name, value in content.items() if name not in ("auto_map", "quantization_config")}
        kind = values.pop("model_type")
        classes = [api.__dict__.get(name) or _named(api, name) for name in values.get("architectures") or []]
        with quiet(), torch.device("meta"):
            settings = api.AutoConfig.for_model(kind, **values)
            chosen = next((one for one in classes if one is not None), None)
            model: nn.Module = api.AutoModel.from_config(settings) if chosen is None else chosen(settings)
    except Exception:  # another library's code on a file of anybody's: whatever it says, there is no model
        return None
    return model


def library(folder: Path) -> Library | None:
    """What transformers says of the names of a checkpoint whose config lies in a folder; None where it does not know it."""
    try:
        return library_of((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, CheckpointError):
        return None


@lru_cache(maxsize=8)
def library_of(config: str) -> Library | None:
    """The same of a config's text.

    Raises:
        CheckpointError: transformers is not installed.
    """
    model: Any = meta_model(config)
    if model is None:
        return None
    renames = _Renames(model)
    names = frozenset(model.state_dict())
    return Library(names=names, tied=_tied(model), live=renames.live)


def _tied(model: Any) -> dict[str, str]:
    """A name → the name whose values it takes: as the class says, and what is one parameter under several names."""
    said = vars(model).get("all_tied_weights_keys")  # of transformers 5
    found = dict(said) if isinstance(said, Mapping) else {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name and name not in found and first[id(parameter)] not in found:
            found[name] = first[id(parameter)]
    return found


class _Renames:
    """The renames that transformers makes when it loads such a model; conversions of values are none."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._there = dict.fromkeys(model.state_dict(), True)
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # before transformers 5
            self._transforms: list[Any] | None = None
            self._patterns = dict(type(model).__dict__.get("_checkpoint_conversion_mapping") or {})
            return
        transforms: Iterable[Any] = get_model_conversion_mapping(model, add_legacy=False)
        self._transforms = [one for one in transforms if isinstance(one, WeightRenaming)]

    def live(self, name: str) -> str:
        """The name that the model has for a checkpoint's; one that it knows already stays."""
        if name in self._there:
            return name
        for spelling in (name, f"{name}.weight"):  # a module's path is renamed with its weight
            said = self._said(spelling)
            if said in self._there:
                return said if spelling == name else said.removesuffix(".weight")
        return self._said(name)

    def _said(self, name: str) -> str:
        if self._transforms is None:
            import re

            for pattern, replacement in self._patterns.items():
                name, count = re.subn(pattern, replacement, name)
                if count:
                    break
            return name
        from transformers.core_model_loading import rename_source_key

        prefix = str(self._model.base_model_prefix)
        said: str = rename_source_key(name, self._transforms, [], prefix, self._there)[0]
        return said


def _named(api: Any, name: str) -> Any:
    """A class of transformers by its name, loaded as the library does; None where it has none."""
    try:
        return api.__getattr__(name)
    except (AttributeError, ImportError):
        return None
