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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import FAMILIES, TOWERS
from foreign import written
from thetau.errors import RecipeError, ThetauError
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


def test_layers_whose_kind_goes_by_their_number(pair: Pair, tmp_path: Path) -> None:
    """Older configs give a rule in place of a list: what falls out of step is said."""
    live, _ = pair("gemma2")
    config = {name: value for name, value in live.config.items() if name != "layer_types"}
    a = with_tensors(live, tmp_path / "a", {})
    (a.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def slices(*ranges: list[int]) -> dict[str, Any]:
        return {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": str(a.folder), "layer_range": one}]} for one in ranges],
        }

    source = from_recipe(load(written(tmp_path, slices([0, 2], [1, 3])))).terms[0][1]
    assert any("gives layers their kind by their number (`model_type: gemma2`)" in said for said in source.warnings(None))
    merge(slices([0, 2], [0, 3]), tmp_path, "in_step")


def test_kinds_of_layers_that_cannot_be_said(pair: Pair, tmp_path: Path) -> None:
    """DeepSeek's first layers are dense, so many of them: no dense one can stand behind another kind."""
    a, _ = pair("deepseek-v3")
    slices = [{"sources": [{"model": str(a.folder), "layer_range": one}]} for one in ([1, 3], [0, 1])]
    with pytest.raises(ThetauError, match=r"`first_k_dense_replace: 1` says that the first layers are of another kind"):
        merge({"merge_method": "passthrough", "slices": slices}, tmp_path)
    out = merge({"merge_method": "passthrough", "slices": slices[:1]}, tmp_path)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (2, 0)
    opened(out)


# Several towers.

TEXT_END = ("model.language_model.norm.", "lm_head.")
# mergekit's name of a tower, its layers in the live model, the config's entry, and what of the tower comes after the layers
MODULES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "t5": ("encoder", "encoder.block", "num_layers", ("encoder.final_layer_norm.",)),
    "t5-tied": ("decoder", "decoder.block", "num_decoder_layers", ("decoder.final_layer_norm.",)),
    "bart": ("decoder", "model.decoder.layers", "decoder_layers", ()),
    "whisper": ("encoder", "model.encoder.layers", "encoder_layers", ("model.encoder.layer_norm.",)),
    "clip": (
        "text_model",
        "text_model.encoder.layers",
        "text_config.num_hidden_layers",
        ("text_model.final_layer_norm.", "text_projection.", "logit_scale"),
    ),
    "siglip": (
        "vision_model",
        "vision_model.encoder.layers",
        "vision_config.num_hidden_layers",
        ("vision_model.post_layernorm.", "vision_model.head."),
    ),
    "gemma3-vl": (
        "text_decoder",
        "model.language_model.layers",
        "text_config.num_hidden_layers",
        TEXT_END[:1],
    ),  # its head is tied
    "qwen2-vl": ("text_decoder", "model.language_model.layers", "text_config.num_hidden_layers", TEXT_END),
    "qwen2.5-vl": ("vision_tower", "model.visual.blocks", "vision_config.depth", ()),
    "qwen3-vl": ("text_decoder", "model.language_model.layers", "text_config.num_hidden_layers", TEXT_END),
    "llava": ("text_decoder", "model.language_model.layers", "text_config.num_hidden_layers", TEXT_END),
    "mistral3": ("vision_tower", "model.vision_tower.transformer.layers", "vision_config.num_hidden_layers", ()),
}


