"""Roles from names and from module trees: the same where names are enough, and the tree where they are not."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import thetau
from architectures import MODELS, TOKENS, WIDE
from commands import run
from thetau.checkpoint import Kind, Roles, bring_tree, kind_of, layer_of, open_source, weighed_left
from thetau.checkpoint import roles as room
from thetau.checkpoint.naming import plain
from thetau.diagnostics.roles import ranges, roles
from thetau.models import roles as trees
from thetau.models.roles import module_roles, tree_roles
from tiny_vision import made, saved

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**WIDE, **TOKENS, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**WIDE, **TOKENS, "num_key_value_heads": 2}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**WIDE, **TOKENS, "num_key_value_heads": 2, "num_local_experts": 2},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**WIDE, **TOKENS, "num_key_value_heads": 2}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**WIDE, **TOKENS, "head_dim": 8, "num_key_value_heads": 2}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
}
ALL = MODELS | MORE
XLM = {"vocab_size": 30, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16, "n_langs": 1}


def built(name: str) -> nn.Module:
    model, config, values = ALL[name]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**values))


def folder_of(root: Path, model: nn.Module, *, rename: Any = None, config: bool = True) -> Path:
    """Config and weights, as the model names them or renamed; zeros, for nothing here reads them."""
    root.mkdir(parents=True)
    if config:
        settings: Any = model.config
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(root)
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_file({(rename or str)(name): torch.zeros(shape) for name, shape in names.items()}, root / "model.safetensors")
    return root


@pytest.fixture(autouse=True)
def _built_anew() -> Iterator[None]:
    trees._live_roles.cache_clear()
    yield
    trees._live_roles.cache_clear()


@pytest.mark.parametrize("name", ALL)
def test_names_and_module_trees_agree(name: str) -> None:
    model = built(name)
    found = module_roles(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    bare = re.compile(r"_token$|position_embeddings$|lambda1$|class_embedding$|logit_scale$|experts\.\w+$|gate\.weight$")
    assert not [key for key in shapes if key not in found and not bare.search(key)], (
        "the rest belong to no module of a known sort"
    )
    assert {kind for kind, _ in found.values()} >= {Kind.ATTENTION, Kind.NORM}
    assert not [
        (key, found[key], kind_of(key, shapes[key]), layer_of(key))
        for key in found
        if found[key] != (kind_of(key, shapes[key]), layer_of(key))
    ]
    assert not [key for key, shape in shapes.items() if not plain(key, shape)], "no name leaves a doubt, so that no tree is built"


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("encoder.0.q_proj.weight", Kind.ATTENTION, 0),  # the case that was once taken for a linear layer outside the blocks
        ("encoder.11.o_proj.weight", Kind.ATTENTION, 11),
        ("encoder.2.fc1.weight", Kind.MLP, 2),
        ("transformer.3.attn.in_proj_weight", Kind.ATTENTION, 3),
        ("transformer.3.mlp.0.weight", Kind.MLP, 3),
        ("decoder.stack.5.feed_forward.w1.weight", Kind.MLP, 5),
        ("encoder.0.norm1.weight", Kind.NORM, 0),
        ("encoder.0.q_proj.bias", Kind.BIAS, 0),
        ("model.layers.4.mlp.experts.3.w1.weight", Kind.MLP, 4),
        ("projector.0.weight", Kind.LINEAR, None),
        ("mlp.2.weight", Kind.LINEAR, None),
        ("classifier.0.fc1.weight", Kind.HEAD, None),
        ("features.3.weight", Kind.LINEAR, None),
    ],
)
def test_numbered_containers_without_the_word_layer(name: str, kind: Kind, layer: int | None) -> None:
    shape = (8, 8) if name.endswith(("weight", "_weight")) and kind is not Kind.NORM else (8,)
    assert (kind_of(name, shape), layer_of(name)) == (kind, layer)
    if layer is not None and "layers" not in name:
        assert not plain(name, shape), "it is a guess, that a module tree may correct"


def test_the_failing_example_from_names_alone_is_called_a_guess(tmp_path: Path) -> None:
    names = ("encoder.0.q_proj.weight", "encoder.0.fc1.weight", "encoder.1.q_proj.weight", "embed.weight")
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "model.safetensors")
    known = Roles.of(open_source(tmp_path))
    role = known.role("encoder.1.q_proj.weight", (4, 4))
    assert (role.kind, role.layer, role.origin) == (Kind.ATTENTION, 1, "guess")
    assert known.role("embed.weight", (4, 4)).origin == "name"
    assert known.kind("encoder.0.fc1.weight", (4, 4)) is Kind.MLP
    assert known.layer("encoder.0.fc1.weight", (4, 4)) == 0


def test_a_module_tree_decides_where_names_leave_a_doubt(tmp_path: Path) -> None:
    """XLM keeps its attention in `attentions.0.q_lin`, which no word of ours knows."""
    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    folder = folder_of(tmp_path / "xlm", model)
    known = Roles.of(open_source(folder))
    assert kind_of("attentions.1.q_lin.weight", (16, 16)) is not Kind.ATTENTION
    for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
        role = known.role(f"attentions.1.{name}.weight", (16, 16))
        assert (role.kind, role.layer, role.origin) == (Kind.ATTENTION, 1, "module tree"), name
    assert known.role("ffns.1.lin1.weight", (64, 16)).kind is Kind.MLP
    assert known.layer("ffns.1.lin2.weight", (16, 64)) == 1
    assert known.weighed_left("attentions.1.out_lin.weight", (16, 16))
    assert not known.weighed_left("attentions.1.q_lin.weight", (16, 8)), "of attention it is the name that tells what writes"
    assert weighed_left("attentions.1.q_lin.weight", (16, 8)), "what the name alone says"
    assert pickle.loads(pickle.dumps(known)).kind("attentions.1.q_lin.weight", (16, 16)) is Kind.ATTENTION


@pytest.mark.parametrize("prefix", ["transformer.", "module.transformer."])
def test_a_tree_knows_prefixed_names(tmp_path: Path, prefix: str) -> None:
    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    known = Roles.of(open_source(folder_of(tmp_path / "xlm", model, rename=lambda name: prefix + name)))
    assert {known.role(name, shape).origin for name, shape in known.shapes.items()} == {"module tree"}


def test_a_tree_knows_names_without_the_models_prefix(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.XLMForSequenceClassification(transformers.XLMConfig(**XLM))
    folder = folder_of(tmp_path / "xlm", model, rename=lambda name: name.removeprefix("transformer."))
    role = Roles.of(open_source(folder)).role("attentions.0.q_lin.weight", (16, 16))
    assert (role.kind, role.layer, role.origin) == (Kind.ATTENTION, 0, "module tree")


def test_a_name_that_the_tree_lacks_is_a_guess_and_another_models_tree_is_not_taken(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    some = folder_of(tmp_path / "some", model, rename=lambda name: name.replace("layer_norm1.", "x."))
    known = Roles.of(open_source(some))
    assert known.role("x.0.weight", (16,)).origin == "guess"
    assert known.role("attentions.0.q_lin.weight", (16, 16)).origin == "module tree"
    none = folder_of(tmp_path / "none", model, rename=lambda name: name.replace(".", "_x."))
    assert not Roles.of(open_source(none)).tree


def test_files_keep_their_older_names(tmp_path: Path) -> None:
    """A ViT's file says `encoder.layer.0.attention.attention.query`, whatever transformers calls it now."""
    folder = saved(tmp_path / "vit", made("vit"))
    source = open_source(folder)
    found = tree_roles(folder, tuple(source.specs))
    for name, spec in source.specs.items():
        if name in found:
            assert found[name] == (kind_of(name, spec.shape), layer_of(name)), name
    assert sum(kind is Kind.ATTENTION for kind, _ in found.values()) == 4


