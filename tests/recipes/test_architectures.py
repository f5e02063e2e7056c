"""Recipes of mergekit's on tiny models of every family: gradients over layers, depth changes and towers against plain torch.

What is expected here comes from live models: the layers are the module list as long as the config says, and what stands before or after
them is what runs before or after them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
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
Pair = Callable[[str], tuple[Path, Path]]
State = dict[str, Tensor]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two models of a family, made once."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known: dict[str, tuple[Path, Path]] = {}

    def made(key: str) -> tuple[Path, Path]:
        if key not in known:
            folder = tmp_path_factory.mktemp(key)
            known[key] = (make(key, folder / "a", 1), make(key, folder / "b", 2))
        return known[key]

    return made


def make(key: str, folder: Path, seed: int, **changes: Any) -> Path:
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
    return folder


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
        torch.testing.assert_close(got[name], tensor.to(got[name].dtype), rtol=2e-6, atol=2e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("key", ALL)
def test_a_gradient_over_layers(key: str, pair: Pair, tmp_path: Path) -> None:
    a, b = pair(key)
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(a), "parameters": {"weight": [0.9, 0.2, 0.4]}},
            {"model": str(b), "parameters": {"weight": [0.1, 0.8, 0.6]}},
        ],
        "dtype": "float32",
    }
    got = opened(merge(recipe, tmp_path))
    one, other = opened(a).state_dict(), opened(b).state_dict()
    lists = layer_lists(got)
    assert lists
    want = {}
    for name, tensor in one.items():
        weight = {0.0: 0.9, 0.5: 0.2, 1.0: 0.4}[depth_of(name, lists)]
        want[name] = (weight * tensor.double() + (1 - weight) * other[name].double()) if tensor.is_floating_point() else tensor
    close(got.state_dict(), want)
