"""Tiny models for recipes in mergekit's format: Llama, Qwen2 and GPT-2, with tokenizers, an adapter, grown vocabularies, plain files.

Every number comes from the raw bits of a counted generator by exact arithmetic, so that the models are the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, ...]]

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-()", "Ġ", "Ċ"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "a n", "Ġ a", "e r", "o n", "r e", "Ġ s", "a t", "n d"]
SPECIAL = ["<s>", "</s>", "<pad>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NOISE = 0.02


def normal(shape: Sequence[int], *key: int) -> torch.Tensor:
    """Nearly normal float64 numbers of mean 0 and variance 1: sums of eight uniform ones; the same bits everywhere."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(4 * count).reshape(4, count)
    uniform = np.concatenate([raw >> 32, raw & 0xFFFFFFFF]).astype(np.float64) / 2**32
    total: Any = 0.0
    for part in uniform:
        total = total + part
    return torch.from_numpy((total - 4.0) * float(np.sqrt(1.5))).reshape(tuple(shape))


def weights(shapes: Shapes, model: int, *, family: int = 0) -> dict[str, torch.Tensor]:
    """Model 0 is the base of a family; every other is the base and a change of its own."""
    found = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        base = normal(shape, family, 0, index) * 0.1
        if "norm" in name or "ln_" in name:
            base = base + 1.0
        if model:
            base = base + normal(shape, family, model, index) * NOISE
        found[name] = base.to(torch.float32)
    return found


def llama_shapes(hidden: int, inner: int, layers: int, rows: int, *, tied: bool = False, bias: bool = False) -> Shapes:
    """Tensors of a Llama, or with `bias` of a Qwen2; half as many heads for keys and values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        out = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "o": hidden}
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (rows_, hidden) for part, rows_ in out.items()}
        if bias:
            shapes |= {f"{at}.self_attn.{part}_proj.bias": (out[part],) for part in "qkv"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def llama_config(
    hidden: int, inner: int, layers: int, rows: int, *, kind: str = "llama", tied: bool = False, heads: int = 4
) -> dict[str, Any]:
    """The config of a Llama, Qwen2 or Mistral."""
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
    return {
        "architectures": [classes[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": rows,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def gpt2_shapes(hidden: int, layers: int, rows: int, positions: int) -> Shapes:
    """Tensors of a GPT-2 as transformers writes them: head tied, weights (in, out)."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (rows, hidden), "transformer.wpe.weight": (positions, hidden)}
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        for part, (inside, out) in {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden),
            "mlp.c_proj": (4 * hidden, hidden),
        }.items():
            shapes |= {f"{at}.{part}.weight": (inside, out), f"{at}.{part}.bias": (out,)}
        shapes |= {f"{at}.ln_{number}.{kind}": (hidden,) for number in (1, 2) for kind in ("weight", "bias")}
    return shapes | {f"transformer.ln_f.{kind}": (hidden,) for kind in ("weight", "bias")}


