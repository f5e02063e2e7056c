"""Recipes of mergekit's on tiny models of every family: gradients over layers, depth changes and towers against plain torch.

What is expected here comes from live models: the layers are the module list as long as the config says, and what stands before or after
them is what runs before or after them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from families import FAMILIES, TOWERS
from thetau.facade import from_recipe
from thetau.recipes import MergekitRecipe, load
from tiny import one_thread  # noqa: F401

ALL = {**FAMILIES, **TOWERS}
State = dict[str, Tensor]
DEPTH = 3


@dataclass(frozen=True)
class Live:
    """A model's folder and what transformers makes of it."""

    folder: Path
    model: nn.Module

    @cached_property
    def state(self) -> State:
        return self.model.state_dict()

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return found


Pair = Callable[[str], tuple[Live, Live]]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two models of a family, made once."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known: dict[str, tuple[Live, Live]] = {}

    def made(key: str) -> tuple[Live, Live]:
        if key not in known:
            folder = tmp_path_factory.mktemp(key)
            known[key] = (make(key, folder / "a", 1), make(key, folder / "b", 2))
        return known[key]

    return made


def make(key: str, folder: Path, seed: int, **changes: Any) -> Live:
    """A random model, its norms and biases too, and a little of it by the seed: models of one family are relatives."""
    model_class, config_class, values = ALL[key]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**values, **changes}))
        for scale, number in ((0.05, 0), (0.005, seed)):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return Live(folder, model.eval())


def opened(folder: Path) -> nn.Module:
    """The live model of a folder, which must hold its tensors and no others."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def merge(content: Mapping[str, Any], folder: Path, out: str = "out", **given: Any) -> Path:
    """Run a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    loaded = load(file)
    assert isinstance(loaded, MergekitRecipe)
    recipe = replace(loaded, **given)
    from_recipe(recipe).save(folder / out, dtype=recipe.dtype)
    return folder / out


def layer_lists(model: nn.Module, depth: int = 3) -> list[str]:
    """Names of the module lists that are as long as a tower, outer ones."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def depth_of(name: str, lists: list[str], depth: int = 3) -> float:
    """t of a tensor: from 0 to 1 over the layers, 0 elsewhere."""
    for container in lists:
        if name.startswith(f"{container}."):
            return int(name.removeprefix(f"{container}.").split(".")[0]) / (depth - 1)
    return 0.0


def close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor.to(got[name].dtype), rtol=2e-6, atol=2e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def recipe_of(a: Live, b: Live) -> dict[str, Any]:
    """A mean whose weights change over the layers; those at the first, middle and last one are `SHARES` of a."""
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(a.folder), "parameters": {"weight": list(SHARES.values())}},
            {"model": str(b.folder), "parameters": {"weight": [1 - share for share in SHARES.values()]}},
        ],
        "dtype": "float32",
    }


SHARES = {0.0: 0.9, 0.5: 0.2, 1.0: 0.4}


def mean(one: Tensor, other: Tensor, t: float) -> Tensor:
    """What such a recipe makes of two tensors."""
    return SHARES[t] * one.double() + (1 - SHARES[t]) * other.double() if one.is_floating_point() else one


@pytest.mark.parametrize("key", ALL)
def test_a_gradient_over_layers(key: str, pair: Pair, tmp_path: Path) -> None:
    a, b = pair(key)
    got = opened(merge(recipe_of(a, b), tmp_path))
    lists = layer_lists(a.model)
    assert lists
    want = {name: mean(tensor, b.state[name], depth_of(name, lists)) for name, tensor in a.state.items()}
    close(got.state_dict(), want)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """What a forward pass takes."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
    return {"input_ids": torch.tensor([[5, 9, 3, 7, 11, 4]])}


def run(model: nn.Module) -> Tensor:
    """The output of a model, logits or hidden states."""
    with torch.no_grad():
        return model(**inputs_of(model), return_dict=True)[0]


def before_the_layers(model: nn.Module, container: str) -> set[str]:
    """The parameters outside the layers that a forward pass comes by before the first layer."""
    seen: set[str] = set()
    inside = [False]
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules(remove_duplicate=False)}

    def hook(module: nn.Module, _: Any) -> None:
        if module is model.get_submodule(f"{container}.0"):
            inside[0] = True
        if not inside[0]:
            seen.update(prefixes[id(module)] + name for name, _ in module.named_parameters(recurse=False))

    handles = [module.register_forward_pre_hook(hook) for module in model.modules()]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


ORIGIN = [0, 1, 1, 2]  # layers [0, 2] of a, then [1, 3] of b


def deeper(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The config of that arrangement, by hand: the count, and the entries of this family that are said layer by layer."""
    listed = {name: [config[name][layer] for layer in ORIGIN] for name in ("layer_types", "no_rope_layers") if config.get(name)}
    numbers = {"llama4-text": {"moe_layers": [1, 2]}}.get(key, {})
    count = next(name for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config)
    return {**config, **listed, **numbers, count: len(ORIGIN)}


@pytest.mark.parametrize("key", FAMILIES)
def test_layers_of_two_models_one_after_the_other(key: str, pair: Pair, tmp_path: Path) -> None:
    a, b = pair(key)
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(a.folder), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(b.folder), "layer_range": [1, 3]}]},
        ],
        "dtype": "float32",
    }
    out = merge(recipe, tmp_path)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config == deeper(a.config, key)
    got = opened(out)
    (container,) = layer_lists(a.model)
    before = before_the_layers(a.model, container)
    tied = {a.state[name].data_ptr() for name in before}
    want = {
        name: (a if value.data_ptr() in tied else b).state[name]
        for name, value in a.state.items()
        if not name.startswith(f"{container}.")
    }
    for place, (layer, source) in enumerate(zip(ORIGIN, (a, a, b, b), strict=True)):
        start = f"{container}.{layer}."
        want |= {
            f"{container}.{place}.{name.removeprefix(start)}": value
            for name, value in source.state.items()
            if name.startswith(start)
        }
    plain = type(a.model)(type(a.model.config).from_pretrained(out)).eval()
    plain.load_state_dict(want)
    close(got.state_dict(), plain.state_dict())
    torch.testing.assert_close(run(got), run(plain), rtol=1e-5, atol=1e-6)
