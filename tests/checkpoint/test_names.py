"""Names of one model by several versions and wrappers: each gives the values that the same weights under the base's own names give."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import thetau
from fixtures import random_weights, shifted, write_model
from thetau.checkpoint import align, open_source
from thetau.checkpoint.names import Names, spelled, unwrapped
from thetau.errors import AlignmentError, RecipeError
from thetau.recipes import from_mapping
from tiny_vision import made, saved

State = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning")  # random models are strangers
BLOCK = "encoder.layer.1.output.dense.weight"


def merged(base: Any, model: Any) -> State:
    start = thetau.open(base)
    return (start + thetau.merge([thetau.open(model) - start], thetau.methods.TaskArithmetic(scale=0.5))).state_dict()


def half(base: State, model: State) -> State:
    """θ₀ + ½(θ − θ₀), worked out here."""
    return {n: v + 0.5 * (model[n] - v) if v.is_floating_point() else v for n, v in base.items()}


def close(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


def inside(name: str) -> str:
    return re.sub(r"^(encoder\.layer\.\d+)\.", r"\1._checkpoint_wrapped_module.", name)


def gamma(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    "other",
    [
        inside,
        gamma,
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{inside(name)}",
        lambda name: f"base_model.model.{name}",
        lambda name: re.sub(r"^(.*)\.(\w+)$", r"\1.default.\2", name),
        lambda name: name.replace("encoder.", "encoder._fsdp_wrapped_module."),
        lambda name: gamma(f"bert.{name}"),
    ],
)
@pytest.mark.parametrize("wrapped", ["model", "base"])
def test_wrappers_and_old_words(other: Callable[[str], str], wrapped: str) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    want = half(base, model)
    if wrapped == "model":
        close(merged(base, {other(name): value for name, value in model.items()}), want)
    else:
        close(
            merged({other(name): value for name, value in base.items()}, model),
            {other(name): value for name, value in want.items()},
        )


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")  # the old way is what is tested
def test_weight_norm_by_both_of_torchs_ways() -> None:
    old, new = (norm(torch.nn.Linear(3, 2)) for norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm))
    base, model = old.state_dict(), new.state_dict()
    got = merged(base, model)
    assert torch.allclose(
        got["weight_g"], base["weight_g"] + 0.5 * (model["parametrizations.weight.original0"] - base["weight_g"])
    )
    assert torch.allclose(
        got["weight_v"], base["weight_v"] + 0.5 * (model["parametrizations.weight.original1"] - base["weight_v"])
    )


def test_a_note_says_which_names_were_taken_for_which() -> None:
    base = random_weights(0)
    sources = [open_source(base), open_source({gamma(name): value for name, value in base.items()})]
    notes = "\n".join(align(sources[0].specs, "BASE", sources).notes)
    assert "5 tensors have other names" in notes or "tensors have other names" in notes
    assert "LayerNorm.gamma' for " in notes


def test_two_conversions_that_both_fit_name_both() -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    one, two = f"_orig_mod.{BLOCK}", f"module.{BLOCK}"
    model[one] = model[two] = model.pop(BLOCK)
    with pytest.raises(
        AlignmentError, match=rf"'{re.escape(one)}' and '{re.escape(two)}' can stand for '{BLOCK}': two conversions fit"
    ):
        merged(base, model)


def test_an_adapters_name_that_fits_twice_names_both() -> None:
    names = Names(["bert.layers.0.a.weight", "vit.layers.0.a.weight"])
    with pytest.raises(
        AlignmentError, match=r"'layers.0.a.weight' stands for 'bert.layers.0.a.weight' or 'vit.layers.0.a.weight'"
    ):
        names.find("layers.0.a.weight")


# transformers 5 against the hub's files


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip-vision"])
def test_a_live_model_against_its_folder(tmp_path: Path, kind: str) -> None:
    """transformers 5 calls the parts of a live model otherwise than it writes them."""
    folder = saved(tmp_path / kind, made(kind))
    module = made(kind)
    stored = load_file(folder / "model.safetensors")
    assert (thetau.open(module) - thetau.open(folder)).norm() == 0
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    close(merged(folder, module), {name: value + 0.5 for name, value in stored.items()})


def test_a_towers_language_model_by_both_layouts(tmp_path: Path) -> None:
    """Qwen2-VL and LLaVA: `model.layers…` of a file, `model.language_model.layers…` of a live model."""
    torch.manual_seed(0)
    live = {f"model.language_model.layers.{n}.mlp.up_proj.weight": torch.randn(4, 3) for n in range(3)}
    live |= {"model.visual.blocks.0.attn.qkv.weight": torch.randn(6, 2), "model.language_model.norm.weight": torch.randn(3)}
    hub = {
        name.replace("model.language_model.", "model.").replace("model.visual", "visual"): value for name, value in live.items()
    }
    llava = {
        name.replace("model.language_model.", "language_model.model.").replace("model.visual", "visual"): value
        for name, value in live.items()
    }
    for one in (live, hub, llava):
        for other in (live, hub, llava):
            model = {name: value + 1 for name, value in other.items()}
            close(merged(one, model), {name: value + 0.5 for name, value in one.items()})


def test_transformers_own_conversions_are_asked(tmp_path: Path) -> None:
    """LLaVA's projector has moved below `model`: transformers' table says so."""
    transformers = pytest.importorskip("transformers")
    text = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    torch.manual_seed(0)
    live = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=8)
    )
    live.save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = (thetau.open(live) - thetau.open(tmp_path / "base")).norm()
    assert found == 0
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1.0)
    close(merged(tmp_path / "base", live), {name: value + 0.5 for name, value in base.items()})


def test_an_adapter_trained_on_the_live_model_fits_its_folder(tmp_path: Path) -> None:
    """PEFT writes `layers.0.attention.q_proj` for what the file calls `encoder.layer.0.attention.attention.query`."""
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path / "dinov2", made("dinov2"))
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it is renaming
        module = peft.get_peft_model(made("dinov2"), settings)
    module.save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want = module.merge_and_unload().eval()(pixels).last_hidden_state
    thetau.open(tmp_path / "adapter", base=folder).save(tmp_path / "merged")
    import transformers

    with torch.no_grad():
        got = transformers.Dinov2Model.from_pretrained(tmp_path / "merged").eval()(pixels).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Experts


def experts(seed: int, layout: str, *, count: int = 3, inner: int = 6, hidden: int = 4) -> State:
    """The same mixture in each layout: single, fused `[expert, out, in]`, and fused `[expert, in, out]`."""
    generator = torch.Generator().manual_seed(seed)
    found: State = {}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        w1, w3 = (torch.randn(count, inner, hidden, generator=generator) for _ in range(2))
        w2, router = torch.randn(count, hidden, inner, generator=generator), torch.randn(count, hidden, generator=generator)
        if layout == "single":
            found[f"{stem}.block_sparse_moe.gate.weight"] = router
            for number in range(count):
                single = f"{stem}.block_sparse_moe.experts.{number}"
                found |= {f"{single}.w1.weight": w1[number], f"{single}.w2.weight": w2[number], f"{single}.w3.weight": w3[number]}
            continue
        found[f"{stem}.mlp.gate.weight"] = router
        gate_up = torch.cat([w1, w3], 1)
        swapped = layout == "in_out"
        found[f"{stem}.mlp.experts.gate_up_proj"] = gate_up.transpose(1, 2).contiguous() if swapped else gate_up
        found[f"{stem}.mlp.experts.down_proj"] = w2.transpose(1, 2).contiguous() if swapped else w2
    return found


@pytest.mark.parametrize("base", ["single", "out_in", "in_out"])
@pytest.mark.parametrize("model", ["single", "out_in", "in_out"])
def test_experts_fused_and_single(tmp_path: Path, base: str, model: str) -> None:
    if {base, model} == {"out_in", "in_out"}:
        with pytest.raises(AlignmentError, match="has shape"):
            merged(experts(0, base), experts(1, model))
        return
    want = half(experts(0, base), experts(1, base))
    close(merged(experts(0, base), experts(1, model)), want)
    from_files = merged(write_model(tmp_path / "base", experts(0, base)), write_model(tmp_path / "model", experts(1, model)))
    close(from_files, want)


def test_a_fused_mixture_that_fits_two_orientations_is_refused() -> None:
    square: dict[str, int] = {"inner": 4, "hidden": 4}
    fused = {name: value for name, value in experts(1, "out_in", **square).items() if "gate_up" not in name}
    single = {name: value for name, value in experts(0, "single", **square).items() if ".w1." not in name and ".w3." not in name}
    with pytest.raises(
        AlignmentError, match=r"fit two conversions to single experts, \[expert, out, in\] and \[expert, in, out\]"
    ):
        merged(single, fused)


def test_a_lost_expert_is_an_error() -> None:
    model = experts(1, "single")
    del model["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(AlignmentError, match="lacks 1 tensors"):
        merged(experts(0, "out_in"), model)


# What a user says


def test_rename_in_python_and_in_a_recipe(tmp_path: Path) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    odd = {name.replace("encoder.layer.", "tower_blocks_"): value for name, value in model.items()}
    rename = {r"^tower_blocks_(\d+)\.": r"encoder.layer.\1."}
    start = thetau.open(base)
    with pytest.raises(AlignmentError, match=r"`rename: \{pattern: name\}` \(`--rename`\)"):
        merged(base, odd)
    vector = thetau.open(odd, rename=rename) - start
    close((start + 0.5 * vector).state_dict(), half(base, model))
    folders = [write_model(tmp_path / "base", base), write_model(tmp_path / "model", odd)]
    recipe = from_mapping(
        {
            "base": str(folders[0]),
            "models": [str(folders[1])],
            "method": {"name": "task_arithmetic", "scale": 0.5},
            "rename": rename,
        }
    )
    close(thetau.facade.from_recipe(recipe).state_dict(), half(base, model))


@pytest.mark.parametrize(
    ("rename", "kind", "message"),
    [
        ({"(": ""}, RecipeError, "must be a regular expression"),
        ({"^nothing": ""}, AlignmentError, "the pattern '\\^nothing' fits no name"),
        ({r"layer\.\d": "layer.0"}, AlignmentError, "rename gives 'encoder.layer.0.*' and 'encoder.layer.1.*' one name"),
        ({"encoder": r"\4"}, RecipeError, "does not fit it"),
    ],
)
def test_bad_renames(rename: dict[str, str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        thetau.open(random_weights(0), rename=rename)


def test_spellings_are_idempotent() -> None:
    for name in [*random_weights(0), "module.a._orig_mod.b.weight_g", "layers.0.attention.q_proj.weight"]:
        assert unwrapped(unwrapped(name)) == unwrapped(name)
        assert spelled(spelled(name)) == spelled(name)


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_an_adapter_that_thetau_trains_fits_the_folder_it_was_trained_from(tmp_path: Path, kind: str) -> None:
    """What `thetau finetune --paradigm lora` writes for an image model was refused: its names are the live model's."""
    pytest.importorskip("peft")
    from thetau.finetune.adapters import adapted, save_adapter
    from thetau.finetune.config import FinetuneConfig
    from thetau.models import load_encoder

    folder = saved(tmp_path / kind, made(kind))
    encoder = load_encoder(folder)
    with adapted(encoder, FinetuneConfig(paradigm="lora", rank=2)) as module:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        save_adapter(module, tmp_path / "adapter", str(folder))
        pixels = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            want = encoder.module(pixels)
    thetau.open(tmp_path / "adapter", base=folder).save(tmp_path / "merged")
    with torch.no_grad():
        got = load_encoder(tmp_path / "merged").module(pixels)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, load_encoder(folder).module(pixels), rtol=1e-3, atol=1e-3)