@pytest.mark.parametrize("key", TOWERS)
def test_one_tower_is_cut_and_the_others_stay(key: str, pair: Pair, tmp_path: Path) -> None:
    a, b = pair(key)
    module, container, entry, after = MODULES[key]
    slices = [
        {"sources": [{"model": str(a.folder), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(b.folder), "layer_range": [1, 3]}]},
    ]
    out = merge({"merge_method": "passthrough", "modules": {module: {"slices": slices}}, "dtype": "float32"}, tmp_path)
    got = opened(out)
    *tables, count = entry.split(".")
    was, config = a.config, json.loads((out / "config.json").read_text(encoding="utf-8"))
    for table in tables:
        was, config = was[table], config[table]
    assert config[count] == len(ORIGIN)
    if "layer_types" in config:
        assert config["layer_types"] == [was["layer_types"][layer] for layer in ORIGIN]
    if key == "qwen2.5-vl":
        assert config["fullatt_block_indexes"] == [1, 2]
    state = got.state_dict()
    first_only = [name for name in a.state if "relative_attention_bias" in name]
    for place, (layer, source) in enumerate(zip(ORIGIN, (a, a, b, b), strict=True)):
        start = f"{container}.{layer}."
        for name, value in source.state.items():
            if name.startswith(start) and name not in first_only:
                assert torch.equal(state.pop(f"{container}.{place}.{name.removeprefix(start)}"), value), name
    for name, value in state.items():
        assert torch.equal(value, (b if name.startswith(after) else a).state[name]), name


def test_each_tower_has_its_own_gradient(pair: Pair, tmp_path: Path) -> None:
    a, b = pair("whisper")
    recipe = recipe_of(a, b)
    models, module = recipe.pop("models"), {"parameters": {"weight": 1.0}}
    even = [{"model": one["model"], **module} for one in models]
    modules = {"encoder": {"models": models}, "decoder": {"models": even}}
    got = opened(merge({**recipe, "modules": modules}, tmp_path))
    lists = layer_lists(a.model)
    want = {}
    for name, value in a.state.items():
        if name.startswith("model.encoder."):
            want[name] = mean(value, b.state[name], depth_of(name, lists))
        else:
            want[name] = (value.double() + b.state[name].double()) / 2
    close(got.state_dict(), want)


@pytest.mark.parametrize("named", [False, True])
def test_a_text_model_into_the_text_tower_of_another(named: bool, pair: Pair, tmp_path: Path) -> None:
    """`model.layers…` against `model.language_model.layers…`, as saved: the tower for images stays, and its bridge."""
    whole, _ = pair("gemma3-vl")
    text_config = whole.model.config.text_config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        text = transformers.Gemma3ForCausalLM(text_config)
        inner = whole.model.model.language_model.state_dict()
        text.model.load_state_dict({name: value + 0.005 * torch.randn_like(value) for name, value in inner.items()})
    text.save_pretrained(tmp_path / "text")
    models = [
        {"model": str(whole.folder), "parameters": {"weight": list(SHARES.values())}},
        {"model": str(tmp_path / "text"), "parameters": {"weight": [1 - share for share in SHARES.values()]}},
    ]
    form: dict[str, Any] = {"modules": {"text_decoder": {"models": models}}} if named else {"models": models}
    recipe = {"merge_method": "linear", **form, "dtype": "float32"}
    if named:
        got = opened(merge(recipe, tmp_path))
    else:
        with pytest.warns(UserWarning, match=r"text has no '.*vision_tower.*', 'multi_modal_projector': they stay as in a"):
            got = opened(merge(recipe, tmp_path))
    lists = layer_lists(whole.model)
    theirs = text.state_dict()
    want = {}
    for name, value in whole.state.items():
        other = theirs.get(name.replace("model.language_model.", "model."))
        want[name] = value if other is None else mean(value, other, depth_of(name, lists))
    close(got.state_dict(), want)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("key", "prefix"), [("gpt2", "transformer."), ("bert-classifier", "bert."), ("mamba", "backbone.")])
