"""Models as transformers and PEFT write them today: live against stored, merged and loaded again, and adapters on every linear layer."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from encoders import CASES
from families import FAMILIES, TOWERS
from thetau.errors import AlignmentError
from thetau.facade import config_folder, from_recipe
from thetau.recipes import from_mapping
from tiny_decoders import dense

FAR = pytest.mark.filterwarnings(
    "ignore:.*is probably not the model that it was fine-tuned from"
)  # random weights are no fine-tune
KINDS = (
    "mixtral",
    "qwen3-moe",
    "deepseek-v3",
    "gpt-bigcode",
    "gpt2",
    "granite-hybrid",
    "whisper",
    "clip",
    "t5-tied",
    "dinov2",
    "bert-mlm",
    "qwen2.5-vl",
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
IDS = torch.tensor([[1, 5, 7, 2, 4, 8]])


def built(kind: str, seed: int) -> Any:
    name, config, sizes = {**FAMILIES, **TOWERS}[kind][:3]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
@FAR
def test_live_stored_and_merged(tmp_path: Path, kind: str) -> None:
    """A live model and its own folder are one model; a merge of two is read by transformers without a word, as the mean of the live ones."""
    models = [built(kind, seed) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    assert (thetau.open(models[0]) - thetau.open(tmp_path / "0")).norm() == 0
    (0.5 * thetau.open(tmp_path / "0") + 0.5 * thetau.open(tmp_path / "1")).save(tmp_path / "out")
    got, said = type(models[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values())
    a, b, mean = models[0].state_dict(), models[1].state_dict(), got.state_dict()
    for name, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_all_linear_layers(tmp_path: Path, kind: str) -> None:
    """On fused experts too, over a folder that stores each expert by itself; and on plain layers that have the names of transposed ones."""
    model = built(kind, 0)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word on Conv1D
        adapted = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / "adapter")
        want = adapted.merge_and_unload().state_dict()
    thetau.open(tmp_path / "adapter", base=tmp_path / "base").save(tmp_path / "out")
    got = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_an_adapter_out_of_plain_layers_with_the_names_of_transposed_ones(tmp_path: Path) -> None:
    """GPT-BigCode's square projections, which GPT-2 keeps transposed: PEFT puts the extracted adapter where the change was."""
    base, tuned = built("gpt-bigcode", 0), built("gpt-bigcode", 0)
    with torch.no_grad():
        weight = tuned.transformer.h[0].attn.c_proj.weight
        weight.add_(torch.outer(torch.arange(16.0), torch.ones(16)) * 0.01)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    vector = thetau.open(tmp_path / "tuned") - thetau.open(tmp_path / "base")
    thetau.adapters.extract(vector, cut=thetau.adapters.Cut(rank=1)).save(tmp_path / "adapter")
    got = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    torch.testing.assert_close(got["transformer.h.0.attn.c_proj.weight"], weight.detach(), rtol=1e-4, atol=1e-5)


