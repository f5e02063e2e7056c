"""What a GGUF file says of a model beside its weights: sizes, positions, the names of its tensors. All of it read from `config.json`.

Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. What llama.cpp cannot be told is refused, never left out: a model that
answers a little differently is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thetau.checkpoint.quantised.gguf import FAMILIES as STORED
from thetau.checkpoint.quantised.gguf import INSIDE, OUTSIDE
from thetau.errors import CheckpointError

FREQUENCIES = "rope_freqs.weight"
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type → architecture of the file
LEFT_OUT = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")  # buffers of old checkpoints, made again from the config
_STORED = {shown: stored for stored, shown in {**INSIDE, **OUTSIDE}.items()}
_PART = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's sizes as GGUF names them.

    - `name`: the architecture, as `llama`.
    - `fields`: key without the architecture's prefix → value.
    - `heads`, `kv_heads`: heads of the queries, and of keys and values.
    - `frequencies`: factors of the rotary frequencies, one for each pair of a head's dimensions; None where there are none.
    - `tied`: whether the head is the embedding.
    - `notes`: what a user should know.
    """

    name: str
    fields: Mapping[str, int | float | str]
    heads: int
    kv_heads: int
    frequencies: Tensor | None
    tied: bool
    notes: tuple[str, ...] = ()

    def stored(self, name: str) -> str | None:
        """The name in the file of a tensor of transformers'; None for one that is not stored.

        Raises:
            CheckpointError: the architecture has no such tensor.
        """
        if LEFT_OUT.search(name) or (self.tied and name == "lm_head.weight"):
            return None
        match = _PART.fullmatch(name)
        part = _STORED.get(match[2]) if match else None
        if match is None or part is None or (match[1] is None) != (part in OUTSIDE):
            raise CheckpointError(
                f"{name!r} is no tensor that a GGUF file of the architecture {self.name!r} holds. Leave it out of the model, or convert with "
                "llama.cpp's own script."
            )
        return f"blk.{match[1]}.{part}.{match[3]}" if match[1] else f"{part}.{match[3]}"

    def in_pairs(self, name: str) -> int:
        """How many heads' rows are stored in pairs; 0 where they are stored as they are."""
        match = re.search(r"\.self_attn\.([qk])_proj\.(?:weight|bias)$", name)
        if match is None or not STORED[self.name].paired:
            return 0
        return self.heads if match[1] == "q" else self.kv_heads


def architecture_of(config: Mapping[str, Any], label: str) -> Architecture:
    """What a GGUF file says of the model with this config; `label` is what messages call it.

    Raises:
        CheckpointError: the family cannot be written, or something of the model cannot be said in the file.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{label}: models of type {family!r} cannot be written as GGUF; {', '.join(sorted(FAMILIES))} can. Convert it with llama.cpp's own script."
        )
    for key, allowed in (("hidden_act", ("silu", None)), ("partial_rotary_factor", (1, 1.0, None))):
        if config.get(key) not in allowed:
            raise CheckpointError(
                f"{label}: its config says {key} = {config[key]!r}, which llama.cpp's {FAMILIES[family]!r} does not know."
            )
    hidden, heads = _number(config, "hidden_size", label), _number(config, "num_attention_heads", label)
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or hidden // heads
    fields: dict[str, int | float | str] = {
        "block_count": _number(config, "num_hidden_layers", label),
        "context_length": _number(config, "max_position_embeddings", label),
        "embedding_length": hidden,
        "feed_forward_length": _number(config, "intermediate_size", label),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "vocab_size": _number(config, "vocab_size", label),
    }
    notes = []
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", family == "mistral"):
        notes.append(
            f"the model attends to the last {window} positions only; llama.cpp attends to all of them, which differs in longer texts."
        )
    rope = _rope(config)
    fields["rope.freq_base"] = float(rope["rope_theta"])
    scaling, frequencies = _scaling(rope, width, config, label)
    return Architecture(
        name=FAMILIES[family],
        fields={**fields, **scaling},
        heads=heads,
        kv_heads=kv_heads,
        frequencies=frequencies,
        tied=bool(config.get("tie_word_embeddings", False)),
        notes=tuple(notes),
    )


def _number(config: Mapping[str, Any], key: str, label: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{label}: its config must say {key!r}, a positive number. Got {value!r}.")
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers 5 says them, from either spelling."""
    if isinstance(config.get("rope_parameters"), Mapping):
        rope = dict(config["rope_parameters"])
    else:
        rope = dict(config.get("rope_scaling") or {})
        rope["rope_theta"] = config.get("rope_theta", 10000.0)
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default")) or "default"
    return rope


def _scaling(
    rope: Mapping[str, Any], width: int, config: Mapping[str, Any], label: str
) -> tuple[dict[str, int | float | str], Tensor | None]:
    """The fields of scaled positions, and the factors of the frequencies where the file holds them instead."""
    kind = rope["rope_type"]
    if kind == "default":
        return {}, None
    if kind not in ("linear", "yarn", "llama3"):
        raise CheckpointError(
            f"{label}: scales its rotary positions by {kind!r}; default, linear, yarn and llama3 can be written. Convert it with llama.cpp's own script."
        )
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if not isinstance(factor, int | float) or (kind != "linear" and not isinstance(original, int | float)):
        raise CheckpointError(
            f"{label}: its config scales rotary positions by {kind!r} and must say 'factor' and 'original_max_position_embeddings'. Got {dict(rope)}."
        )
    if kind == "llama3":
        return {}, llama3_factors(rope, width)
    fields: dict[str, int | float | str] = {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = int(original)
        for key, name in (("attention_factor", "attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if isinstance(rope.get(key), int | float):
                fields[f"rope.scaling.{name}"] = float(rope[key])
    return fields, None


def llama3_factors(rope: Mapping[str, Any], width: int) -> Tensor:
    """By how much each rotary frequency of Llama 3.1 is divided: 1 for short waves, `factor` for long ones, in between by interpolation.

    Source: `_compute_llama3_parameters` of transformers, whose frequencies are those of the plain model divided by these.

    Shape: `[width / 2]`, float32.
    """
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    turns = original * float(rope["rope_theta"]) ** -exponents / (2 * math.pi)  # of each wave within the first context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
