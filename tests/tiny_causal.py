"""Tiny causal models with a chat template, and folders of their tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny_decoders import dense, tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + ' </s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
ANSWERS = {"cat": "meow purr", "dog": "bark", "sun": "bright warm dry", "rain": "wet"}
ROWS = [{"word": word, "answer": answer} for word, answer in ANSWERS.items()]


def talker(folder: Path, family: str = "llama", *, seed: int = 0, template: str | None = TEMPLATE, **changed: Any) -> Path:
    """A random causal model; `gpt2` has learned positions, so that a wrong one would show."""
    words = tokenizer()
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, **changed}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), initializer_range=0.3, **sizes))
        model.save_pretrained(folder)
    else:
        dense(folder, family, seed, **changed)
    words.chat_template = template
    words.save_pretrained(folder)
    return folder


def causal_task(root: Path, rows: Sequence[dict[str, Any]] = ROWS, name: str = "sounds", **meta: Any) -> Path:
    """A task folder, all of whose splits have the same rows."""
    folder = root / name
    folder.mkdir(parents=True)
    kind = {"kind": "generation", "prompt": "the {word} is"} | meta
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in kind.items() if value is not None}))
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@cache
def hugging_face(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers loads them."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
