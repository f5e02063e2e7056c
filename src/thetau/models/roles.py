"""Roles of a checkpoint's tensors from the module tree of the model that its config describes.

The model is built on torch's meta device: no weights, no network, none of the checkpoint's own code. A linear layer inside an attention
module is attention, one beside it in the same block an MLP's; blocks are the lists of modules with attention inside. An attention module is
told by its class, which transformers and torch name so (`LlamaAttention`, `nn.MultiheadAttention`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thetau.checkpoint import Kind
from thetau.checkpoint.names import bare, unwrapped
from thetau.errors import CheckpointError
from thetau.models.library import transformers
from thetau.models.meta import meta_model

Found = tuple[Kind, int | None]

_ATTENTION = re.compile(r"atte?n(?:tion)?", re.IGNORECASE)
_NORM = re.compile(r"norm", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.Sequential)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def tree_roles(folder: Path, names: tuple[str, ...]) -> dict[str, Found]:
    """The checkpoint's name → kind and block, for every tensor that belongs to a module which says what it is.

    Empty where transformers is not installed or does not know the config, or where the model has other names than half of these. Names
    are matched as they are, with or without what models with a head put before them, and with the names that older files have.
    """
    try:
        live = _live_roles((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, CheckpointError):
        return {}
    spelt = {bare(name): role for name, role in live.items()} | live
    ways = [
        {name: spelt[known] for name in names if (known := _known(name, strip, add, spelt)) is not None}
        for strip in _leading(map(unwrapped, names), 2)
        for add in _leading(live, 1)
    ]
    best = max(ways, key=len)
    return best if 2 * len(best) > len(names) else {}


def module_roles(model: nn.Module) -> dict[str, Found]:
    """Name of a tensor → kind and block, for a live model; tensors that belong to no module of a known sort are left out."""
    modules = dict(model.named_modules())
    attention = {name for name, module in modules.items() if _ATTENTION.search(type(module).__name__) and name}
    attention -= {name for name in attention if _holds_blocks(name, modules, attention)}
    blocks = _blocks(modules, attention)
    heads = _heads(model, modules)
    found: dict[str, Found] = {}
    for path, module in modules.items():
        layer = next((int(rest.partition(".")[0]) for rest in _inside(path, blocks)), None)
        for leaf, tensor in [*module.named_parameters(recurse=False)]:
            kind = _kind(module, leaf, tensor)
            if kind is Kind.LINEAR:
                inside = any(path == one or path.startswith(f"{one}.") for one in attention)
                if layer is not None:
                    kind = Kind.ATTENTION if inside else Kind.MLP
                elif any(path == head or path.startswith(f"{head}.") for head in heads):
                    kind = Kind.HEAD
            if kind is not None:
                found[f"{path}.{leaf}" if path else leaf] = kind, layer
    # A tied tensor has one parameter and several names.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in found and names[id(parameter)] in found:
            found[name] = found[names[id(parameter)]]
    return found


def _kind(module: nn.Module, leaf: str, tensor: torch.Tensor) -> Kind | None:
    """What the tensor of a module is by the module's class alone; None where that says nothing."""
    if _NORM.search(type(module).__name__):
        return Kind.NORM
    if leaf.endswith("bias") and tensor.ndim == 1:
        return Kind.BIAS
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, _CONVOLUTIONS):
        return Kind.CONV
    matrix = tensor.ndim == 2 and leaf.endswith("weight")
    return Kind.LINEAR if matrix and (isinstance(module, nn.Linear | nn.MultiheadAttention) or _is_conv1d(module)) else None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's transposed linear layer."""
    layer: Any = transformers().pytorch_utils.Conv1D
    return isinstance(module, layer)


def _holds_blocks(name: str, modules: Mapping[str, nn.Module], attention: set[str]) -> bool:
    """Whether a module that is called attention is a whole model: it holds a list with attention in it."""
    lists = [one for one, module in modules.items() if one.startswith(f"{name}.") and isinstance(module, _LISTS)]
    return any(inner.startswith(f"{one}.") for one in lists for inner in attention)


def _blocks(modules: Mapping[str, nn.Module], attention: set[str]) -> list[str]:
    """The outermost lists whose members hold attention or are it, and those of the same length beside one."""
    lists = {name: module for name, module in modules.items() if isinstance(module, _LISTS)}
    holding = [name for name in lists if any(one.startswith(f"{name}.") for one in attention)]
    outer = [name for name in holding if not any(name.startswith(f"{other}.") for other in holding)]
    beside = [
        name
        for name, module in lists.items()
        if name not in outer
        and any(name.rpartition(".")[0] == one.rpartition(".")[0] and len(module) == len(_list(lists[one])) for one in outer)
    ]
    return outer + beside


def _list(module: nn.Module) -> nn.ModuleList | nn.Sequential:
    assert isinstance(module, _LISTS)
    return module


def _inside(path: str, blocks: list[str]) -> Iterator[str]:
    for one in blocks:
        if path.startswith(f"{one}."):
            yield path[len(one) + 1 :]


def _heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of what stands beside the encoder in a model with a head, and of the matrix that gives its logits."""
    wrapped: Any = model
    prefix = str(wrapped.base_model_prefix) if isinstance(wrapped, transformers().PreTrainedModel) else ""
    beside = [name for name, _ in model.named_children() if name != prefix] if prefix in modules and prefix else []
    output = wrapped.get_output_embeddings() if isinstance(wrapped, transformers().PreTrainedModel) else None
    return beside + [name for name, module in modules.items() if module is output and name]


@lru_cache(maxsize=8)
def _live_roles(config: str) -> dict[str, Found]:
    """The roles of the model that a config's text describes; empty where transformers cannot build it."""
    model = meta_model(config)
    return {} if model is None else module_roles(model)


def _leading(names: Iterable[str], most: int) -> list[str]:
    """Nothing, and every beginning of up to so many words, each with its dot."""
    found = {"".join(f"{word}." for word in name.split(".")[:count]) for name in names for count in range(1, most + 1)}
    return ["", *sorted(found)]


def _known(name: str, strip: str, add: str, live: Mapping[str, Found]) -> str | None:
    """A stored name as the live model has it, less what others put before it, after what the model puts before its own."""
    rest = add + unwrapped(name).removeprefix(strip)
    return next((spelling for spelling in (rest, bare(rest)) if spelling in live), None)
