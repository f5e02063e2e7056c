"""Random decoders of a few thousand weights, with a tokenizer of a few words that has a first token and no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import WORDS

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def dense(folder: Path, family: str, seed: int, **changed: Any) -> Path:
    """A tiny random model with tokenizer; norms and biases too are drawn."""
    words = tokenizer()
    sizes = {**SIZES, "vocab_size": len(words), **changed}
    if family == "qwen3":
        sizes.setdefault("head_dim", 8)
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(changed.get("dtype", torch.float32)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
