"""Quantised models in use: adapters over them, merges of them on the command line, and what transformers makes of the output."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import run
from encoders import CASES, Case, mxfp4_experts
from fixtures import load_folder, write_model
from thetau.errors import OutputError
from tiny_decoders import dense

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
FORMS = (
    "bitsandbytes int8",
    "bitsandbytes NF4, nested",
    "GPTQ, 4 bits",
    "AWQ",
    "fp8, a scale a block",
    "NVFP4, compressed-tensors",
)
Values = dict[str, Tensor]


def quantised(folder: Path, case: Case, seed: int, dtype: str = "float32") -> Values:
    """A tiny Llama with quantised linear layers, as its own library would save it; the plain values of all its weights."""
    dense(folder, "llama", seed, **SIZES)
    stored = load_file(folder / "model.safetensors")
    values = dict(stored)
    for number, name in enumerate(name for name in list(stored) if name.endswith("_proj.weight")):
        shape = tuple(stored.pop(name).shape)
        parts, values[name] = case(name, (shape[0], shape[1]), 1000 * seed + number)
        stored |= parts
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": dtype, "quantization_config": case.config}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 7, 2, 4, 8]])).logits.float()


def reference(folder: Path, values: Values) -> Any:
    """A plain model with these values, built from the config alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lost = model.load_state_dict(values, strict=False)
    assert not lost.unexpected_keys
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")  # random weights are no fine-tune
def test_a_merge_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    values = [quantised(tmp_path / name, CASES[form], seed) for seed, name in enumerate("abc")]
    places = [str(tmp_path / name) for name in "abc"]
    out = str(tmp_path / "out")
    code, text = run(capsys, "merge", "--method", "average", "-b", places[0], "-m", places[1], "-m", places[2], "-o", out)
    assert code == 0, text
    assert "read dequantised" in " ".join(text.split())
    want = {name: (values[1][name].double() + values[2][name].double()).div(2).float() for name in values[0]}
    got = load_folder(tmp_path / "out")
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = logits(model)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, logits(reference(tmp_path / "out", want)), rtol=1e-4, atol=1e-4)
    code, text = run(capsys, "verify", out)
    assert code == 0, text


@pytest.mark.filterwarnings("ignore:.*says that it was trained on")  # on the plain base, which has no other place
def test_an_adapter_over_an_int8_base(tmp_path: Path) -> None:
    """The output is the dequantised base + B·A·α/r, rounded once, and what PEFT merges over the plain base."""
    values = quantised(tmp_path / "base", CASES["bitsandbytes int8"], 0, "bfloat16")
    plain = reference_of_config(tmp_path, values)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers what it calls otherwise now
        torch.manual_seed(0)
        tuned = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload().state_dict()
    tuned = thetau.open(tmp_path / "adapter", base=tmp_path / "base")
    tuned.save(tmp_path / "out")
    tuned.save(tmp_path / "wide", dtype="float32")
    got, wide = load_folder(tmp_path / "out"), load_folder(tmp_path / "wide")
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in [name for name in values if name.endswith("_proj.weight")]:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        want = values[name].double()
        if f"{stem}.lora_A.weight" in parts:
            want = want + 2 * parts[f"{stem}.lora_B.weight"].double() @ parts[f"{stem}.lora_A.weight"].double()
        torch.testing.assert_close(wide[name], want.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(wide[name], merged[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(got[name], wide[name].bfloat16())


def reference_of_config(tmp_path: Path, values: Values) -> Any:
    """A plain model in float32, from the quantised one's config without what it says of quantisation."""
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("quantization_config")
    config["dtype"] = "float32"
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return reference(folder, values)


@pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")  # random weights are no fine-tune
def test_a_recipe_of_mergekit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [quantised(tmp_path / name, CASES["GPTQ, 4 bits"], seed) for seed, name in enumerate("ab")]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"],
        "dtype": "float32",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, text = run(capsys, "merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out"))
    assert code == 0, text
    got = load_folder(tmp_path / "out")
    for name, value in values[0].items():
        torch.testing.assert_close(got[name], (value + values[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_quantised_fine_tune_of_a_plain_base(tmp_path: Path) -> None:
    values = quantised(tmp_path / "q", CASES["bitsandbytes NF4"], 0)
    plain = {name: value + 0.001 for name, value in values.items()}
    shutil.copytree(tmp_path / "q", tmp_path / "base")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config.pop("quantization_config")
    write_model(tmp_path / "base", plain, config)
    base, tuned = thetau.open(tmp_path / "base"), thetau.open(tmp_path / "q")
    (base + 0.5 * (tuned - base)).save(tmp_path / "out")
    got = load_folder(tmp_path / "out")
    for name, value in values.items():
        torch.testing.assert_close(got[name], value + 0.0005, rtol=1e-5, atol=1e-6)


def test_fp8_without_scales_is_not_written(tmp_path: Path) -> None:
    """It would lose what they keep."""
    quantised(tmp_path / "a", CASES["fp8, a scale a block"], 0, "bfloat16")
    with pytest.raises(
        OutputError,
        match=r"quantised with scales \(fp8 with scales\), and `--dtype float8_e4m3fn` writes none.*`--quantise fp8-tensor | fp8-row | fp8-block`",
    ):
        thetau.open(tmp_path / "a").save(tmp_path / "out", dtype="float8_e4m3fn")
    assert not (tmp_path / "out").exists()


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised(tmp_path / "a", CASES["bitsandbytes NF4"], 0, "bfloat16")
    code, text = run(capsys, "inspect", str(tmp_path / "a"))
    assert code == 0, text
    assert "absmax" not in text
    assert "bfloat16" in text


@pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")  # random weights are no fine-tune
def test_gpt_oss(tmp_path: Path) -> None:
    """Two models of gpt-oss in MXFP4, averaged, are read by transformers as a plain gpt-oss."""
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=16,
        layer_types=["full_attention"],
        pad_token_id=0,
        dtype="bfloat16",
    )
    values = []
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.GptOssForCausalLM(config).bfloat16()
        model.save_pretrained(tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        value = dict(stored)
        for number, expert in enumerate(
            key for key in list(stored) if key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ):
            experts, inputs, out = stored.pop(expert).shape
            parts, plain = mxfp4_experts(expert, experts, inputs, out, torch.Generator().manual_seed(10 * seed + number))
            stored |= parts
            value[expert] = plain
        said = json.loads((tmp_path / name / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
        write_model(tmp_path / name, stored, said)
        values.append(value)
    (0.5 * thetau.open(tmp_path / "a") + 0.5 * thetau.open(tmp_path / "b")).save(tmp_path / "out")
    got = load_folder(tmp_path / "out")
    assert sorted(got) == sorted(values[0])
    want = {name: (value.double() + values[1][name].double()).div(2).bfloat16() for name, value in values[0].items()}
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert bool(torch.isfinite(found).all())
    plain_model = transformers.GptOssForCausalLM(config).bfloat16()
    plain_model.load_state_dict(want)
    torch.testing.assert_close(found, logits(plain_model))