def test_heads_stand_beside_the_encoder() -> None:
    with torch.device("meta"):
        model = transformers.XLMForSequenceClassification(transformers.XLMConfig(**XLM, num_labels=3))
    assert module_roles(model)["sequence_summary.summary.weight"] == (Kind.HEAD, None)
    assert module_roles(model)["transformer.attentions.0.q_lin.weight"] == (Kind.ATTENTION, 0)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[1]",
        "{}",
        json.dumps({"model_type": "no_such_model"}),
        json.dumps({"model_type": "xlm", "emb_dim": "wide"}),
        json.dumps({"model_type": "custom", "auto_map": {"AutoModel": "evil--code.Model"}, "architectures": ["Model"]}),
    ],
)
def test_a_config_that_nothing_knows_leaves_the_names(tmp_path: Path, config: str) -> None:
    save_file({"encoder.0.q_proj.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    role = Roles.of(open_source(tmp_path)).role("encoder.0.q_proj.weight", (4, 4))
    assert (role.kind, role.origin) == (Kind.ATTENTION, "guess")


def test_plain_names_build_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, names: tuple[str, ...]) -> None:
        raise AssertionError("a tree was built")

    monkeypatch.setattr(trees, "tree_roles", refuse)
    folder = folder_of(tmp_path / "llama", built("llama"))
    known = Roles.of(open_source(folder))
    for name, shape in known.shapes.items():
        assert known.role(name, shape).origin == "name"


def test_without_a_library_names_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    folder = folder_of(tmp_path / "xlm", model)
    monkeypatch.setattr(room, "_TREE", room._Builder())
    assert Roles.of(open_source(folder)).role("attentions.0.q_lin.weight", (16, 16)).origin == "guess"
    bring_tree("thetau.models.roles:tree_roles")
    assert Roles.of(open_source(folder)).role("attentions.0.q_lin.weight", (16, 16)).origin == "module tree"


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    folder = folder_of(tmp_path / "xlm", model)
    table = roles(open_source(folder))
    row = next(row for row in table.rows if row.pattern == "attentions.*.q_lin.weight")
    assert (row.kind, row.layers, row.tensors, row.told) == ("attention", (0, 1), 2, "module tree")
    assert sum(row.tensors for row in table.rows) == table.tensors == len(open_source(folder).specs)
    code, text = run(capsys, "inspect", str(folder), "--roles", "--json", str(tmp_path / "roles.json"))
    assert code == 0, text
    line = next(line for line in text.splitlines() if line.startswith("attentions.*.q_lin.weight"))
    assert line.split() == ["attentions.*.q_lin.weight", "2", "attention", "0–1", "module", "tree"]
    assert json.loads((tmp_path / "roles.json").read_text())["tensors"] == table.tensors
    (folder / "config.json").unlink()
    code, text = run(capsys, "inspect", str(folder), "--roles")
    assert code == 0, text
    assert "are guessed from names that leave a doubt (attentions.0.k_lin.weight" in text
    code, text = run(capsys, "inspect", str(folder), str(folder), "--roles")
    assert code == 1
    assert "--roles looks at BASE alone" in text


def test_the_table_of_a_known_model_says_that_both_agree(tmp_path: Path) -> None:
    table = roles(open_source(folder_of(tmp_path / "bert", built("bert"))))
    assert {row.told for row in table.rows} == {"name and module tree"}
    assert table.verdict() == [f"The module tree of config.json takes {table.tensors} of {table.tensors} tensors for the same."]


def test_a_name_that_the_tree_contradicts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    monkeypatch.setattr(trees, "tree_roles", lambda folder, names: {name: (Kind.ATTENTION, 0)})
    table = roles(open_source(folder_of(tmp_path / "llama", built("llama"))))
    assert any("the name says mlp, the module tree attention, layer 0; the name is followed" in line for line in table.verdict())


def test_ranges() -> None:
    assert ranges((0, 1, 2, 5)) == "0–2, 5"
    assert ranges(()) == "–"


def test_inspection_uses_the_tree(tmp_path: Path) -> None:
    from thetau.diagnostics import inspect

    with torch.device("meta"):
        model = transformers.XLMModel(transformers.XLMConfig(**XLM))
    found = inspect(thetau.open(folder_of(tmp_path / "xlm", model)), [])
    assert next(row for row in found.tensors if row.name == "attentions.0.q_lin.weight").kind == "attention"