def test_a_model_whose_names_lack_the_leading_word(key: str, prefix: str, turned: bool, pair: Pair, tmp_path: Path) -> None:
    """`h.0…` against `transformer.h.0…`, `encoder.layer.0…` against `bert.encoder.layer.0…`, without a head."""
    a, b = pair(key)
    bare = tmp_path / "bare"
    bare.mkdir()
    state = {name.removeprefix(prefix): value for name, value in state_of(b.folder).items() if name.startswith(prefix)}
    save_file(state, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_text(json.dumps(b.config), encoding="utf-8")
    pairs = (replace(b, folder=bare), a) if turned else (a, replace(b, folder=bare))
    got = state_of(merge(recipe_of(*pairs), tmp_path, exclude=("classifier.*",) if key == "bert-classifier" else ()))
    one, other = state_of(a.folder), state_of(b.folder)
    lists = layer_lists(a.model)
    shared = {name for name in one if name.startswith(prefix)}
    first, second = (other, one) if turned else (one, other)
    want = {name: mean(first[name], second[name], depth_of(name, lists)) for name in shared}
    if turned:
        want = {name.removeprefix(prefix): value for name, value in want.items()}
    else:
        want |= {name: one[name] for name in set(one) - shared}  # the head stays
    close(got, want)


# What mergekit leaves out without a word.


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def with_tensors(model: Live, folder: Path, more: Mapping[str, Tensor], **config: Any) -> Live:
    """A copy of a stored model with further tensors."""
    folder.mkdir()
    save_file({**state_of(model.folder), **more}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**model.config, **config}), encoding="utf-8")
    return Live(folder, model.model)


