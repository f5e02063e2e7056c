"""A family of models with everything in it that the doctor has to find, made on purpose out of a base and three fine-tuned models.

| member | what it is |
|---|---|
| `alpha`, `beta`, `gamma` | the three models themselves |
| `copy` | alpha, rounded to bfloat16 |
| `further` | trained on from beta: the model that was given, or beta moved by as much again in another direction |
| `undone` | 2 θ₀ − gamma |
| `stranger` | gamma's vector on another base: θ₀ with the entries of every tensor in another order |
| `spoken` | alpha with four tokens more, and their rows |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
MORE = ("<one>", "<two>", "<three>", "<four>")
TRUTH: Mapping[str, frozenset[str]] = {  # kind of finding → whom it is about
    "duplicate": frozenset({"alpha", "copy"}),
    "continuation": frozenset({"beta", "further"}),
    "opposed": frozenset({"gamma", "undone"}),
    "wrong base": frozenset({"stranger"}),
    "other vocabulary": frozenset({"spoken"}),
}
CLEAN = ("alpha", "beta", "gamma")


def make_family(base: Path, tuned: Sequence[Path], out: Path, *, further: Path | None = None) -> dict[str, Path]:
    """Write all members into `out`; their folders by name."""
    alpha, beta, gamma = tuned
    found = {name: _copied(path, out / name) for name, path in zip(CLEAN, tuned, strict=True)}
    origin = load_file(base / WEIGHTS)
    found["copy"] = _changed(alpha, out / "copy", lambda name, value: value.bfloat16())
    found["further"] = _copied(further, out / "further") if further is not None else _further(origin, beta, out / "further")
    found["undone"] = _changed(gamma, out / "undone", lambda name, value: 2 * origin[name] - value)
    found["stranger"] = _changed(
        gamma, out / "stranger", lambda name, value: _shuffled(origin[name], name) + value - origin[name]
    )
    found["spoken"] = _spoken(alpha, out / "spoken")
    return found


def _copied(path: Path, out: Path) -> Path:
    shutil.copytree(path, out)
    return out


def _changed(path: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    shutil.copytree(path, out)
    weights = load_file(out / WEIGHTS)
    moved = {name: change(name, value) if value.dtype.is_floating_point else value for name, value in weights.items()}
    save_file(moved, out / WEIGHTS, metadata={"format": "pt"})
    return out


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def _shuffled(value: Tensor, name: str) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=_generator(name))].reshape(value.shape)


def _further(origin: Mapping[str, Tensor], beta: Path, out: Path) -> Path:
    def moved(name: str, value: Tensor) -> Tensor:
        way = torch.randn(value.shape, generator=_generator(name))
        return value + way * ((value - origin[name]).norm() / way.norm())

    return _changed(beta, out, moved)


def _spoken(alpha: Path, out: Path) -> Path:
    shutil.copytree(alpha, out)
    weights = load_file(out / WEIGHTS)
    (name,) = [one for one in weights if one.endswith("word_embeddings.weight")]
    rows = weights[name]
    weights[name] = torch.cat([rows, rows[: len(MORE)]])
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    file = out / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for place, token in enumerate(MORE, len(rows)):
        settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document["added_tokens"].append({"id": place, "content": token, **settings})
    file.write_text(json.dumps(document), encoding="utf-8")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": len(rows) + len(MORE)}), encoding="utf-8")
    return out
