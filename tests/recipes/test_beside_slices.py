"""Whose config, tokenizer and template an output takes whose layers are moved; and which tensor a tied head is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import thetau
from encoders import CASES
from thetau.errors import RecipeError
from thetau.facade import config_folder, from_recipe
from thetau.recipes import from_mapping, load
from tiny_decoders import dense

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(is probably not the model|its config differs|chat template|They are probably not related)"
)  # random weights, and configs on purpose


def marked(folder: Path, seed: int, **changed: Any) -> Path:
    """A model whose config and template bear its folder's name."""
    dense(folder, "llama", seed, **changed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mark": folder.name}))
    (folder / "chat_template.jinja").write_text(folder.name)
    return folder


def recipe(folder: Path, **more: Any) -> Any:
    return from_mapping(
        {
            "base": str(folder / "base"),
            "models": [str(folder / "a"), {"path": str(folder / "b"), "name": "second"}],
            "method": "task_arithmetic",
            "slices": [
                {"sources": [{"model": str(folder / "a"), "layers": [0, 2]}, {"model": "second", "layers": [0, 2]}]},
                {"sources": [{"model": str(folder / "a"), "layers": [1, 3]}, {"model": "second", "layers": [1, 3]}]},
            ],
            **more,
        }
    )


@pytest.mark.parametrize(("config", "want"), [(None, "base"), ("base", "base"), ("a", "a"), ("second", "b")])
def test_config_beside_slices(tmp_path: Path, config: str | None, want: str) -> None:
    """The one that is asked for, with the number of layers that the output has; the weights are the same."""
    for seed, name in enumerate(("base", "a", "b")):
        marked(tmp_path / name, seed)
    said = recipe(tmp_path, **({"config": config} if config else {}))
    assert config_folder(said) is None
    from_recipe(said).save(tmp_path / "out", config=config_folder(said))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mark"] == want
    assert written["num_hidden_layers"] == 4
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == want
    from_recipe(recipe(tmp_path)).save(tmp_path / "plain")
    got, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[name], value) for name, value in plain.items())
    live, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert len(live.model.layers) == 4


def test_a_quantised_models_config_beside_slices(tmp_path: Path) -> None:
    """What it says of codes does not hold for the output."""
    for seed, name in enumerate(("base", "a", "b")):
        marked(tmp_path / name, seed, hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)
    case = CASES["fp8, a scale a block"]
    stored = load_file(tmp_path / "b" / "model.safetensors")
    for number, name in enumerate([name for name in stored if name.endswith("_proj.weight")]):
        stored |= case(name, tuple(stored[name].shape), number)[0]
    save_file(stored, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"quantization_config": case.config}))
    from_recipe(recipe(tmp_path, config="second")).save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mark"] == "b"
    assert "quantization_config" not in written


def test_a_config_that_is_no_models(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        marked(tmp_path / name, seed)
    with pytest.raises(RecipeError, match=r"config: must be `base` or a model. Got 'secnod'. Did you mean 'second'\?"):
        from_recipe(recipe(tmp_path, config="secnod"))


def test_the_config_of_a_model_of_another_depth(tmp_path: Path) -> None:
    marked(tmp_path / "base", 0)
    marked(tmp_path / "a", 1)
    marked(tmp_path / "b", 2, num_hidden_layers=5)
    with pytest.raises(
        RecipeError,
        match=r"config: second has 5 layers in 'model.layers' and .*base.*, 3: take the config of a model of the same depth",
    ):
        from_recipe(recipe(tmp_path, config="second"))


# Tied heads


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_head_that_no_word_ties_is_missing(tmp_path: Path, method: str) -> None:
    """A config that says that the head is a tensor of its own, and a file without it: the embedding does not stand for it."""
    dense(tmp_path / "a", "llama", 0)
    dense(tmp_path / "b", "llama", 1)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    base = "base_model: a\n" if method == "task_arithmetic" else ""
    file = tmp_path / "recipe.yml"
    other = "" if base else "- {model: a, parameters: {weight: 0.5}}\n"
    models = f"models:\n{other}- {{model: b, parameters: {{weight: 0.5}}}}\n"
    file.write_text(f"merge_method: {method}\n{base}{models}")
    with pytest.raises(RecipeError, match=r"b lacks 1 tensors that a has: lm_head.weight"):
        from_recipe(load(file))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    got = from_recipe(load(file)).state_dict()["lm_head.weight"]
    head = thetau.open(tmp_path / "a").state_dict()["lm_head.weight"]
    torch.testing.assert_close(got, head * 0.5 + 0.5 * stored["model.embed_tokens.weight"], rtol=1e-6, atol=1e-6)