# Adapters whose tables have grown


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def grown(folder: Path) -> tuple[Path, Path, Path, Tensor]:
    """A base, the same with three more tokens, an adapter that was trained on that, and what PEFT makes of it."""
    base, more, adapter = folder / "base", folder / "more", folder / "adapter"
    dense(base, "llama", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(more)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(adapter)
    return base, more, adapter, logits(adapted)


@pytest.mark.filterwarnings("ignore:.*says that it was trained on")  # the base with more tokens was saved elsewhere
def test_a_grown_vocabulary_with_saved_tables(tmp_path: Path) -> None:
    """Over the base that it was trained on: PEFT saves such tables several times, and the trained values count."""
    _, more, adapter, want = grown(tmp_path)
    names = list(load_file(adapter / "adapter_model.safetensors"))
    assert any("modules_to_save" in name or "original_module" in name for name in names)
    thetau.open(adapter, base=more).save(tmp_path / "out")
    torch.testing.assert_close(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:.*says that it was trained on")
def test_exclude_is_heard_where_an_adapters_rows_differ(tmp_path: Path) -> None:
    base, _, adapter, _ = grown(tmp_path)
    opened = thetau.open(adapter, base=base)
    with pytest.raises(
        AlignmentError, match=r"'model.embed_tokens.weight' has another vocabulary: 31 rows instead of 28.*exclude"
    ):
        opened.save(tmp_path / "no")
    opened.save(tmp_path / "out", exclude=["*embed_tokens*", "lm_head*"], dtype="bfloat16")
    got, start = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in got.values()} == {torch.bfloat16}
    assert torch.equal(got["model.embed_tokens.weight"], start["model.embed_tokens.weight"].bfloat16())
    name = "model.layers.0.self_attn.q_proj"
    delta = parts[f"base_model.model.{name}.lora_B.weight"] @ parts[f"base_model.model.{name}.lora_A.weight"] * 4  # α = 8, r = 2
    torch.testing.assert_close(got[f"{name}.weight"].float(), start[f"{name}.weight"] + delta, rtol=2.0**-7, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*says that it was trained on")
def test_two_copies_that_differ_are_refused(tmp_path: Path) -> None:
    _, more, adapter, _ = grown(tmp_path)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    stored["base_model.model.lm_head.modules_to_save.weight"] = stored["base_model.model.lm_head.weight"] + 1
    save_file(stored, file)
    with pytest.raises(AlignmentError, match=r"both stand for 'lm_head.weight'"):
        thetau.open(adapter, base=more)


# An adapter's own names


@FAR
def test_rename_reaches_an_adapters_own_names(tmp_path: Path) -> None:
    base = dense(tmp_path / "base", "llama", 0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    want = thetau.open(tmp_path / "adapter", base=base).state_dict()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {name.replace(".self_attn.", ".mixer.").replace(".mlp.", ".ffn."): value for name, value in load_file(file).items()}, file
    )
    with pytest.raises(AlignmentError, match=r"mixer.q_proj.weight', which the base .* lacks"):
        thetau.open(tmp_path / "adapter", base=base)
    rename = {r"\.mixer\.": ".self_attn.", r"\.ffn\.": ".mlp."}
    got = thetau.open(tmp_path / "adapter", base=base, rename=rename).state_dict()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    recipe = from_mapping({"base": str(base), "models": [str(tmp_path / "adapter")], "method": "average", "rename": rename})
    merged = from_recipe(recipe).state_dict()
    for name, value in want.items():
        torch.testing.assert_close(merged[name], value)
    with pytest.raises(AlignmentError, match=r"rename: the pattern 'nothing' fits no name"):
        thetau.open(tmp_path / "adapter", base=base, rename={"nothing": "x"})
    with pytest.raises(AlignmentError, match=r"rename gives '.*' and '.*' one name, 'one'. Make the pattern narrower"):
        thetau.open(tmp_path / "adapter", base=base, rename={"^.*$": "one"})


# Configs of quantised models


def quantised(folder: Path, seed: int) -> Path:
    dense(folder, "llama", seed, hidden_size=64, intermediate_size=96)
    case = CASES["fp8, a scale a block"]
    stored = load_file(folder / "model.safetensors")
    for number, name in enumerate([name for name in stored if name.endswith("_proj.weight")]):
        stored |= case(name, tuple(stored[name].shape), 100 * seed + number)[0]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16", "quantization_config": case.config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@FAR
@pytest.mark.parametrize("base", ["plain", "codes"])
@pytest.mark.parametrize("chosen", ["plain", "codes"])
def test_the_config_that_is_chosen_says_what_the_weights_are(tmp_path: Path, base: str, chosen: str) -> None:
    """A config of a quantised model promises codes, which the output does not hold; and one of a plain model is taken over a quantised base."""
    quantised(tmp_path / "codes", 0)
    dense(tmp_path / "plain", "llama", 1, hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)
    for name in ("plain", "codes"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "mark_token": name}))
    recipe = from_mapping(
        {
            "base": str(tmp_path / base),
            "models": [str(tmp_path / "plain"), str(tmp_path / "codes")],
            "method": "average",
            "config": chosen,
        }
    )
    from_recipe(recipe).save(tmp_path / "out", config=config_folder(recipe))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mark_token"] == chosen
    assert "quantization_config" not in config
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_quantised_model_under_other_names_loses_its_quantisation_config(tmp_path: Path) -> None:
    opened = thetau.open(quantised(tmp_path / "codes", 0), rename={r"^model\.": "model."})
    opened.save(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    want = thetau.open(tmp_path / "codes").state_dict()
    assert all(torch.equal(value, want[name]) for name, value in load_file(tmp_path / "out" / "model.safetensors").items())