def further(seed: int, layer: int = DEPTH) -> State:
    """A head for a further token as DeepSeek and GLM store it: a layer behind the last one, with an embedding and a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "eh_proj.weight": (16, 32),
        "enorm.weight": (16,),
        "embed_tokens.weight": (40, 16),
        "mlp.up_proj.weight": (24, 16),
        "shared_head.head.weight": (40, 16),
        "shared_head.norm.weight": (16,),
    }
    common = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{layer}.{name}": 0.05 * torch.randn(shape, generator=common)
        + 0.005 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def test_heads_for_further_tokens_are_merged_and_are_no_layers(pair: Pair, tmp_path: Path) -> None:
    a, b = (
        with_tensors(one, tmp_path / name, further(seed)) for one, name, seed in zip(pair("llama"), "ab", (1, 2), strict=True)
    )
    got = state_of(merge(recipe_of(a, b), tmp_path))
    one, other = state_of(a.folder), state_of(b.folder)
    lists = [f"model.layers.{layer}" for layer in range(DEPTH)]
    close(got, {name: mean(value, other[name], in_layers(name, lists)) for name, value in one.items()})


def in_layers(name: str, lists: list[str]) -> float:
    return next((number / (len(lists) - 1) for number, start in enumerate(lists) if name.startswith(f"{start}.")), 0.0)


def test_heads_for_further_tokens_stay_behind_the_last_layer(pair: Pair, tmp_path: Path) -> None:
    a = with_tensors(pair("llama")[0], tmp_path / "a", further(1))
    slices = [
        {"sources": [{"model": str(a.folder), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(a.folder), "layer_range": [1, 3]}]},
    ]
    out = merge({"merge_method": "passthrough", "slices": slices}, tmp_path)
    got = state_of(out)
    for name, value in further(1, 4).items():
        assert torch.equal(got.pop(name), value)
    assert torch.equal(got["model.layers.3.mlp.up_proj.weight"], state_of(a.folder)["model.layers.2.mlp.up_proj.weight"])
    assert {name.split(".")[2] for name in got if name.startswith("model.layers.")} == set("0123")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 4
    too_far = [{"sources": [{"model": str(a.folder), "layer_range": [2, 4]}]}]
    with pytest.raises(RecipeError, match=r"a has 3 layers, 0 to 2. Got the range \[2, 4\]"):
        merge({"merge_method": "passthrough", "slices": too_far}, tmp_path, "other")


def test_a_model_may_lack_the_heads_for_further_tokens(pair: Pair, tmp_path: Path) -> None:
    """transformers leaves them out when it saves a fine-tuned model."""
    plain = pair("llama")[1]
    a = with_tensors(pair("llama")[0], tmp_path / "a", {**further(1), "mtp.layers.0.mlp.up_proj.weight": torch.ones(24, 16)})
    got = state_of(merge(recipe_of(a, plain), tmp_path))
    assert set(got) == set(state_of(a.folder))
    assert all(torch.equal(got[name], value) for name, value in further(1).items())
    assert set(state_of(merge(recipe_of(plain, a), tmp_path, "turned"))) == set(state_of(plain.folder))


def test_no_tensor_of_an_unknown_name_is_dropped(pair: Pair, tmp_path: Path) -> None:
    """Layers of another kind (`linear_attn`), and a tower that the definition of a text model does not list (`model.visual`)."""
    more = {
        "model.layers.1.linear_attn.in_proj_qkvz.weight": (8, 16),
        "model.layers.1.linear_attn.A_log": (2,),
        "model.visual.blocks.0.attn.qkv.weight": (8, 8),
        "model.visual.patch_embed.proj.weight": (8, 3, 2, 2),
        "what.ever": (3,),
    }
    a, b = (
        with_tensors(one, tmp_path / name, {key: torch.full(shape, value) for key, shape in more.items()})
        for one, name, value in zip(pair("llama"), "ab", (1.0, 1.1), strict=True)
    )
    got = state_of(merge(recipe_of(a, b), tmp_path))
    assert set(got) == set(state_of(a.folder))
    t = {"model.layers.1.": 0.5, "model.visual.blocks.0.": 1.0}  # a tower of one layer is at its end
    for name, shape in more.items():
        share = SHARES[next((t[start] for start in t if name.startswith(start)), 0.0)]
        torch.testing.assert_close(got[name], torch.full(shape, share + 1.1 * (1 - share)))


def test_a_tower_that_the_first_model_has_not_is_an_error(pair: Pair, tmp_path: Path) -> None:
    plain, b = pair("llama")
    b = with_tensors(b, tmp_path / "b", {"model.visual.blocks.0.attn.qkv.weight": torch.ones(8, 8)})
    with pytest.raises(
        RecipeError, match=r"a lacks 1 tensors that b has: model\.visual\.blocks\.0\.attn\.qkv\.weight\. .*--exclude"
    ):
        merge(recipe_of(plain, b), tmp_path)
    got = state_of(merge(recipe_of(plain, b), tmp_path, exclude=("model.visual.*",)))
    assert set(got) == set(state_of(plain.folder))


def test_experts_that_are_stored_in_two_ways_are_an_error_that_says_so(pair: Pair, tmp_path: Path) -> None:
    a, b = pair("mixtral")
    fused = tmp_path / "b"
    fused.mkdir()
    save_file({name: value.contiguous() for name, value in b.state.items()}, fused / "model.safetensors")
    (fused / "config.json").write_text(json.dumps(b.config), encoding="utf-8")
    with pytest.raises(RecipeError, match="One keeps its experts in one tensor, the other each by itself"):
        merge(recipe_of(a, replace(b, folder=fused)), tmp_path)
    twin = tmp_path / "a"
    twin.mkdir()
    save_file({name: value.contiguous() for name, value in a.state.items()}, twin / "model.safetensors")
    (twin / "config.json").write_text(json.dumps(a.config), encoding="utf-8")
    got = opened(merge(recipe_of(replace(a, folder=twin), replace(b, folder=fused)), tmp_path))
    lists = layer_lists(a.model)
    close(got.state_dict(), {name: mean(value, b.state[name], depth_of(name, lists)) for name, value in a.state.items()})


@pytest.mark.parametrize("based", [False, True])
def test_the_config_is_that_of_the_base_or_the_first_model(based: bool, pair: Pair, tmp_path: Path) -> None:
    a, b, c = (with_tensors(pair("llama")[0], tmp_path / name, {}, _name_or_path=name) for name in ("zz", "mm", "aa"))
    models = [{"model": str(one.folder), "parameters": {"weight": 1.0}} for one in (a, b, c)]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models}
    if based:
        recipe |= {"merge_method": "task_arithmetic", "base_model": str(b.folder), "models": [models[0], models[2]]}
    for number in range(3):
        out = merge(recipe, tmp_path, f"out{number}")
        config = out / "config.json"
        assert json.loads(config.read_text(encoding="utf-8"))["_name_or_path"] == ("mm" if based else "zz")


# Files without a config.


def block(number: int, seed: float) -> State:
    return {
        f"transformer.h.{number}.attn.c_attn.weight": torch.full((6, 4), number + seed),
        f"transformer.h.{number}.ln_1.weight": torch.full((4,), 2.0 + seed),
    }


NANO = {"transformer.wte.weight": (10, 4), "transformer.ln_f.weight": (4,), "lm_head.weight": (10, 4)}
UNET = {  # names of diffusers
    "conv_in.weight": (4, 4, 3, 3),
    **{f"down_blocks.{i}.resnets.0.conv1.weight": (4, 4, 3, 3) for i in range(3)},
    **{f"down_blocks.{i}.resnets.0.norm1.weight": (4,) for i in range(3)},
    **{f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q.weight": (4, 4) for i in range(3)},
    "mid_block.resnets.0.norm1.weight": (4,),
    "conv_out.weight": (4, 4, 3, 3),
}
STAGES = {  # names of timm
    "stem.0.weight": (4, 3, 2, 2),
    **{f"stages.{i}.blocks.{j}.mlp.fc1.weight": (4, 4) for i in range(3) for j in range(2)},
    **{f"stages.{i}.downsample.1.weight": (4, 4, 2, 2) for i in range(1, 3)},
    "head.fc.weight": (5, 4),
}


def raw(names: str, value: float) -> State:
    if names == "nanogpt":
        state = {name: torch.full(shape, value) for name, shape in NANO.items()}
        return state | {key: tensor for number in range(3) for key, tensor in block(number, value).items()}
    return {name: torch.full(shape, value) for name, shape in {"unet": UNET, "timm": STAGES}[names].items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize(
    ("names", "layers"),
    [("nanogpt", "transformer.h"), ("unet", "down_blocks"), ("timm", "stages")],
    ids=["nanogpt", "unet", "timm"],
)
@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
def test_files_without_a_config(suffix: str, names: str, layers: str, out: str, tmp_path: Path) -> None:
    states = {"base": raw(names, 1.0), "a": raw(names, 1.1), "b": raw(names, 1.2)}
    for name, state in states.items():
        file = tmp_path / f"{name}.{suffix}"
        save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": f"base.{suffix}",
        "models": [
            {"model": f"a.{suffix}", "parameters": {"weight": [0.9, 0.2, 0.4]}},
            {"model": f"b.{suffix}", "parameters": {"weight": 0.5}},
        ],
    }
    place = merge(recipe, tmp_path, out)
    got = load_file(place if place.is_file() else place / "model.safetensors")
    assert set(got) == set(states["base"])
    for name, tensor in states["base"].items():
        share = SHARES[1.0 if name.startswith("mid_block.") else depth_of(name, [layers])]  # one layer is at its end
        want = tensor + share * (states["a"][name] - tensor) + 0.5 * (states["b"][name] - tensor)
        torch.testing.assert_close(got[name], want)


def test_tensors_that_only_some_files_have_are_named(tmp_path: Path) -> None:
    first, other = raw("nanogpt", 1.0), raw("nanogpt", 1.1)
    del first["transformer.h.1.ln_1.weight"], other["transformer.ln_f.weight"]
    save_file(first, tmp_path / "a.safetensors")
    save_file({**other, "extra.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    recipe = {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"], "parameters": {"weight": 0.5}}
    with pytest.raises(RecipeError) as caught:
        merge(recipe, tmp_path)
    text = str(caught.value)
    assert "a.safetensors lacks 2 tensors that b.safetensors has: transformer.h.1.ln_1.weight, extra.weight" in text
    assert "b.safetensors lacks 1 tensors that a.safetensors has: transformer.ln_f.weight" in text
    assert "Leave them out with `--exclude PATTERN`: they stay as in a.safetensors where it has them." in text
    with pytest.raises(RecipeError, match=r"exclude: the pattern 'extro\.\*' matches no tensor"):
        merge(recipe, tmp_path, exclude=("extro.*",))
    place = merge(recipe, tmp_path, exclude=("transformer.h.1.ln_1.weight", "extra.*", "*.ln_f.*"))
    got = load_file(place / "model.safetensors")
    assert set(got) == set(first)
    assert torch.equal(got["transformer.ln_f.weight"], first["transformer.ln_f.weight"])
    assert torch.equal(got["lm_head.weight"], torch.full((10, 4), 1.05))
