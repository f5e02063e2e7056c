"""Recipes in mergekit's format: what they say, what comes out, and every error with its place in the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import thetau
from foreign import HIDDEN, VOCABULARY, Ended, Tensors, close, entry, keep, merged, problems, weights, written
from thetau.engine.executor import Engine
from thetau.engine.planning import plan
from thetau.errors import RecipeError
from thetau.facade import complete, from_recipe
from thetau.recipes import MergekitRecipe, load

# What parameters mean.


def test_a_gradient_is_spread_over_the_layers_and_filters_are_asked_in_order(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, states = llamas
    weight = [{"filter": "self_attn", "value": [0.0, 0.6, 0.3]}, {"filter": r"down_proj\.w.*t$", "value": 0.9}, {"value": 0.2}]
    got = merged(
        folder,
        {"merge_method": "task_arithmetic", "base_model": "base", "models": [entry("a", weight=weight)], "dtype": "float32"},
    )
    at_depth = [0.0, 0.4, 0.5, 0.3]  # of 0, 0.6, 0.3 at thirds of the way
    for name, tensor in got.items():
        factor = 0.2
        if "self_attn" in name:
            factor = at_depth[int(name.split(".")[2])]
        elif "down_proj" in name:
            factor = 0.9
        close(tensor, states["base"][name] + factor * (states["a"][name] - states["base"][name]))


def test_parameters_count_at_the_nearest_level(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, states = llamas
    sources = [{"model": m, "layer_range": [0, 2]} for m in ("base", "a")]
    late = [
        {"model": "base", "layer_range": [2, 4]},
        {"model": "a", "layer_range": [2, 4], "parameters": {"weight": 3.0}},
        {"model": "b", "layer_range": [2, 4]},
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": sources, "parameters": {"weight": 2.0}}, {"sources": late}],
        "parameters": {"weight": 1.0, "lambda": 0.5},
    }
    got = merged(folder, recipe)
    base, a, b = (states[name] for name in ("base", "a", "b"))
    for name, tensor in got.items():
        first = name.startswith(("model.embed", "model.layers.0", "model.layers.1"))
        delta = 2 * (a[name] - base[name]) if first else 3 * (a[name] - base[name]) + (b[name] - base[name])
        close(tensor, base[name] + 0.5 * delta)


def test_a_plain_recipe_runs_from_the_command_line_and_is_recorded(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, states = llamas
    recipe = written(
        folder,
        {
            "merge_method": "linear",
            "models": [entry("a", weight=3), entry("b", weight=1)],
            "dtype": "bfloat16",
            "out_dtype": "float32",
        },
    )
    done = command("merge", str(recipe), "-o", str(tmp_path / "out"), "--seed", "7")
    assert done.exit_code == 0, done.output
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in out.items():
        close(tensor, 0.75 * states["a"][name] + 0.25 * states["b"][name])
    record = json.loads((tmp_path / "out" / "thetau.json").read_text())
    assert record["recipe"]["mergekit"][0]["merge_method"] == "linear"
    assert record["seed"] == record["recipe"]["seed"] == 7
    assert {Path(one["path"]).name for one in record["inputs"]} == {"a", "b"}
    assert command("verify", str(tmp_path / "out"), "--again").exit_code == 0
    assert command("verify", str(tmp_path / "out"), "--recipe", str(recipe)).exit_code == 1, "another seed"
    assert "recipe: `seed`" in command("verify", str(tmp_path / "out"), "--recipe", str(recipe)).output
    dry = command("merge", str(recipe), "--dry-run")
    assert dry.exit_code == 0
    assert "merge and write" in dry.output


def test_options_that_the_recipe_says_itself_are_refused(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]]
) -> None:
    folder, _ = llamas
    recipe = written(folder, {"merge_method": "linear", "models": [entry("a", weight=1)]})
    done = command("merge", str(recipe), "--base", "base", "-o", str(folder / "never"))
    assert done.exit_code == 1
    assert "`--base` does not go with a recipe of mergekit's" in done.output
    assert command("merge", str(recipe), "--dtype", "bf16", "-o", str(folder / "never")).exit_code == 1
    kept = load(recipe)
    assert isinstance(kept, MergekitRecipe)
    assert complete(kept)["mergekit"] == [{"merge_method": "linear", "models": [entry("a", weight=1)]}]


# Layers.


def test_a_frankenmerge_takes_its_layers_one_after_another(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    """Depth up-scaling with scaled sub-blocks: layers twice, embeddings of the first slice, norm and head of the last one."""
    folder, states = llamas
    scaled = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "a", "layer_range": [1, 3], "parameters": scaled}]},
            {"sources": [{"model": "b", "layer_range": [3, 4]}]},
        ],
    }
    done = command("merge", str(written(folder, recipe)), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    got = load_file(tmp_path / "out" / "model.safetensors")
    origin = [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 1.0), ("a", 1, 0.5), ("a", 2, 0.5), ("b", 3, 1.0)]
    assert len(got) == 3 + 4 * len(origin)
    for layer, (model, number, share) in enumerate(origin):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
            factor = 1.0 if share == 1 or part not in ("self_attn.o_proj", "mlp.down_proj") else 0.0 if "o_proj" in part else 0.5
            want = factor * states[model][f"model.layers.{number}.{part}.weight"]
            assert torch.equal(got[f"model.layers.{layer}.{part}.weight"], want)
    assert torch.equal(got["model.embed_tokens.weight"], states["a"]["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], states["b"]["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [f"kind {number}" for _, number, _ in origin]
    assert command("verify", str(tmp_path / "out")).exit_code == 0


def test_slices_of_models_of_other_depths(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, states = llamas
    deep = weights(6, 9)
    deep |= {name: tensor for name, tensor in states["base"].items() if tensor.shape == deep[name].shape}
    if not (folder / "deep").exists():
        keep(folder / "deep", deep)
    recipe = {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [{"sources": [{"model": "base", "layer_range": [1, 3]}, {"model": "deep", "layer_range": [4, 6]}]}],
        "parameters": {"t": 0.0},
    }
    got = merged(folder, recipe)
    for layer in range(2):
        name = "self_attn.q_proj.weight"
        close(got[f"model.layers.{layer}.{name}"], states["base"][f"model.layers.{layer + 1}.{name}"])
    assert "model.layers.2.self_attn.q_proj.weight" not in got
    said = problems(folder, {**recipe, "slices": [{"sources": [{"model": m, "layer_range": [2, 6]} for m in ("base", "deep")]}]})
    assert said == ["line 5, column 5: base has 4 layers, 0 to 3. Got the range [2, 6]."] or "base has 4 layers" in said[0]
    whole = {"merge_method": "linear", "models": [entry("base", weight=1), entry("deep", weight=1)]}
    assert "different numbers of layers in 'model.layers': base 4, deep 6. Use `slices`." in problems(folder, whole)[0]


def test_the_same_model_twice_counts_twice_and_is_said(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    """mergekit keys its inputs by model, so that one of the two is lost."""
    folder, states = llamas
    recipe = {"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1), entry("a", weight=2)]}
    with pytest.warns(thetau.ThetauWarning, match=r"a stands twice; it counts twice\."):
        got = merged(folder, recipe)
    for name, tensor in got.items():
        close(tensor, 0.75 * states["a"][name] + 0.25 * states["b"][name])
    twice = {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]}],
        "parameters": {"weight": 1.0},
    }
    got = merged(folder, twice)
    name = "self_attn.q_proj.weight"
    close(got[f"model.layers.0.{name}"], (states["a"][f"model.layers.0.{name}"] + states["a"][f"model.layers.2.{name}"]) / 2)


def test_documents_build_on_one_another_without_an_intermediate_model(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, states = llamas
    text = """
