"""A random BERT of a few thousand weights with a tokenizer of a few words, and task folders of the real format, for fast tests."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    *("cat", "dog", "meow", "purr", "whiskers", "bark", "bone", "leash"),
    *("sun", "rain", "bright", "warm", "dry", "wet", "puddle", "cloud"),
    *("this", "is", "about", "the", "a", "same", "other", ".", "question"),
]
KINDS = {
    "animals": {"cat": ["meow", "purr", "whiskers"], "dog": ["bark", "bone", "leash"]},
    "weather": {"sun": ["bright", "warm", "dry"], "rain": ["wet", "puddle", "cloud"]},
}


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write config, weights and tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=32, model_input_names=names, **special
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertModel(config)
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # As older checkpoints do, it stores an integer buffer that the live model no longer has.
    weights = {
        name: 10 * tensor.detach() if "embeddings.weight" in name else tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    save_file(
        {**weights, "embeddings.position_ids": torch.arange(32)[None]}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def rows_of(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose words tell the class."""
    generator = random.Random(f"{task}/{seed}")
    classes = list(KINDS[task].values())
    return [
        {"text": " ".join([*generator.choices(classes[i % 2], k=generator.randint(1, 6)), "the"]), "label": i % 2}
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> None:
    """JSON lines, gzipped when the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")


def make_task(root: Path, task: str, *, sizes: tuple[int, int, int] = (64, 20, 40), **meta: Any) -> Path:
    """A task folder of the real format."""
    folder = root / task
    folder.mkdir(parents=True)
    facts = {"task": task, "kind": "text", "labels": list(KINDS[task]), "licence": "made by the test", "source": "here", **meta}
    (folder / "meta.json").write_text(json.dumps(facts), encoding="utf-8")
    for number, (split, size) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        write_rows(folder / f"{split}.jsonl.gz", rows_of(task, size, number))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by a second thread, and lose much on a busy machine. Import it in a test file to use it there."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
