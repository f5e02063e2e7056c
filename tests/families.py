"""Tiny configurations of many architectures, each with three layers a tower: the model's class, its config's, and the values."""

from __future__ import annotations

from typing import Any

WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**WIDE, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": 8}
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {**GROUPED, **TOKENS}
EXPERTS = {**TEXT, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
ROUTED = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
SEEN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, **IMAGE}
QWEN_VISION = {
    "depth": 3,
    "embed_dim": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
MARKS = {"image_token_id": 35, "video_token_id": 36, "vision_start_token_id": 37, "vision_end_token_id": 38}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
SMALL = {"vocab_size": 40, "max_position_embeddings": 32}

# One tower of layers.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**TEXT, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**TEXT, "max_window_layers": 1, "use_sliding_window": True, "sliding_window": 8},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**HEADS, **TOKENS}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**HEADS, **TOKENS}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**HEADS, **TOKENS}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**HEADS, **TOKENS}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**WIDE, **TOKENS}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "num_labels": 3, "pad_token_id": 0}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**WIDE, **TOKENS}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TOKENS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**WIDE, "vocab_size": 40}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", TEXT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "cohere": ("CohereForCausalLM", "CohereConfig", TEXT),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**TEXT, "head_dim": 8}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**WIDE, **TOKENS, **ROUTED, **LATENT}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**WIDE, **TOKENS, **ROUTED, **LATENT}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 16, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 40}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", TEXT),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", TEXT),
    "granite": ("GraniteForCausalLM", "GraniteConfig", TEXT),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **TEXT,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 8,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
        },
    ),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**HEADS, **TOKENS}),
    "glm4-moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**HEADS, **TOKENS, **ROUTED, "n_group": 1, "topk_group": 1}),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**TEXT, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    ),
    "apertus": ("ApertusForCausalLM", "ApertusConfig", TEXT),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", TEXT),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", {**HEADS, **TOKENS}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**HEADS, **TOKENS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4-text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**HEADS, **TOKENS, "intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    ),
    "bert": ("BertModel", "BertConfig", {**WIDE, **SMALL}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", {**WIDE, **SMALL}),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**WIDE, **SMALL, "num_labels": 3}),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", {**WIDE, **TOKENS}),
    "roberta-classifier": ("RobertaForSequenceClassification", "RobertaConfig", {**WIDE, **TOKENS, "num_labels": 3}),
    "roberta-tokens": ("RobertaForTokenClassification", "RobertaConfig", {**WIDE, **TOKENS, "num_labels": 3}),
    "distilbert-mlm": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, **SMALL},
    ),
    "distilbert-classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "num_labels": 3, **SMALL},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**WIDE, **TOKENS, "global_attn_every_n_layers": 2, "reference_compile": False},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SEEN, "num_labels": 3}),
    "dinov2": ("Dinov2Model", "Dinov2Config", SEEN),
}
# Several towers.
TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-tied": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **TOKENS,
            "d_model": 16,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "d_model": 16,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**WIDE, **TOKENS}, "vision_config": SEEN, "projection_dim": 8},
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": {**WIDE, **TOKENS}, "vision_config": SEEN}),
    "gemma3-vl": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**HEADS, **TOKENS},
            "vision_config": SEEN,
            "mm_tokens_per_image": 4,
            "image_token_index": 35,
            "boi_token_index": 36,
            "eoi_token_index": 37,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN_VISION, **MARKS},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {
                **QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
            **MARKS,
        },
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {**HEADS, **TOKENS, **MROPE},
            "vision_config": {
                **QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            **MARKS,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **SEEN, "projection_dim": 8},
            "image_token_index": 35,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **HEADS, **TOKENS},
            "vision_config": {"model_type": "pixtral", **SEEN, "head_dim": 8},
            "image_token_index": 35,
        },
    ),
}
