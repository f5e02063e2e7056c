"""Every weight matrix of a block is attention or MLP, and nothing else is: on the tensor names of real architectures."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from architectures import MODELS
from thetau.checkpoint.naming import Kind, View, kind_of, layer_of, view_of, weighed_left


@pytest.fixture(scope="module")
def make() -> Callable[[str], nn.Module]:
    found: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in found:
            model, config, values = MODELS[name]
            with torch.device("meta"):
                found[name] = getattr(transformers, model)(getattr(transformers, config)(**values))
        return found[name]

    return build


def block_of(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a tensor lies inside a repeated block: below a numbered child of a list of modules."""
    parts = name.split(".")
    return any(isinstance(modules.get(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts)))


@pytest.mark.parametrize("name", MODELS)
def test_block_matrices_and_only_they_are_attention_or_mlp(name: str, make: Callable[[str], nn.Module]) -> None:
    model = make(name)
    modules = dict(model.named_modules())
    seen = 0
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        owner = modules[key.rpartition(".")[0]]
        linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
        matrix = linear and key.endswith(".weight") and block_of(key, modules)
        kind = kind_of(key, shape)
        assert (kind in (Kind.ATTENTION, Kind.MLP)) == matrix, (key, kind)
        assert (layer_of(key) is not None) == block_of(key, modules), key
        if isinstance(owner, nn.Embedding):
            assert kind is Kind.EMBEDDING, key
        if "Norm" in type(owner).__name__:
            assert kind is Kind.NORM, (key, kind)
        if linear and key.endswith(".bias"):
            assert kind is Kind.BIAS, key
        if isinstance(owner, nn.Conv2d) and key.endswith("weight"):
            assert kind is Kind.CONV, key
        assert view_of(key, shape).transposed == (type(owner).__name__ == "Conv1D" and len(shape) == 2), key
        seen += matrix
    assert seen >= 8


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_told_from_mlp(name: str, make: Callable[[str], nn.Module]) -> None:
    state = make(name).state_dict()
    attention = [key for key in state if kind_of(key, tuple(state[key].shape)) is Kind.ATTENTION]
    mlp = [key for key in state if kind_of(key, tuple(state[key].shape)) is Kind.MLP]
    words = ("attn", "attention", "Attention")
    assert all(any(word in key for word in words) for key in attention)
    # BERT's `attention.output.dense` is attention, its `output.dense` is not
    assert not any(any(word in key for word in words) for key in mlp)
    expected = {"t5": 2 * 4 + 2 * 8, "clip": 16, "gpt2": 10, "gpt-neox": 4}.get(name, 8)
    assert len(attention) == expected
    assert {layer_of(key) for key in (*attention, *mlp)} == {0, 1}