name: halves
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
---
merge_method: task_arithmetic
base_model: base
models:
  - {model: halves, parameters: {weight: 0.5}}
  - {model: c, parameters: {weight: 0.5}}
"""
    done = command("merge", str(written(folder, text)), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        base, a, b, c = (states[one][name] for one in ("base", "a", "b", "c"))
        close(tensor, base + 0.5 * ((a + b) / 2 - base) + 0.5 * (c - base))
    assert command("verify", str(tmp_path / "out"), "--again").exit_code == 0
    circle = text.replace("model: a,", "model: end,").replace("---\n", "---\nname: end\n")
    assert "build on one another in a circle" in problems(folder, circle)[0]
    apart = text.replace("model: halves", "model: c")
    assert "several documents are results on which nothing builds" in problems(folder, apart)[0]


def test_aliases_are_written_out_and_bombs_refused(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, states = llamas
    text = "merge_method: linear\nmodels:\n  - {model: a, parameters: &same {weight: 1}}\n  - {model: b, parameters: *same}\n"
    name = "lm_head.weight"
    close(merged(folder, text)[name], (states["a"][name] + states["b"][name]) / 2)
    bomb = "merge_method: linear\nx0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 7)
    )
    with pytest.raises(RecipeError, match="at most 100000 values; aliases make more of it"):
        load(written(folder, bomb))


# Tied embeddings.


def test_one_model_has_a_head_of_its_own(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    """The base ties its head to the embedding and the other does not: the result has a head, and its config says so."""
    _, states = llamas
    base = {name: tensor for name, tensor in states["base"].items() if name != "lm_head.weight"}
    keep(tmp_path / "tied", base)
    keep(tmp_path / "own", states["a"])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "tied",
        "models": [entry("own", weight=0.5)],
    }
    done = command("merge", str(written(tmp_path, recipe)), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "'lm_head.weight' of its own" in done.output
    got = load_file(tmp_path / "out" / "model.safetensors")
    embedding = base["model.embed_tokens.weight"]
    close(got["lm_head.weight"], embedding + 0.5 * (states["a"]["lm_head.weight"] - embedding))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    turned = {"merge_method": "task_arithmetic", "base_model": "own", "models": [entry("tied", weight=0.5)]}
    got = merged(tmp_path, turned)
    close(got["lm_head.weight"], states["a"]["lm_head.weight"] + 0.5 * (embedding - states["a"]["lm_head.weight"]))


# What mergekit lets pass in silence.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_methd": "linear"}, "unknown key 'merge_methd'. Did you mean 'merge_method'?"),
        ({"parameters": {"wieght": 1.0}}, "line 6, column 3: unknown parameter 'wieght'. Did you mean 'weight'? linear knows:"),
        ({"merge_method": "tie"}, "line 1, column 1: unknown method 'tie'. Did you mean 'ties'?"),
        (
            {"parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"value": 2}]}, "models": [entry("a"), entry("b")]},
            "the filter 'self_atn' fits no tensor. Did you mean 'self_attn'?",
        ),
        ({"models": [entry("a"), entry("b")]}, "`weight` is missing for a: no level of the recipe gives it at this tensor."),
        (
            {"models": [entry("a", weight=1), entry("b", weight=-1)]},
            "the weights add up to 0, and `normalize` divides by their sum.",
        ),
        ({"parameters": {"weight": []}}, "a gradient needs at least one value. Got an empty list."),
        ({"parameters": {"weight": [0, "x"]}}, "a gradient has numbers, or none. Got [0, 'x']."),
        ({"parameters": {"normalize": 3}}, "`normalize` must be true or false. Got 3."),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "exactly one of `models`, `slices` and `modules`"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'. Did you mean 'bfloat16'?"),
        ({"merge_method": "slerp"}, "`slerp` needs a base: `base_model` is missing."),
        (
            {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}},
            "model.embed_tokens.weight and 18 other tensors: the method takes 1 model besides the base. Got 2: a, b.",
        ),
        ({"merge_method": "nuslerp", "models": [entry("a", weight=1)]}, "takes 2 models besides the base. Got 1: a."),
        ({"tokenizer_source": "base", "tokenizer": {"source": "union"}}, "`tokenizer` and `tokenizer_source` say the same"),
        ({"models": [{"model": "a", "layer_range": [0, 2]}]}, "unknown key 'layer_range'."),
    ],
)
def test_every_mistake_has_its_place(llamas: tuple[Path, dict[str, Tensors]], change: dict[str, Any], said: str) -> None:
    folder, _ = llamas
    recipe = {"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1)], "dtype": "float32", **change}
    if "merge_methd" in change or "merge_method" in change or "parameters" in change:
        recipe["models"] = change.get("models", [entry("a", weight=1), entry("b", weight=1)])
    text = yaml.safe_dump(recipe, sort_keys=False)
    if "merge_methd" in change or "wieght" in text:
        text = yaml.safe_dump({"merge_method": "linear", "dtype": "float32", "models": ["a"], **change}, sort_keys=False)
    found = problems(folder, text)
    assert any(said in one for one in found), found


def test_a_config_is_the_bases_or_the_first_models_and_what_differs_is_said(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    """mergekit takes the config of a model that hash order chooses where there is no base."""
    _, states = llamas
    keep(tmp_path / "first", states["a"], rope_theta=10000.0)
    keep(tmp_path / "second", states["b"], rope_theta=50000.0)
    for order in (("first", "second"), ("second", "first")):
        recipe = {"merge_method": "linear", "models": [entry(name, weight=1) for name in order]}
        done = command("merge", str(written(tmp_path, recipe)), "-o", str(tmp_path / f"out {order[0]}"))
        assert done.exit_code == 0, done.output
        config = json.loads((tmp_path / f"out {order[0]}" / "config.json").read_text())
        assert config["rope_theta"] == (10000.0 if order[0] == "first" else 50000.0)
        assert "its config differs from that of" in done.output
        assert "rope_theta:" in done.output


def test_models_of_another_architecture_are_refused_with_the_keys_that_differ(
    llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    _, states = llamas
    wide = {name: torch.cat([tensor, tensor]) if "q_proj" in name else tensor for name, tensor in states["a"].items()}
    keep(tmp_path / "wide", wide, num_attention_heads=16)
    keep(tmp_path / "base", states["base"], num_attention_heads=8)
    recipe = {"merge_method": "ties", "base_model": "base", "models": [entry("wide", weight=1)]}
    found = problems(tmp_path, recipe)
    assert "q_proj.weight (wide [16, 8], base [8, 8]) and 3 other tensors: the models have other shapes" in found[0]
    assert "num_attention_heads: " in found[0]
    less = {name: tensor for name, tensor in states["a"].items() if "o_proj" not in name}
    keep(tmp_path / "less", less)
    found = problems(tmp_path, {**recipe, "models": [entry("less", weight=1)]})
    assert "less lacks 4 tensors that base has: model.layers.0.self_attn.o_proj.weight" in found[0]
    grown = {name: torch.cat([t, t[:1]]) if t.shape == (VOCABULARY, HIDDEN) else t for name, t in states["a"].items()}
    keep(tmp_path / "grown", grown)
    found = problems(tmp_path, {**recipe, "models": [entry("grown", weight=1)]})
    assert "their vocabularies differ" in found[0]
    assert "tokenizer: {source: union}" in found[0]


def test_nan_in_a_model_is_refused_and_a_stranger_noticed(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    _, states = llamas
    keep(tmp_path / "base", states["base"])
    bad = {name: tensor.clone() for name, tensor in states["a"].items()}
    bad["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    keep(tmp_path / "bad", bad)
    keep(tmp_path / "stranger", weights(4, 77))
    for method, extra in (("linear", {}), ("slerp", {"t": 0.5}), ("passthrough", {}), ("ties", {"density": 0.5})):
        base = {"base_model": "base"} if method in ("slerp", "ties") else {}
        recipe = {
            "merge_method": method,
            **base,
            "models": [entry("bad", weight=1) if method in ("linear", "ties") else entry("bad")],
        }
        done = command("merge", str(written(tmp_path, {**recipe, "parameters": extra})), "-o", str(tmp_path / "out"))
        assert done.exit_code == 1, method
        assert "'model.layers.1.mlp.down_proj.weight' holds 1 NaN" in done.output, done.output
        assert not (tmp_path / "out").exists()
    recipe = {"merge_method": "slerp", "base_model": "base", "models": [entry("stranger")], "parameters": {"t": 0.5}}
    done = command("merge", str(written(tmp_path, recipe)), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0
    assert "stranger: lies 1.4" in done.output
    assert "They are probably not related." in done.output


@pytest.mark.parametrize(
    ("method", "models", "parameters"),
    [
        ("slerp", [entry("base"), entry("a")], {"t": 1.5}),
        ("nuslerp", [entry("a", weight=-1), entry("b", weight=3)], {}),
    ],
)
def test_an_arc_beyond_its_ends_is_allowed_and_said(
    method: str,
    models: list[Any],
    parameters: dict[str, Any],
    llamas: tuple[Path, dict[str, Tensors]],
    command: Callable[..., Ended],
    tmp_path: Path,
) -> None:
    folder, _ = llamas
    recipe = written(folder, {"merge_method": method, "base_model": "base", "models": models, "parameters": parameters})
    done = command("merge", str(recipe), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "t = 1.5 lies outside [0, 1]" in done.output
    recipe.write_text(recipe.read_text().replace("1.5", "0.5").replace("weight: -1", "weight: 1"))
    assert "outside [0, 1]" not in command("merge", str(recipe), "-o", str(tmp_path / "within")).output


def test_a_gradient_longer_than_its_layers_is_said(
    llamas: tuple[Path, dict[str, Tensors]], command: Callable[..., Ended], tmp_path: Path
) -> None:
    folder, _ = llamas
    for values, said in (([0, 1, 0, 1, 0], True), ([0, 1, 0, 1], False), ([0.5], False)):
        models = [entry("a", weight=values)]
        recipe = written(folder, {"merge_method": "task_arithmetic", "base_model": "base", "models": models})
        done = command("merge", str(recipe), "-o", str(tmp_path / f"out {len(values)}"))
        assert done.exit_code == 0, done.output
        assert ("a gradient of 5 values is spread over 4 layers" in done.output) is said


def test_what_means_nothing_to_a_method_is_said(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, _ = llamas
    recipe = {
        "merge_method": "linear",
        "models": [entry("a", weight=1, normalize=False), entry("b", weight=1)],
        "parameters": {"int8_mask": True},
    }
    done = command("merge", str(written(folder, recipe)), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "`int8_mask` means nothing to linear, there as here." in done.output
    assert "`normalize` is a setting of the whole merge; under a model it has no effect." in done.output


# Cost.


def test_the_plan_is_the_loops_and_reads_each_input_once(llamas: tuple[Path, dict[str, Tensors]]) -> None:
    folder, states = llamas
    size = sum(tensor.nbytes for tensor in states["base"].values())
    recipe = {"merge_method": "ties", "base_model": "base", "models": [entry(n, weight=1, density=0.5) for n in "abc"]}
    walks = plan(from_recipe(load(written(folder, recipe))), engine=Engine()).passes
    assert sum(step.read for step in walks[-1].steps) == 4 * size
    layered = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}]}
    walks = plan(from_recipe(load(written(folder, layered))), engine=Engine()).passes
    assert [sum(step.read for step in walk.steps) for walk in walks] == [size]


def test_the_same_bits_from_any_workers_resumed_and_in_memory(
    command: Callable[..., Ended], llamas: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, _ = llamas
    recipe = written(
        folder,
        {
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": [entry("a", weight=0.5, density=[0.3, 0.8]), entry("b", weight=0.5, density=0.5)],
        },
    )
    expression = from_recipe(load(recipe), engine=Engine(workers=1))
    want = expression.state_dict(engine=Engine(workers=1))
    from_recipe(load(recipe)).save(tmp_path / "out", engine=Engine(workers=2))
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    again = command("merge", str(recipe), "-o", str(tmp_path / "again"), "--resume")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes()[-64:] == (tmp_path / "out" / "model.safetensors").read_bytes()[
        -64:
    ]
