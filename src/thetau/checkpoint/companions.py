"""What lies beside two models' weights, compared: whether they are of one architecture, and where their configs differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from thetau.checkpoint.config import differences, has_config, read_config
from thetau.checkpoint.source import Source

SHOWN = 6
# Entries that shape the network: weights of the same shapes mean other functions where one of them differs.
_SIZES = re.compile(
    r"^(?:model_type|(?:hidden|intermediate|embedding|projection|ffn)_(?:size|dim)|hidden_sizes|d_(?:model|kv|ff|head)|n_(?:embd|head|layer|inner|positions)|dim"
    r"|head_dim|num_(?:hidden_layers|layers|decoder_layers|encoder_layers|attention_heads|key_value_heads|heads|kv_heads|experts|local_experts)"
    r"|n_(?:heads|layers|kv_heads)|(?:encoder|decoder)_(?:layers|attention_heads|ffn_dim)|patch_size|num_channels)$"
)
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
GENERATION = "generation_config.json"


def compared(base: Source, model: Source) -> tuple[str | None, list[str]]:
    """What makes two models other architectures, in a sentence, and what else of their configs differs; nothing where one of them has none.

    Raises:
        CheckpointError: a config cannot be read.
    """
    if base.folder is None or model.folder is None or base.folder == model.folder:
        return None, []
    if not has_config(base.folder) or not has_config(model.folder):
        return None, []
    mine, theirs = _alike(read_config(base.folder), read_config(model.folder))
    lines = differences(mine, theirs)
    kind = {name: str(config.get("model_type", "")) for name, config in (("mine", mine), ("theirs", theirs))}
    sizes = [line for line in lines if _SIZES.match(line.partition(":")[0].rpartition(".")[2])]
    if kind["mine"].removesuffix("_text") == kind["theirs"].removesuffix("_text"):
        sizes = [line for line in sizes if not line.startswith("model_type:")]
    refused = None
    if sizes:
        refused = (
            f"{model.label}: is of another architecture than {base.label}: {'; '.join(sizes[:SHOWN])}. Models of other architectures cannot be "
            "merged; where a config is wrong, mend it."
        )
    lines = [line for line in lines if line not in sizes]
    lines += [
        f"{key}: {mine[key]!r} against {theirs[key]!r}"
        for key in _IDS
        if key in mine and key in theirs and mine[key] != theirs[key]
    ]
    said = _told(base, model, lines, "config")
    if has_config(base.folder, GENERATION) and has_config(model.folder, GENERATION):
        ours, other = (read_config(folder, GENERATION) for folder in (base.folder, model.folder))
        ids = [
            f"{key}: {ours[key]!r} against {other[key]!r}"
            for key in _IDS
            if key in ours and key in other and ours[key] != other[key]
        ]
        said += _told(base, model, ids, "generation config")
    return refused, said


def _told(base: Source, model: Source, lines: list[str], what: str) -> list[str]:
    if not lines:
        return []
    more = " …" if len(lines) > SHOWN else ""
    return [
        f"{model.label}: its {what} differs from that of {base.label}: {'; '.join(lines[:SHOWN])}{more}. "
        "The output takes the base's, or the one that `config: NAME` (`--config`) names."
    ]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The two configs at one level: of a model that reads images too, the part of its language model, where the other is that alone."""
    for key in ("text_config", "llm_config"):
        inner, outer = one.get(key), other.get(key)
        if isinstance(inner, Mapping) and not isinstance(outer, Mapping):
            return inner, other
        if isinstance(outer, Mapping) and not isinstance(inner, Mapping):
            return one, outer
    return one, other