def gpt2_config(hidden: int, layers: int, rows: int, positions: int) -> dict[str, Any]:
    """The config of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": positions,
        "n_ctx": positions,
        "vocab_size": rows,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def vocabulary() -> list[str]:
    """The tokens that all tokenizers share, by id."""
    return [*SPECIAL, *LETTERS, *("".join(pair.split()) for pair in MERGES)]


def write_tokenizer(folder: Path, more: Sequence[str] = (), *, special: Sequence[str] = (), template: str | None = None) -> None:
    """A byte-pair tokenizer of a few letters; `more` tokens and `special` ones are added after them, as growing a vocabulary does."""
    tokens = vocabulary()
    ids = {token: number for number, token in enumerate([*tokens, *more, *special])}

    def entry(token: str, is_special: bool) -> dict[str, Any]:
        return {
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not is_special,
            "special": is_special,
        }

    added = {token: entry(token, token in SPECIAL or token in special) for token in [*SPECIAL, *more, *special]}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **said} for token, said in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: ids[token] for token in tokens},
            "merges": [pair.split() for pair in MERGES],
        },
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(ids[token]): said for token, said in added.items()},
    }
    if template is not None:
        config["chat_template"] = template
    _write(folder / "tokenizer.json", document)
    _write(folder / "tokenizer_config.json", config)


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], shards: int = 1) -> None:
    """Weights in one file or several, with config and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        chosen = names[number::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(chosen, file)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def grown(tensors: Mapping[str, torch.Tensor], count: int, model: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The same weights with more rows in the tensors that count tokens."""
    found = dict(tensors)
    for index, name in enumerate(names):
        rows = normal((count, tensors[name].shape[1]), 7, model, index) * 0.1
        found[name] = torch.cat([tensors[name], rows.to(torch.float32)])
    return found


def build_bad(folder: Path) -> Path:
    """Models with something wrong about them, beside those that `build` makes."""
    rows, place = len(vocabulary()), folder / "bad"
    shapes, config = llama_shapes(HIDDEN, INNER, LAYERS, rows), llama_config(HIDDEN, INNER, LAYERS, rows)
    model = weights(shapes, 1)
    broken = {name: tensor.clone() for name, tensor in model.items()}
    broken["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    extra = {f"model.layers.{layer}.linear_attn.in_proj.weight": (HIDDEN, HIDDEN) for layer in range(LAYERS)}
    narrow = llama_config(HIDDEN // 2, INNER, LAYERS, rows)
    made = {
        "unrelated": (weights(shapes, 0, family=9), config),
        "nan": (broken, config),
        "narrow": (weights(llama_shapes(HIDDEN // 2, INNER, LAYERS, rows), 1), narrow),
        "rotated": (weights(shapes, 2), {**config, "rope_theta": 500000.0}),
        "extra-a": (weights({**shapes, **extra}, 1), config),
        "extra-b": (weights({**shapes, **extra}, 2), config),
    }
    for name, (tensors, said) in made.items():
        write_model(place / name, tensors, said)
        write_tokenizer(place / name)
    write_model(place / "stale", model, config, shards=2)
    save_file(weights(shapes, 0), place / "stale" / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(place / "stale")
    tensors = grown(weights(shapes, 2), 3, 2, HEADS)
    write_model(place / "moved", tensors, {**config, "vocab_size": rows + 3})
    write_tokenizer(place / "moved", special=["<|end|>", "<|user|>", "<|tool|>"])
    _adapter(place / "adapter", "llama/deep", layers=6)
    return folder


HIDDEN, INNER, LAYERS = 32, 48, 4
HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def build(folder: Path) -> Path:
    """All models that the recipes name."""
    rows = len(vocabulary())
    shapes, config = llama_shapes(HIDDEN, INNER, LAYERS, rows), llama_config(HIDDEN, INNER, LAYERS, rows)
    llama = [weights(shapes, model) for model in range(4)]
    for model, name in enumerate(("base", "a", "b", "c")):
        write_model(folder / "llama" / name, llama[model], config, shards=2 if name == "b" else 1)
        write_tokenizer(folder / "llama" / name, template=CHATML if name == "a" else None)
    _grown(folder, llama, config)
    _adapter(folder / "llama" / "adapter", "llama/base")
    deep = llama_shapes(HIDDEN, INNER, 6, rows)
    write_model(folder / "llama" / "deep", weights(deep, 5, family=1), llama_config(HIDDEN, INNER, 6, rows))
    write_tokenizer(folder / "llama" / "deep")
    _qwen(folder, rows)
    gpt2 = gpt2_shapes(HIDDEN, 3, rows, 24)
    for model, name in enumerate(("base", "a", "b")):
        write_model(folder / "gpt2" / name, weights(gpt2, model, family=3), gpt2_config(HIDDEN, 3, rows, 24))
        write_tokenizer(folder / "gpt2" / name)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights(gpt2, 2, family=3).items()}
    write_model(folder / "gpt2" / "bare", bare, gpt2_config(HIDDEN, 3, rows, 24))
    write_tokenizer(folder / "gpt2" / "bare")
    mistral = llama_config(HIDDEN, INNER, 2, rows, kind="mistral")
    for model, name in enumerate(("base", "a", "b")):
        write_model(folder / "mistral" / name, weights(llama_shapes(HIDDEN, INNER, 2, rows), model, family=4), mistral)
        write_tokenizer(folder / "mistral" / name)
    _wide(folder, rows)
    plain = {"net.0.weight": (40, 20), "net.0.bias": (40,), "net.2.weight": (8, 40), "scale": ()}
    (folder / "plain").mkdir(exist_ok=True)
    for model, name in enumerate(("base", "a", "b")):
        save_file(weights(plain, model, family=6), folder / "plain" / f"{name}.safetensors")
        torch.save(weights(plain, model, family=6), folder / "plain" / f"{name}.pt")
    return folder


def _grown(folder: Path, llama: Sequence[Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> None:
    """Models whose vocabularies grew apart: two chat formats, one token in common, spare rows."""
    rows = len(vocabulary())
    chatml = ["<|im_start|>", "<|im_end|>", "<|tool|>"]
    headers = ["<|tool|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    for name, special, model in (("chatml", chatml, 1), ("headers", headers, 2)):
        tensors = grown(llama[model], len(special), model, HEADS)
        write_model(folder / "grown" / name, tensors, {**config, "vocab_size": rows + len(special)})
        write_tokenizer(folder / "grown" / name, special=special, template=CHATML)
    spare = grown(llama[3], 9, 3, HEADS)
    write_model(folder / "grown" / "spare", spare, {**config, "vocab_size": rows + 9})
    write_tokenizer(folder / "grown" / "spare", special=["<|tool|>"])


def _adapter(folder: Path, base: str, layers: int = LAYERS) -> None:
    """A LoRA adapter as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(HIDDEN, INNER, layers, 4)
    tensors = {}
    for layer in range(layers):
        for index, part in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")):
            out, inside = shapes[f"model.layers.{layer}.{part}.weight"]
            at = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{at}.lora_A.weight"] = (normal((4, inside), 8, layer, index) * 0.1).to(torch.float32)
            tensors[f"{at}.lora_B.weight"] = (normal((out, 4), 9, layer, index) * 0.1).to(torch.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False}
    targets = ["q_proj", "v_proj", "down_proj"]
    _write(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "target_modules": targets, **said},
    )


def _qwen(folder: Path, rows: int) -> None:
    """Qwen2 with tied embeddings and more rows than tokens; one of them with a head of its own."""
    padded = rows + 5
    shapes = llama_shapes(HIDDEN, INNER, LAYERS, padded, tied=True, bias=True)
    config = llama_config(HIDDEN, INNER, LAYERS, padded, kind="qwen2", tied=True)
    for model, name in enumerate(("base", "a", "b")):
        tensors = weights(shapes, model, family=2)
        write_model(folder / "qwen" / name, tensors, config)
        write_tokenizer(folder / "qwen" / name)
        if name == "b":
            head = tensors["model.embed_tokens.weight"] + (normal((padded, HIDDEN), 2, 9, 0) * NOISE).to(torch.float32)
            write_model(folder / "qwen" / "untied", {**tensors, "lm_head.weight": head}, {**config, "tie_word_embeddings": False})
            write_tokenizer(folder / "qwen" / "untied")


def _wide(folder: Path, rows: int) -> None:
    """One wide layer, whose matrices hold enough entries for the statistics of methods that draw."""
    hidden, inner = 352, 704
    for model, name in enumerate(("base", "a", "b")):
        tensors = weights(llama_shapes(hidden, inner, 1, rows), model, family=5)
        write_model(folder / "wide" / name, tensors, llama_config(hidden, inner, 1, rows))
        write_tokenizer(folder / "wide" / name)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
