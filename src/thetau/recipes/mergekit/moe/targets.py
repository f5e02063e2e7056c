"""The mixtures that can be put together from dense models: names of their tensors, and their configs.

Names are those of the published checkpoints, which transformers 4 and 5 and llama.cpp load; not those of a live model of transformers 5,
where all experts lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

Config = dict[str, Any]

PARTS = ("gate_proj", "up_proj", "down_proj")  # of a dense model's MLP; the last one writes to the residual stream
DENSE = "model.layers.{layer}.mlp.{part}.weight"
COMMON = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight",
    "model.layers.*.self_attn.[qkvo]_proj.weight",
)
_QKV_BIAS = "model.layers.*.self_attn.[qkv]_proj.bias"
_ATTENTION_BIAS = "model.layers.*.self_attn.[qkvo]_proj.bias"
_HEAD_NORM = "model.layers.*.self_attn.[qk]_norm.weight"
DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"

# What a family's config means where it is silent; another family's silence would mean something else.
_LLAMA = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32}
_EVERY = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
SILENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_EVERY, **_LLAMA},
    "mistral": {**_EVERY, **_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {**_EVERY, **_QWEN},
    "qwen3": {**_EVERY, **_QWEN, "head_dim": 128},
}
_NOT_OURS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "pretraining_tp",
)


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of mixture.

    - `name`: what messages call it. `spellings`: what a recipe may, or any beginning of these, as in mergekit.
    - `families`: dense models (`model_type`) that it can be made of.
    - `expert`, `gate`, `shared`, `shared_gate`: names of its tensors.
    - `holds`: patterns of further tensors of the dense model that it has too.
    - `zeros`: biases that it must have, as zeros where the dense model has none.
    - `shares`: fewest and most shared experts.
    - `settings`: what its config says beside what the base's says: of (config, experts, experts per token, shared experts).
    """

    name: str
    spellings: tuple[str, ...]
    families: tuple[str, ...]
    expert: Callable[[int, int, str], str]
    gate: str
    settings: Callable[[Config, int, int, int], Config]
    shared: str = ""
    shared_gate: str = ""
    holds: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    shares: tuple[int, int] = (0, 0)

    def config(self, base: Config, experts: int, per_token: int, shared: int) -> Config:
        """Its config, from the base's."""
        said = {**SILENT[base["model_type"]], "num_key_value_heads": base.get("num_attention_heads"), **_known(base)}
        return {**self.settings(said, experts, per_token, shared), **_rope(base)}


def _known(base: Config) -> Config:
    """What the base's config says, less what holds of its architecture alone; what is null is not said."""
    silent = SILENT[base["model_type"]]
    return {key: value for key, value in base.items() if key not in _NOT_OURS and (value is not None or key not in silent)}


def _rope(base: Config) -> Config:
    """Rotary embeddings as transformers 4 and llama.cpp read them, and as transformers 5 does where the base is its."""
    modern = base.get("rope_parameters") or {}
    theta = modern.get("rope_theta", base.get("rope_theta") or 10000.0)
    scaling = {key: value for key, value in modern.items() if key not in ("rope_theta", "partial_rotary_factor")}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": theta, "rope_scaling": base.get("rope_scaling") or (None if plain else scaling)}


def _mixtral(config: Config, experts: int, per_token: int, shared: int) -> Config:
    return {
        **_without(config, "attention_bias"),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": None,
    }


def _deepseek(config: Config, experts: int, per_token: int, shared: int) -> Config:
    return {
        **config,
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": f"{DEEPSEEK_CODE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{DEEPSEEK_CODE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{DEEPSEEK_CODE}modeling_deepseek.DeepseekForCausalLM",
        },
        "n_routed_experts": experts,
        "n_shared_experts": shared or None,
        "num_experts_per_tok": per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config["intermediate_size"],
        "scoring_func": "softmax",
        "norm_topk_prob": True,
    }


def _qwen(config: Config, experts: int, per_token: int, shared: int) -> Config:
    return {
        **_without(config, "attention_bias"),
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **_qwen_experts(config, experts, per_token),
        "shared_expert_intermediate_size": config["intermediate_size"],
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _qwen3(config: Config, experts: int, per_token: int, shared: int) -> Config:
    return {
        **config,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_qwen_experts(config, experts, per_token),
    }


def _qwen_experts(config: Config, experts: int, per_token: int) -> Config:
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": config["intermediate_size"],
    }


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


_IN_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _mixtral_expert(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{_IN_MIXTRAL[part]}.weight"


def _plain_expert(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


TARGETS: Sequence[Target] = (
    Target(
        name="Mixtral",
        spellings=("mixtral",),
        families=("llama", "mistral"),
        expert=_mixtral_expert,
        gate="model.layers.{layer}.block_sparse_moe.gate.weight",
        settings=_mixtral,
    ),
    Target(
        name="DeepSeek MoE",
        spellings=("deepseek moe", "deepseek_moe"),
        families=("llama", "mistral"),
        expert=_plain_expert,
        gate="model.layers.{layer}.mlp.gate.weight",
        settings=_deepseek,
        shared="model.layers.{layer}.mlp.shared_experts.{part}.weight",
        holds=(_ATTENTION_BIAS,),
        shares=(0, 1),
    ),
    Target(
        name="Qwen MoE",
        spellings=("qwen moe", "qwen2_moe", "qwen2 moe"),
        families=("qwen2", "llama", "mistral"),
        expert=_plain_expert,
        gate="model.layers.{layer}.mlp.gate.weight",
        settings=_qwen,
        shared="model.layers.{layer}.mlp.shared_expert.{part}.weight",
        shared_gate="model.layers.{layer}.mlp.shared_expert_gate.weight",
        holds=(_QKV_BIAS,),
        zeros=("q_proj", "k_proj", "v_proj"),
        shares=(1, 1),
    ),
    Target(
        name="Qwen3 MoE",
        spellings=("qwen3 moe", "qwen3_moe"),
        families=("qwen3",),
        expert=_plain_expert,
        gate="model.layers.{layer}.mlp.gate.weight",
        settings=_qwen3,
        holds=(_ATTENTION_BIAS, _HEAD_NORM),
    ),
)
