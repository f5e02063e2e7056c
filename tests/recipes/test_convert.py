"""Recipes of ours with slices, towers and vocabularies, and those that are made of mergekit's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from foreign import HIDDEN, Ended, Tensors, close, entry, keep, weights, written
from thetau.errors import RecipeError
from thetau.facade import from_recipe
from thetau.recipes import MergekitRecipe, from_mapping, load
from thetau.recipes.mergekit.convert import convert

FILTERED = [{"filter": "self_attn", "value": [0.1, 0.6, 0.3]}, {"filter": "norm", "value": 0.9}, {"value": 0.2}]
THREE = [
    entry("a", weight=FILTERED, density=[0.2, 0.9]),
    entry("b", weight=0.7, density=0.5),
    entry("c", weight=[1, 0], density=0.4),
]
BASED = {"base_model": "base", "dtype": "float32"}
CASES: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", **BASED, "models": THREE},
    "dare_ties": {"merge_method": "dare_ties", **BASED, "models": THREE},
    "della_linear": {
        "merge_method": "della_linear",
        **BASED,
        "models": [entry("a", weight=0.5, density=0.5, epsilon=[0.1, 0.2])],
    },
    "breadcrumbs": {"merge_method": "breadcrumbs", **BASED, "models": THREE, "parameters": {"gamma": 0.05}},
    "slerp": {"merge_method": "slerp", **BASED, "models": [entry("a")], "parameters": {"t": FILTERED}},
    "linear": {"merge_method": "linear", "models": [entry("a", weight=FILTERED), entry("b", weight=0.3)]},
    "nuslerp": {"merge_method": "nuslerp", **BASED, "models": [entry("a", weight=FILTERED), entry("b", weight=0.3)]},
    "karcher": {"merge_method": "karcher", "models": [entry("a"), entry("b"), entry("c")]},
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4], "parameters": {"scale": FILTERED}}]},
        ],
    },
    "slices": {
        "merge_method": "ties",
        **BASED,
        "slices": [
            {"sources": [{"model": m, "layer_range": [i, i + 2]} for i, m in enumerate(("base", "a", "b"))]},
            {"sources": [{"model": m, "layer_range": [2, 4]} for m in ("base", "b")]},
        ],
        "parameters": {"weight": [0.2, 0.8], "density": 0.6},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_converted_recipe_gives_the_same_bits(
    llamas: tuple[Path, dict[str, Tensors]], name: str, command: Callable[..., Ended]
) -> None:
    folder, _ = llamas
    theirs = written(folder, CASES[name])
    ours = folder / f"{name}.yaml"
    ours.unlink(missing_ok=True)
    done = command("convert", str(theirs), "-o", str(ours))
    assert done.exit_code == 0, done.output
    got, want = from_recipe(load(ours)).state_dict(), from_recipe(load(theirs)).state_dict()
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[one], tensor) for one, tensor in want.items())
    assert "method" in yaml.safe_load(ours.read_text())


def test_what_ours_cannot_say_is_named(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, _ = llamas

    def refused(recipe: Mapping[str, Any] | str) -> str:
        loaded = load(written(folder, recipe))
        assert isinstance(loaded, MergekitRecipe)
        with pytest.raises(RecipeError) as caught:
            convert(loaded)
        return str(caught.value)

    switched = {"merge_method": "ties", **BASED, "models": [entry("a", weight=1)], "parameters": {"normalize": [True, False]}}
    assert "`normalise` differs between tensors, and ours cannot vary it so" in refused(switched)
    spread = {"merge_method": "ram", **BASED, "models": ["a", "b"], "parameters": {"epsilon": [0, 0.1]}}
    assert "`epsilon` differs between tensors, and `ram` of ours has one for all." in refused(spread)
    own = {
        "merge_method": "task_arithmetic",
        **BASED,
        "slices": [
            {"base_model": "c", "sources": [{"model": m, "layer_range": [0, 2]} for m in ("c", "a")]},
        ],
        "parameters": {"weight": 1.0},
    }
    assert "a slice has a base of its own" in refused(own)
    two = "name: one\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n---\nmerge_method: passthrough\nmodels: [one]\n"
    assert "it holds 2 documents that build on one another" in refused(two)


def test_adapters_over_other_models_convert(
    llamas: tuple[Path, dict[str, Tensors]], command: Callable[..., Ended], tmp_path: Path
) -> None:
    folder, states = llamas
    adapter(tmp_path / "lora")
    recipe = {
        "merge_method": "linear",
        "models": [entry(f"{folder / 'a'}+{tmp_path / 'lora'}", weight=1), entry(str(folder / "b"), weight=1)],
    }
    theirs = written(tmp_path, recipe)
    done = command("convert", str(theirs), "-o", str(tmp_path / "ours.yaml"))
    assert done.exit_code == 0, done.output
    got, want = from_recipe(load(tmp_path / "ours.yaml")).state_dict(), from_recipe(load(theirs)).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(want[name], (states["a"][name] + states["b"][name]) / 2), "the adapter counts"


def adapter(folder: Path) -> None:
    """A LoRA of rank two over the first layer's q_proj."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (2, HIDDEN), "lora_B": (HIDDEN, 2)}
    save_file(
        {f"{name}.{part}.weight": 0.1 * torch.randn(shape, generator=generator) for part, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "a"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_our_methods_take_slices_of_layers(
    llamas: tuple[Path, dict[str, Tensors]], command: Callable[..., Ended], tmp_path: Path
) -> None:
    """A whole-vector TIES over the layers that were taken; values by task hold where the task is."""
    folder, states = llamas
    content = {
        "base": str(folder / "base"),
        "models": [{"path": str(folder / name), "name": name} for name in "ab"],
        "method": {"name": "task_arithmetic", "scale": {"per_task": {"a": 0.5, "b": 0.25}}},
        "slices": [
            {"sources": [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 2]}]},
            {"sources": [{"model": "b", "layers": [1, 3]}], "base_layers": [2, 4]},
        ],
    }
    got = from_recipe(from_mapping(content)).state_dict()
    base, a, b = (states[name] for name in ("base", "a", "b"))
    for name, tensor in got.items():
        words = name.split(".")
        if words[1] == "layers" and int(words[2]) >= 2:
            under = name
            over = name.replace(f"layers.{words[2]}", f"layers.{int(words[2]) - 1}")
            close(tensor, base[under] + 0.25 * (b[over] - base[under]))
        elif name in ("model.norm.weight", "lm_head.weight"):
            close(tensor, base[name] + 0.25 * (b[name] - base[name]))
        else:
            close(tensor, base[name] + 0.5 * (a[name] - base[name]) + 0.25 * (b[name] - base[name]))
    recipe = tmp_path / "ours.yaml"
    recipe.write_text(yaml.safe_dump(content))
    done = command("merge", str(recipe), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert command("verify", str(tmp_path / "out"), "--again").exit_code == 0


def test_wrong_arrangements_are_refused_together(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, _ = llamas
    content: dict[str, Any] = {
        "base": str(folder / "base"),
        "models": [str(folder / "a")],
        "method": "ties",
        "slices": [
            {"sources": [{"model": "a", "layers": [2, 2]}]},
            {"sources": [{"model": "a", "layers": [0, 2]}], "base_layers": [0, 3]},
        ],
        "output": "vector",
        "modules": {"text": [{"sources": [{"model": "a", "layers": [0, 1]}]}]},
    }
    with pytest.raises(RecipeError) as caught:
        from_mapping(content)
    for part in (
        "slices: a recipe has `slices` or `modules`, not both.",
        "output: a model whose layers or rows are moved has no task vector",
        "slices.0: layers are [first, end]",
        "slices.1: its sources must have equally many layers. Got [[0, 2], [0, 3]].",
    ):
        assert any(part in problem for problem in caught.value.problems), part
    content = {**content, "output": "model", "modules": {}, "slices": [{"sources": [{"model": "aa", "layers": [0, 1]}]}]}
    with pytest.raises(RecipeError, match=r"no model is called 'aa'\. Did you mean 'a'"):
        from_recipe(from_mapping(content))
    content["slices"] = [{"sources": [{"model": "a", "layers": [0, 2]}]}]
    with pytest.raises(RecipeError, match=r"method\.scale: the pattern 'model\.layers\.3\.\*' matches no tensor"):
        from_recipe(
            from_mapping({**content, "method": {"name": "ties", "scale": {"per_pattern": {"model.layers.3.*": 1, "*": 2}}}})
        )
    content["slices"] = [{"sources": [{"model": "a", "layers": [3, 5]}]}]
    with pytest.raises(RecipeError, match=r"a has 4 layers, 0 to 3\. Got the range \[3, 5\]\."):
        from_recipe(from_mapping(content))


def test_a_recipe_without_a_base(llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path, command: Callable[..., Ended]) -> None:
    """Methods over models need none: names, dtypes and config are the first model's."""
    folder, states = llamas
    content = {
        "models": [str(folder / "a"), str(folder / "b")],
        "method": {"name": "linear", "weights": {"per_task": {"a": 3, "b": 1}}},
    }
    for name, tensor in from_recipe(from_mapping(content)).state_dict().items():
        close(tensor, 0.75 * states["a"][name] + 0.25 * states["b"][name])
    with pytest.raises(RecipeError, match="base is missing"):
        from_mapping({**content, "method": "ties"})
    assert keep(tmp_path / "x", weights(2, 1)).exists()
