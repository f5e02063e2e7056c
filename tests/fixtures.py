"""Tiny checkpoints: random weights named as in BERT, written by the safetensors library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH, VOCABULARY = 8, 12


def random_weights(seed: int, *, layers: int = 2) -> dict[str, Tensor]:
    """Embedding, attention, MLP, norms, biases, a 0-d float and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"embeddings.word_embeddings.weight": normal(VOCABULARY, WIDTH), "embeddings.position_ids": torch.arange(6)[None]}
    for layer in range(layers):
        block = f"encoder.layer.{layer}"
        weights |= {
            f"{block}.attention.self.query.weight": normal(WIDTH, WIDTH),
            f"{block}.attention.self.query.bias": normal(WIDTH),
            f"{block}.attention.output.dense.weight": normal(WIDTH, WIDTH),
            f"{block}.attention.output.LayerNorm.weight": normal(WIDTH),
            f"{block}.intermediate.dense.weight": normal(2 * WIDTH, WIDTH),
            f"{block}.intermediate.dense.bias": normal(2 * WIDTH),
            f"{block}.output.dense.weight": normal(WIDTH, 2 * WIDTH),
        }
    return weights | {"logit_scale": normal()}


def odd_weights() -> dict[str, Tensor]:
    """Every dtype and every shape that is easy to forget."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(5, 3, generator=generator)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    integers = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)
    weights = {f"matrix.{dtype}".replace("torch.", ""): matrix.to(dtype) for dtype in floats}
    weights |= {f"count.{dtype}".replace("torch.", ""): torch.arange(7).to(dtype) for dtype in integers}
    return weights | {
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "scalar.bfloat16": torch.tensor(2.5, dtype=torch.bfloat16),
        "no.rows": torch.empty(0, 4),
        "no.columns": torch.empty(4, 0),
        "nothing": torch.empty(0),
        "volume": torch.randn(3, 2, 2, 2, generator=generator),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def shifted(weights: Mapping[str, Tensor], seed: int, size: float = 0.01) -> dict[str, Tensor]:
    """As fine-tuning leaves them: every float a little elsewhere."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (value + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.dtype.is_floating_point
        else value.clone()
        for name, value in weights.items()
    }


def write_model(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A folder with one safetensors file and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert", "dtype": "float32"}), encoding="utf-8")
    return folder


def write_shards(folder: Path, weights: Mapping[str, Tensor], shards: int = 3) -> Path:
    """The same weights in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    index = folder / name
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}), encoding="utf-8")
    return index


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def write_hub_cache(cache: Path, repository: str, weights: Mapping[str, Tensor], revision: str = "a" * 40) -> Path:
    """A hub cache as huggingface_hub lays it out: refs, blobs, and snapshots of links to blobs."""
    root = cache / ("models--" + repository.replace("/", "--"))
    snapshot = root / "snapshots" / revision
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision, encoding="utf-8")
    write_shards(root / "blobs", weights, 2)
    (root / "blobs" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    for number, blob in enumerate(sorted((root / "blobs").iterdir())):
        hashed = blob.rename(blob.with_name(f"{number:064d}"))
        (snapshot / blob.name).symlink_to(os.path.relpath(hashed, snapshot))
    return snapshot


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        assert torch.equal(bits(got[name]), bits(value)), name


def bits(value: Tensor) -> Tensor:
    """Its bytes: NaNs and signed zeros count too."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All shards of a folder, read by the safetensors library."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def leftovers(folder: Path, known: Sequence[str] = ()) -> list[str]:
    """What lies in a folder beside what is known."""
    return sorted(path.name for path in folder.iterdir() if path.name not in known)
