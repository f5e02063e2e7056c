"""Fused q/k/v, and gate and up in one tensor: split by hand in plain torch, merged as matrices of their own, and joined by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from mixtures import folder
from thetau import methods

HIDDEN, HEADS, KEYS, WIDTH = 24, 6, 2, 4
METHOD = methods.TsvM(split_fused=True)
Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


def in_turn(tensor: Tensor, keys: int) -> list[Tensor]:
    return list(tensor.split([HEADS * WIDTH, keys * WIDTH, keys * WIDTH]))


def by_head(tensor: Tensor) -> list[Tensor]:
    """As transformers' GPT-NeoX, BLOOM and old Falcon view it: `[head, 3, width]`."""
    heads = tensor.view(HEADS, 3, WIDTH, -1)
    return [heads[:, one].reshape(HEADS * WIDTH, -1) for one in range(3)]


def from_heads(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.view(HEADS, WIDTH, -1) for part in parts], 1).reshape(3 * HEADS * WIDTH, -1)


def by_group(tensor: Tensor) -> list[Tensor]:
    """As transformers' new Falcon views it: `[key, queries + 2, width]`."""
    groups = tensor.view(KEYS, HEADS // KEYS + 2, WIDTH, -1)
    return [
        groups[:, :-2].reshape(HEADS * WIDTH, -1),
        groups[:, -2].reshape(KEYS * WIDTH, -1),
        groups[:, -1].reshape(KEYS * WIDTH, -1),
    ]


def from_groups(parts: list[Tensor]) -> Tensor:
    q, k, v = (part.view(KEYS, -1, WIDTH, part.shape[1]) for part in parts)
    return torch.cat([q, k, v], 1).reshape((HEADS + 2 * KEYS) * WIDTH, -1)


def thirds(tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(3))


def turned_thirds(tensor: Tensor) -> list[Tensor]:
    return [part.T for part in tensor.chunk(3, 1)]


def turned_join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.T for part in parts], 1)


