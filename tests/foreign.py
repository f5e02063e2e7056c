"""Small Llama-shaped models in folders, and recipes in mergekit's format over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from thetau.errors import RecipeError
from thetau.facade import from_recipe
from thetau.recipes import load

HIDDEN, INNER, VOCABULARY = 8, 12, 20
Tensors = dict[str, Tensor]


def weights(layers: int, seed: int, *, near: Mapping[str, Tensor] | None = None, head: bool = True) -> Tensors:
    """A Llama-shaped model; one close to another where `near` is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            rows = (HIDDEN, INNER) if part.endswith("down_proj") else (HIDDEN, HIDDEN)
            shapes[f"model.layers.{layer}.{part}.weight"] = rows
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    if head:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    fresh = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return fresh if near is None else {name: near[name] + 0.1 * tensor for name, tensor in fresh.items() if name in near}


def keep(folder: Path, state: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    said = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": state["model.embed_tokens.weight"].shape[0],
        "layer_types": [f"kind {layer}" for layer in range(layers)],
        "tie_word_embeddings": "lm_head.weight" not in state,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    exit_code: int
    output: str


def written(folder: Path, recipe: Mapping[str, Any] | str) -> Path:
    path = folder / "recipe.yml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False))
    return path


def merged(folder: Path, recipe: Mapping[str, Any] | str, **options: Any) -> Tensors:
    return from_recipe(load(written(folder, recipe)), **options).state_dict()


def problems(folder: Path, recipe: Mapping[str, Any] | str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        from_recipe(load(written(folder, recipe)))
    return list(caught.value.problems)


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters} if parameters else {"model": model}


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
