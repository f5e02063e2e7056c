"""Random language models of a few thousand weights, with tokenizers of a few words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import WORDS


def tokenizer_of(kind: str, words: Iterable[str] = ()) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = {"roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]}
    first = specials.get(kind, ["<pad>", "</s>", "<unk>"])
    known = dict.fromkeys([*first, *WORDS, ",", "?", ":", "0.0", "5.0", "2.5", *words])
    vocabulary = {word: number for number, word in enumerate(known)}
    unk = "[UNK]" if kind == "bert" else "<unk>"
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, str] = {"unk_token": unk}
    if kind == "t5":
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names |= {"pad_token": "<pad>", "eos_token": "</s>"}
    elif kind == "bert":
        raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        raw.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **names)


def config_of(kind: str, size: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
    }
    if kind == "bert":
        return transformers.BertConfig(**sizes)
    if kind == "roberta":
        return transformers.RobertaConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    if kind == "distilbert":
        return transformers.DistilBertConfig(vocab_size=size, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    return transformers.T5Config(
        vocab_size=size,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )


AUTO = {"t5": transformers.AutoModelForSeq2SeqLM}


def folder_of(root: Path, kind: str, tokenizer: Any = None) -> Path:
    """A random model, all of whose weights are drawn wide enough to matter, biases and norms included."""
    tokenizer = tokenizer or tokenizer_of("bert" if kind == "distilbert" else kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AUTO.get(kind, transformers.AutoModelForMaskedLM).from_config(config_of(kind, len(tokenizer)))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(root / kind)
    tokenizer.save_pretrained(root / kind)
    return root / kind