ALL, GROUPED, ONE = 3 * HEADS * WIDTH, (HEADS + 2 * KEYS) * WIDTH, (HEADS + 2) * WIDTH
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS}
FALCON = {**SIZES, "model_type": "falcon", "num_kv_heads": HEADS}
# The tensor's name and shape, the config, and how it is split and joined.
CASES: dict[str, tuple[str, tuple[int, int], Mapping[str, Any], Split, Join]] = {
    "Phi-3, grouped": (
        "model.layers.0.self_attn.qkv_proj.weight",
        (GROUPED, HIDDEN),
        {**SIZES, "model_type": "phi3", "num_key_value_heads": KEYS},
        lambda tensor: in_turn(tensor, KEYS),
        torch.cat,
    ),
    "Phi-3, gate and up": (
        "model.layers.0.mlp.gate_up_proj.weight",
        (40, HIDDEN),
        {**SIZES, "model_type": "phi3"},
        lambda tensor: list(tensor.chunk(2)),
        torch.cat,
    ),
    "GPT-NeoX": (
        "gpt_neox.layers.0.attention.query_key_value.weight",
        (ALL, HIDDEN),
        {**SIZES, "model_type": "gpt_neox"},
        by_head,
        from_heads,
    ),
    "BLOOM": (
        "transformer.h.0.self_attention.query_key_value.weight",
        (ALL, HIDDEN),
        {"hidden_size": HIDDEN, "n_head": HEADS, "model_type": "bloom"},
        by_head,
        from_heads,
    ),
    "Falcon, new": (
        "transformer.h.0.self_attention.query_key_value.weight",
        (GROUPED, HIDDEN),
        {**FALCON, "num_kv_heads": KEYS, "new_decoder_architecture": True, "multi_query": True},
        by_group,
        from_groups,
    ),
    "Falcon, one key": (
        "transformer.h.0.self_attention.query_key_value.weight",
        (ONE, HIDDEN),
        {**FALCON, "multi_query": True},
        lambda tensor: in_turn(tensor, 1),
        torch.cat,
    ),
    "Falcon, by head": (
        "transformer.h.0.self_attention.query_key_value.weight",
        (ALL, HIDDEN),
        {**FALCON, "multi_query": False, "new_decoder_architecture": False},
        by_head,
        from_heads,
    ),
    "GPT-2": (
        "transformer.h.0.attn.c_attn.weight",
        (HIDDEN, 3 * HIDDEN),
        {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": HEADS},
        turned_thirds,
        turned_join,
    ),
    "StarCoder": (
        "transformer.h.0.attn.c_attn.weight",
        (ONE, HIDDEN),
        {"model_type": "gpt_bigcode", "n_embd": HIDDEN, "n_head": HEADS, "multi_query": True},
        lambda tensor: in_turn(tensor, 1),
        torch.cat,
    ),
    "DBRX": (
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
        (GROUPED, HIDDEN),
        {"model_type": "dbrx", "d_model": HIDDEN, "n_heads": HEADS, "attn_config": {"kv_n_heads": KEYS}},
        lambda tensor: in_turn(tensor, KEYS),
        torch.cat,
    ),
    "InternLM2": (
        "model.layers.0.attention.wqkv.weight",
        (GROUPED, HIDDEN),
        {**SIZES, "model_type": "internlm2", "num_key_value_heads": KEYS},
        by_group,
        from_groups,
    ),
    "a tower of its own sizes": (
        "model.language_model.layers.0.self_attn.qkv_proj.weight",
        (GROUPED, HIDDEN),
        {"model_type": "x", "vision_config": SIZES, "text_config": {**SIZES, "model_type": "phi3", "num_key_value_heads": KEYS}},
        lambda tensor: in_turn(tensor, KEYS),
        torch.cat,
    ),
    "thirds, no config": ("visual.blocks.0.attn.qkv.weight", (3 * HIDDEN, HIDDEN), {}, thirds, torch.cat),
}


def vectors(base: Path, *models: dict[str, Tensor]) -> tuple[Any, list[Any]]:
    start = thetau.open(base)
    return start, [thetau.open(model, name=f"t{number}") - start for number, model in enumerate(models)]


def weights(shape: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(3)]


def alone(parts: list[Tensor], models: list[list[Tensor]], method: Any) -> list[Tensor]:
    """Each part's merge as the matrix of a model that stores it so."""
    found = []
    for number, part in enumerate(parts):
        name = "model.layers.0.self_attn.q_proj.weight"
        start = thetau.open({name: part.contiguous()})
        own = [thetau.open({name: model[number].contiguous()}, name=f"t{task}") - start for task, model in enumerate(models)]
        found.append((start + thetau.merge(own, method)).state_dict()[name])
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_parts_are_merged_as_matrices_of_their_own(case: str, tmp_path: Path) -> None:
    name, shape, config, split, join = CASES[case]
    base, models = weights(shape)
    want = join(alone(split(base), [split(model) for model in models], METHOD))
    start, tasks = vectors(folder(tmp_path / "base", {name: base}, **config), *({name: model} for model in models))
    merge = thetau.merge(tasks, METHOD)
    got = (start + merge).state_dict()[name]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    whole = (start + thetau.merge(tasks, methods.TsvM())).state_dict()[name]
    assert float((whole - got).abs().max()) > 1e-3  # as one matrix it is another merge
    said = "\n".join(note for _, source in merge.terms for note in source.notes)
    assert f"1 fused tensors are merged as the matrices that they hold: '{name}'" in said


@pytest.mark.parametrize("case", ["GPT-NeoX", "Falcon, new", "GPT-2", "Phi-3, grouped"])
def test_the_split_is_the_models_own(case: str) -> None:
    """Splitting and joining by hand gives the tensor back, so that the comparison above says something."""
    _, shape, _, split, join = CASES[case]
    tensor = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    assert torch.equal(join([part.contiguous() for part in split(tensor)]), tensor)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"model_type": "gpt_neox"}, (ALL, HIDDEN)),  # no heads
        ({"model_type": "someones_own", **SIZES}, (ALL, HIDDEN)),  # an unknown order
        ({"model_type": "gpt_neox", **SIZES, "num_attention_heads": 5}, (ALL, HIDDEN)),  # heads that do not add up
    ],
)
def test_what_nothing_is_known_of_stays_one_matrix_and_is_said(
    tmp_path: Path, config: dict[str, Any], shape: tuple[int, int]
) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    base, models = weights(shape)
    start, tasks = vectors(folder(tmp_path / "base", {name: base}, **config), *({name: model} for model in models))
    merge = thetau.merge(tasks, METHOD)
    assert torch.equal((start + merge).state_dict()[name], (start + thetau.merge(tasks, methods.TsvM())).state_dict()[name])
    said = "\n".join(note for _, source in merge.terms for note in source.notes)
    assert "1 fused tensors stay one matrix each, since neither their shape nor a config says how q, k and v lie in them" in said


def test_what_queries_learnt_stays_with_the_queries(tmp_path: Path) -> None:
    """With queries alone changed in all tasks, the keys and values of a split merge are the base's; as one matrix they are not."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    base, models = weights((ALL, HIDDEN))
    q = [by_head(model)[0] for model in models]
    models = [from_heads([part, *by_head(base)[1:]]) for part in q]
    config = {**SIZES, "model_type": "gpt_neox"}
    start, tasks = vectors(folder(tmp_path / "base", {name: base}, **config), *({name: model} for model in models))
    _, k, v = by_head((start + thetau.merge(tasks, METHOD)).state_dict()[name])
    assert torch.equal(k, by_head(base)[1]) and torch.equal(v, by_head(base)[2])
