"""A model's `config.json` as it stands, and what of it tells its depth, its vocabulary and its architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thetau.checkpoint.safetensors import read_text
from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

FILE = "config.json"


def has_config(folder: Path | None, file: str = FILE) -> bool:
    """Whether a model's folder has one, or another file like it."""
    return folder is not None and (folder / file).is_file()


def read_config(folder: Path, file: str = FILE) -> dict[str, Any]:
    """The config, a table.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or no table.
    """
    try:
        config = json.loads(read_text(folder / file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / file}: not valid JSON ({error}). Mend it, then run again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / file}: must hold a table. Got {type(config).__name__}.")
    return config


def config_for(source: Source) -> dict[str, Any]:
    """The config of what is made of a model: the one that it comes with, or the one in its folder; empty where there is none.

    Raises:
        CheckpointError: the folder's cannot be read.
    """
    changed = source.files.get(FILE)
    if changed is not None:
        return dict(changed)
    return read_config(source.folder) if source.folder is not None and has_config(source.folder) else {}


def stem_of(folder: Path | None) -> str:
    """What the files of a model's weights are called, before their numbers: `model`, or diffusers' `diffusion_pytorch_model`, which its own
    loader asks for and which its configs tell (`_class_name`).
    """
    named = folder is not None and has_config(folder) and "_class_name" in read_config(folder)
    return "diffusion_pytorch_model" if named else "model"


# Depth.