@pytest.mark.parametrize("name", MODELS)
def test_what_writes_the_residual_stream_and_what_widens_face_their_output(name: str, make: Callable[[str], nn.Module]) -> None:
    """One output projection an attention, told from q, k and v; in an MLP the hidden layer's side, whatever the layer is called."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for key, tensor in make(name).state_dict().items():
        shape = tuple(tensor.shape)
        if kind_of(key, shape) in (Kind.ATTENTION, Kind.MLP):
            logical = (shape[1], shape[0]) if view_of(key, shape).transposed else (shape[0], shape[1])
            sides[weighed_left(key, logical)].append(key)
            if kind_of(key, shape) is Kind.MLP:
                assert weighed_left(key, logical) == (logical[0] > logical[1]), key
    writers = [key for key in sides[True] if kind_of(key, (2, 2)) is Kind.ATTENTION]
    readers = [key for key in sides[False] if kind_of(key, (2, 2)) is Kind.ATTENTION]
    assert len(writers) == {"t5": 2 + 4, "clip": 4, "gpt2": 4}.get(name, 2), writers
    assert all(re.search(r"\.(o|o_proj|out_proj|out_lin|c_proj|dense)\.weight$", key) for key in writers), writers
    inward = r"(query|key|value|q|k|v|[qkv]_lin|q_proj|k_proj|v_proj|qkv|query_key_value|c_attn|q_attn|in_proj\w*)\.weight$|in_proj_weight$"
    assert all(re.search(inward, key) for key in readers), readers


@pytest.mark.parametrize(
    ("key", "left"),
    [
        ("blocks.3.attn.proj.weight", True),  # timm
        ("blocks.3.attn.qkv.weight", False),
        ("transformer.layer.0.attention.out_lin.weight", True),  # DistilBERT
        ("transformer.h.1.self_attention.dense.weight", True),  # Falcon, BLOOM
        ("transformer.h.1.self_attention.query_key_value.weight", False),
        ("encoder.layer.0.attention.attn.o.weight", True),  # MPNet
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", False),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", False),
    ],
)
def test_attention_outputs_of_other_models(key: str, left: bool) -> None:
    assert weighed_left(key, (8, 8)) == left
    assert kind_of(key, (8, 8)) is Kind.ATTENTION


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "clip"])
def test_heads_are_heads(name: str, make: Callable[[str], nn.Module]) -> None:
    state = make(name).state_dict()
    heads = [key for key in state if kind_of(key, tuple(state[key].shape)) is Kind.HEAD]
    assert heads == {"bert": ["classifier.weight"], "llama": ["lm_head.weight"], "gpt2": ["lm_head.weight"], "clip": []}[name]


OPEN_CLIP = {  # ViT-B-32 of open_clip, one block of each tower
    "positional_embedding": ((77, 512), Kind.EMBEDDING),
    "text_projection": ((512, 512), None),
    "logit_scale": ((), Kind.OTHER),
    "visual.class_embedding": ((768,), Kind.OTHER),
    "visual.positional_embedding": ((50, 768), Kind.EMBEDDING),
    "visual.proj": ((768, 512), Kind.LINEAR),
    "visual.conv1.weight": ((768, 3, 32, 32), Kind.CONV),
    "visual.ln_pre.weight": ((768,), Kind.NORM),
    "visual.ln_pre.bias": ((768,), Kind.NORM),
    "visual.transformer.resblocks.0.ln_1.weight": ((768,), Kind.NORM),
    "visual.transformer.resblocks.0.ln_1.bias": ((768,), Kind.NORM),
    "visual.transformer.resblocks.0.attn.in_proj_weight": ((2304, 768), Kind.ATTENTION),
    "visual.transformer.resblocks.0.attn.in_proj_bias": ((2304,), Kind.BIAS),
    "visual.transformer.resblocks.0.attn.out_proj.weight": ((768, 768), Kind.ATTENTION),
    "visual.transformer.resblocks.0.attn.out_proj.bias": ((768,), Kind.BIAS),
    "visual.transformer.resblocks.0.ln_2.weight": ((768,), Kind.NORM),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": ((3072, 768), Kind.MLP),
    "visual.transformer.resblocks.0.mlp.c_fc.bias": ((3072,), Kind.BIAS),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": ((768, 3072), Kind.MLP),
    "visual.ln_post.weight": ((768,), Kind.NORM),
    "transformer.resblocks.11.attn.in_proj_weight": ((1536, 512), Kind.ATTENTION),
    "transformer.resblocks.11.attn.out_proj.weight": ((512, 512), Kind.ATTENTION),
    "transformer.resblocks.11.mlp.c_fc.weight": ((2048, 512), Kind.MLP),
    "transformer.resblocks.11.mlp.c_proj.weight": ((512, 2048), Kind.MLP),
    "token_embedding.weight": ((49408, 512), Kind.EMBEDDING),
    "ln_final.weight": ((512,), Kind.NORM),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name: str) -> None:
    shape, kind = OPEN_CLIP[name]
    got = kind_of(name, shape)
    if kind is None:
        assert got not in (Kind.ATTENTION, Kind.MLP)
    else:
        assert got is kind
    assert layer_of(name) == (0 if "resblocks.0." in name else 11 if "resblocks.11." in name else None)
    assert view_of(name, shape) == View(
        parts=3 if name.endswith("in_proj_weight") else 1
    )  # never transposed: these are plain linears


@pytest.mark.parametrize(
    ("name", "shape", "view"),
    [
        ("transformer.h.3.attn.c_attn.weight", (16, 48), View(transposed=True, parts=3)),
        ("h.0.mlp.c_proj.weight", (64, 16), View(transposed=True)),
        ("blocks.2.attn.qkv.weight", (48, 16), View(parts=3)),  # timm, DINOv2's own files
        ("blocks.2.attn.qkv.weight", (32, 16), View()),  # grouped queries: not three equal parts
        ("gpt_neox.layers.0.attention.query_key_value.weight", (48, 16), View()),  # interleaved by head: one matrix
        ("blocks.2.attn.qkv.bias", (48,), View()),
        ("logit_scale", (), View()),
        ("visual.conv1.weight", (48, 16, 1, 1), View()),
    ],
)
def test_views(name: str, shape: tuple[int, ...], view: View) -> None:
    assert view_of(name, shape) == view


def test_older_names_of_the_same_models() -> None:
    """Files on the hub keep the names of the library that wrote them."""
    assert kind_of("vit.encoder.layer.7.attention.attention.query.weight", (16, 16)) is Kind.ATTENTION
    assert kind_of("vit.encoder.layer.7.attention.output.dense.weight", (16, 16)) is Kind.ATTENTION
    assert kind_of("vit.encoder.layer.7.intermediate.dense.weight", (64, 16)) is Kind.MLP
    assert kind_of("encoder.layer.7.mlp.weights_in.weight", (64, 16)) is Kind.MLP
    assert kind_of("bert.embeddings.LayerNorm.gamma", (16,)) is Kind.NORM
    assert layer_of("vit.encoder.layer.7.output.dense.weight") == 7
