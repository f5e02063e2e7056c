"""Tiny mixtures of experts, one matrix an expert, and the same weights in the tensors that libraries keep them in: by plain torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
HIDDEN, INNER, EXPERTS, LAYERS = 6, 10, 3, 2
BLOCK = "model.layers.{}.mlp."


def single(seed: int, *, hidden: int = HIDDEN, inner: int = INNER, biases: bool = False, size: float = 1.0) -> State:
    """Embedding, attention, norms, routers, and experts of three matrices each, `[out, in]`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * size

    state = {"model.embed_tokens.weight": normal(12, hidden)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        state |= {f"{at}.self_attn.{one}_proj.weight": normal(hidden, hidden) for one in "qkvo"}
        state |= {f"{at}.input_layernorm.weight": normal(hidden), f"{at}.mlp.gate.weight": normal(EXPERTS, hidden)}
        for expert in range(EXPERTS):
            place = f"{at}.mlp.experts.{expert}"
            state |= {f"{place}.{one}_proj.weight": normal(inner, hidden) for one in ("gate", "up")}
            state[f"{place}.down_proj.weight"] = normal(hidden, inner)
            if biases:
                state |= {f"{place}.{one}_proj.bias": normal(inner) for one in ("gate", "up")}
                state[f"{place}.down_proj.bias"] = normal(hidden)
    return state | {"lm_head.weight": normal(12, hidden)}


def tuned(base: State, seed: int, size: float = 0.05) -> State:
    """The same model a little further on."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + size * torch.randn(value.shape, generator=generator) for name, value in base.items()}


def _experts(state: State, layer: int, role: str, end: str = "weight") -> Tensor:
    return torch.stack([state[f"{BLOCK.format(layer)}experts.{expert}.{role}_proj.{end}"] for expert in range(EXPERTS)])


def _without(state: State) -> State:
    return {name: value for name, value in state.items() if not re.search(r"experts\.\d", name)}


def out_in(state: State) -> State:
    """Mixtral, Qwen3-MoE and OLMoE of transformers 5: `[expert, out, in]`, the gate's rows first."""
    out = _without(state)
    for layer in range(LAYERS):
        at = BLOCK.format(layer)
        out[f"{at}experts.gate_up_proj"] = torch.cat([_experts(state, layer, "gate"), _experts(state, layer, "up")], 1)
        out[f"{at}experts.down_proj"] = _experts(state, layer, "down")
    return out


def in_out(state: State) -> State:
    """Llama 4: `[expert, in, out]`."""
    out = _without(state)
    for layer in range(LAYERS):
        at = BLOCK.format(layer)
        both = torch.cat([_experts(state, layer, "gate"), _experts(state, layer, "up")], 1)
        out[f"{at}experts.gate_up_proj"] = both.transpose(1, 2).contiguous()
        out[f"{at}experts.down_proj"] = _experts(state, layer, "down").transpose(1, 2).contiguous()
    return out


def alternating(state: State) -> State:
    """gpt-oss: `[expert, in, out]` with columns of gate and up in turn, and biases."""
    out = _without(state)
    for layer in range(LAYERS):
        at = BLOCK.format(layer)
        for end in ("weight", "bias"):
            both = torch.stack([_experts(state, layer, "gate", end), _experts(state, layer, "up", end)], 2).flatten(1, 2)
            name = f"{at}experts.gate_up_proj" + ("_bias" if end == "bias" else "")
            out[name] = both if end == "bias" else both.transpose(1, 2).contiguous()
        out[f"{at}experts.down_proj"] = _experts(state, layer, "down").transpose(1, 2).contiguous()
        out[f"{at}experts.down_proj_bias"] = _experts(state, layer, "down", "bias")
    return out


def apart(state: State) -> State:
    """Three tensors of stacked matrices, `[expert, out, in]`."""
    out = _without(state)
    for layer in range(LAYERS):
        for role in ("gate", "up", "down"):
            out[f"{BLOCK.format(layer)}experts.{role}_proj"] = _experts(state, layer, role)
    return out


def below(state: State) -> State:
    """DBRX: experts below one another in two dimensions, the way back transposed."""
    out = {}
    for name, value in _without(state).items():
        out[name.replace("mlp.gate.weight", "mlp.router.layer.weight")] = value
    for layer in range(LAYERS):
        at = f"{BLOCK.format(layer)}experts.mlp."
        out[f"{at}w1"], out[f"{at}v1"] = (_experts(state, layer, role).flatten(0, 1) for role in ("gate", "up"))
        out[f"{at}w2"] = _experts(state, layer, "down").transpose(1, 2).flatten(0, 1)
    return out


def granite(state: State) -> State:
    """Granite's hub files: linear layers of stacked matrices."""
    out = {name.replace("mlp.gate.weight", "mlp.router.layer.weight"): value for name, value in _without(state).items()}
    for layer in range(LAYERS):
        at = BLOCK.format(layer)
        out[f"{at}input_linear.weight"] = torch.cat([_experts(state, layer, "gate"), _experts(state, layer, "up")], 1)
        out[f"{at}output_linear.weight"] = _experts(state, layer, "down")
    return out


FORMS: dict[str, tuple[Callable[[State], State], bool]] = {
    "out_in": (out_in, False),
    "in_out": (in_out, False),
    "alternating": (alternating, True),
    "apart": (apart, False),
    "below": (below, False),
    "granite": (granite, False),
}


def folder(path: Path, state: State, **config: object) -> Path:
    """A checkpoint of these weights with a config."""
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path
