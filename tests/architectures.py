"""Tiny configurations of real architectures: the model's class, its config's, and the values."""

from __future__ import annotations

from typing import Any

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**WIDE, "vocab_size": 30}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", {**WIDE, "vocab_size": 30}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**WIDE, **TOKENS}),
    "mpnet": ("MPNetModel", "MPNetConfig", {**WIDE, **TOKENS}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**WIDE, **IMAGE}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**WIDE, **IMAGE}),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**WIDE, **IMAGE, "use_swiglu_ffn": True}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**WIDE, **TOKENS}, "vision_config": {**WIDE, **IMAGE}, "projection_dim": 8},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 30,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "add_cross_attention": True}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**WIDE, **TOKENS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**WIDE, **TOKENS}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    ),
}