_DEPTH = re.compile(r"^(?:num_)?(?:hidden_|encoder_|decoder_)?layers$|^n_layers?$|^depth$|^num_(?:encoder|decoder)?_?blocks$")
_VISION = re.compile(r"vision|visual|image|vit(?:_|$)", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech", re.IGNORECASE)
Where = tuple[str, ...]


def is_tower(name: str) -> bool:
    """Whether a tensor belongs to what reads images or sound, beside a language model.

    Examples:
        >>> is_tower("model.visual.blocks.0.attn.proj.weight")
        True
    """
    return _VISION.search(name) is not None or _AUDIO.search(name) is not None


def depths(config: Mapping[str, Any]) -> dict[Where, int]:
    """Every entry that says how many layers something has, nested configs one level down included.

    Examples:
        >>> depths({"num_hidden_layers": 2, "vision_config": {"depth": 4}})
        {('num_hidden_layers',): 2, ('vision_config', 'depth'): 4}
    """
    found: dict[Where, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            found.update({(key, *inner): count for inner, count in depths(value).items() if len(inner) == 1})
        elif type(value) is int and _DEPTH.search(key):
            found[key,] = value
    return found


def depth_entries(config: Mapping[str, Any], container: str) -> list[Where]:
    """The entries that say how many layers the container of this name has, as `model.layers` or `decoder.block`."""
    known = depths(config)
    side = next((word for word in ("decoder", "encoder") if word in container.lower().split(".")), "")
    other = {"decoder": "encoder", "encoder": "decoder"}.get(side, "")
    for kind in (_VISION, _AUDIO):
        nested = [where for where in known if len(where) > 1 and kind.search(where[0])]
        known = {where: n for where, n in known.items() if (where in nested) == bool(nested and kind.search(container))}
    named = [where for where in known if side and side in where[-1]]
    if named:
        both = [where for where in known if where[-1] == "num_hidden_layers" and side == "encoder"]  # BART says it twice
        return [*named, *(where for where in both if known[where] == known[named[0]])]
    left = [where for where in known if not (other and other in where[-1])]
    if side == "encoder" or not side:
        left = [where for where in left if "decoder" not in where[-1]]
    deepest = [where for where in left if len(where) > 1]
    return deepest or left


def depth_of(config: Mapping[str, Any], container: str) -> int | None:
    """How many layers the config says the container has; None where it does not say, or says several numbers.

    Examples:
        >>> depth_of({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, "model.layers")
        61
    """
    known = depths(config)
    said = {known[where] for where in depth_entries(config, container)}
    return said.pop() if len(said) == 1 else None


_INDICES = re.compile(
    r"_(?:indexes|indices|idxs|ids)$|^(?:mlp_only|moe|hybrid|attn|attention)_layers?$"
)  # the numbers of some layers
_FIRST = ("first_k_dense_replace", "max_window_layers")  # so many layers, from the first one, are of another kind than the others
_KINDS = ("layer_types",)  # what counts where both are given


def with_depth(config: Mapping[str, Any], container: str, layers: Sequence[int]) -> dict[str, Any]:
    """The config of a model whose layers are these of the old ones, in this order: the count, and what is said layer by layer.

    Lists with an entry for each layer are rearranged, lists of layers' numbers follow the layers, and so does a number of first layers.

    Examples:
        >>> with_depth({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [1]}, "model.layers", [0, 1, 1, 2])
        {'num_hidden_layers': 4, 'layer_types': ['a', 'b', 'b', 'c'], 'mlp_only_layers': [1, 2]}

    Raises:
        CheckpointError: no entry says how many layers the container has, or the layers of a first kind would not be the first ones.
    """
    entries = depth_entries(config, container)
    if not entries:
        raise CheckpointError(
            f"the config has no entry for the number of layers of {container!r} (such as `num_hidden_layers`), which changes to {len(layers)}."
        )
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for where in entries:
        table = changed
        for key in where[:-1]:
            table = table[key]
        before = table[where[-1]]
        table[where[-1]] = len(layers)
        if max(layers) < before:
            table.update({key: _by_layer(key, value, before, layers, table) for key, value in table.items()})
    return changed


def _by_layer(key: str, value: Any, before: int, layers: Sequence[int], table: Mapping[str, Any]) -> Any:
    """An entry of a config after its layers were rearranged; as it is, where it says nothing of single layers."""
    if (
        isinstance(value, list)
        and _INDICES.search(key)
        and value
        and all(type(one) is int and 0 <= one < before for one in value)
    ):
        return [place for place, layer in enumerate(layers) if layer in value]
    if isinstance(value, list) and len(value) == before and "layer" in key:
        return [value[layer] for layer in layers]
    if isinstance(value, str) and len(value) == before and key.endswith("pattern"):
        return "".join(value[layer] for layer in layers)
    if key in _FIRST and type(value) is int and not any(kind in table for kind in _KINDS):
        first = [layer < value for layer in layers]
        if sorted(first, reverse=True) != first:
            raise CheckpointError(
                f"`{key}: {value}` says that the first layers are of another kind. Of the layers {list(layers)} these are not the first: "
                "put them there, or leave them out."
            )
        return max(value, sum(first)) if all(first) else sum(first)
    return value


_RULES = {  # every so many layers one is of another kind, unless a list says it layer by layer
    "sliding_window_pattern": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "full_attention_interval": "layer_types",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "",
    "decoder_sparse_step": "",
    "moe_layer_freq": "",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
_UNSAID = {"gemma2": 2}  # a rule that older configs do not even state


def out_of_step(config: Mapping[str, Any], container: str, layers: Sequence[int]) -> list[str]:
    """The entries that give layers their kind by their number, where layers arranged so get another kind than they had.

    Examples:
        >>> out_of_step({"num_hidden_layers": 4, "sliding_window_pattern": 2}, "model.layers", [0, 1, 1, 2])
        ['sliding_window_pattern: 2']
        >>> out_of_step({"num_hidden_layers": 4, "sliding_window_pattern": 2}, "model.layers", [0, 1, 0, 1])
        []
    """
    found = []
    for where in depth_entries(config, container):
        table = config
        for key in where[:-1]:
            table = table[key]
        rules = {key: table.get(key) for key, said in _RULES.items() if not table.get(said)}
        if "layer_types" not in table and not any(rules.values()):
            rules["model_type"] = _UNSAID.get(str(table.get("model_type")))
        for key, every in rules.items():
            if type(every) is int and every > 1 and any((layer - place) % every for place, layer in enumerate(layers)):
                found.append(f"{key}: {table[key]}")
    return found


ALIKE = (  # entries that may differ between models whose weights can be merged
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "tie_word_embeddings",
    "quantization_config",
    "id2label",
    "label2id",
    "vocab_size",
    "problem_type",
    "finetuning_task",
    "num_labels",
)


def part_like(config: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes a model of the other's type: `text_config`, where the other is such a text model."""
    kind = other.get("model_type")
    if kind is None or config.get("model_type") == kind:
        return config
    parts = [part for part in config.values() if isinstance(part, Mapping) and part.get("model_type") == kind]
    return parts[0] if len(parts) == 1 else config


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`key: value against value` for each entry that shapes the network and differs; tokens and training aside."""

    def shaping(key: str) -> bool:
        return key not in ALIKE and "token" not in key and "dropout" not in key and not key.startswith("_")

    found = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if not shaping(key) or mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += [f"{key}.{line}" for line in differences(mine, theirs)]
        elif isinstance(mine, list) and isinstance(theirs, list) and "layer" in key and len(mine) != len(theirs):
            continue  # layer by layer, of another number of them
        elif key in one and key in other:
            found.append(f"{key}: {mine!r} against {theirs!r}")
    return found
