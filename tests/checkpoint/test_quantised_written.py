"""fp8 with scales, written: against a quantiser of plain loops, read back by our reader and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from commands import run
from encoders import CASES
from fixtures import load_folder
from thetau.checkpoint.quantised.writing import SCHEMES
from thetau.errors import CheckpointError, OutputError, RecipeError
from tiny_decoders import dense

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
FAR = pytest.mark.filterwarnings(
    "ignore:.*is probably not the model that it was fine-tuned from"
)  # random weights are no fine-tune
SUFFIX = {"fp8-tensor": "_scale", "fp8-row": "_scale", "fp8-block": "_scale_inv"}
EPS = 2.0**-4  # half the distance of neighbouring E4M3 numbers, of three bits of mantissa, relative to the smaller one


def model(folder: Path, seed: int, **changed: Any) -> Path:
    return dense(folder, "llama", seed, **{**WIDE, "dtype": torch.bfloat16, **changed})


def quantised(value: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, block by block."""
    rows, columns = value.shape
    high, wide = {"fp8-tensor": (rows, columns), "fp8-row": (1, columns), "fp8-block": (128, 128)}[scheme]
    codes = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = value[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            largest = float(block.abs().max())
            scales[i, j] = torch.tensor(largest) / 448 if largest else 1.0
            codes[i * high : (i + 1) * high, j * wide : (j + 1) * wide] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales.reshape(1) if scheme == "fp8-tensor" else scales


def same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("scheme", SUFFIX)
@FAR
def test_codes_and_scales_are_a_plain_quantisers(tmp_path: Path, scheme: str) -> None:
    """Of the exact merge in float32, not of a rounded one; windows of any size and any number of workers give the same bits."""
    a, b = (thetau.open(model(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    merged = 0.25 * a + 0.75 * b
    exact, plain = merged.state_dict(dtype="float32"), merged.state_dict()
    merged.save(tmp_path / "out", quantise=scheme)
    merged.save(tmp_path / "again", quantise=scheme, engine=thetau.Engine(workers=3, window=1), shard_bytes=100_000)
    stored, again = load_file(tmp_path / "out" / "model.safetensors"), load_folder(tmp_path / "again")
    matrices = [name for name in exact if name.endswith("_proj.weight")]
    assert len(matrices) == 14
    assert set(stored) == {*exact, *(name + SUFFIX[scheme] for name in matrices)} == set(again)
    for name, value in exact.items():
        if name in matrices:
            codes, scales = quantised(value, scheme)
            assert same(stored[name], codes), name
            assert same(stored[name + SUFFIX[scheme]], scales), name
        else:
            assert same(stored[name], plain[name]), name
    assert all(same(again[name], value) for name, value in stored.items())
    assert thetau.verify(tmp_path / "out").good
    read = thetau.open(tmp_path / "out").state_dict(dtype="float32")
    assert read.keys() == exact.keys()
    for name in matrices:
        assert ((read[name] - exact[name]).abs() <= EPS * exact[name].abs() + exact[name].abs().max() / 448 * 2.0**-10).all(), (
            name
        )


@FAR
def test_transformers_reads_blocks(tmp_path: Path) -> None:
    """Its FineGrainedFP8 dequantises to what our reader gives, in the dtype of the config."""
    a, b = (thetau.open(model(tmp_path / name, seed, tie_word_embeddings=True)) for seed, name in enumerate("ab"))
    (0.5 * a + 0.5 * b).save(tmp_path / "out", quantise="fp8-block")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    read = thetau.open(tmp_path / "out").state_dict()
    assert {name for name in live if name != "lm_head.weight"} == set(read)
    for name, value in read.items():
        assert same(live[name], value), name


@FAR
def test_a_mixture_of_experts_keeps_its_routers(tmp_path: Path) -> None:
    """Single experts are quantised each; transformers joins codes and scales."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    config = transformers.Qwen3MoeConfig(
        **sizes, num_key_value_heads=1, head_dim=128, num_experts=4, num_experts_per_tok=2, vocab_size=64, dtype="bfloat16"
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    a, b = thetau.open(tmp_path / "a"), thetau.open(tmp_path / "b")
    (0.5 * a + 0.5 * b).save(tmp_path / "out", quantise="fp8-block")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    coded = {name for name, value in stored.items() if value.dtype == torch.float8_e4m3fn}
    assert len(coded) == 2 * (4 + 3 * 4)
    assert stored["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert said == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    read = thetau.open(tmp_path / "out").state_dict()
    up = torch.stack([read[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] for i in range(4)])
    assert same(live["model.layers.1.mlp.experts.gate_up_proj"][:, 128:].contiguous(), up)


@FAR
def test_fp8_over_fp8_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the base keeps in fp8 is written so again, and no other; a recipe can be run again; bfloat16 is written where nothing is asked."""
    for seed, name in enumerate("ab"):
        model(tmp_path / f"plain-{name}", seed)
        case = CASES["fp8, a scale a block"]
        stored = load_file(tmp_path / f"plain-{name}" / "model.safetensors")
        for number, weight in enumerate([one for one in stored if one.endswith(("k_proj.weight", "up_proj.weight"))]):
            stored |= case(weight, tuple(stored[weight].shape), 100 * seed + number)[0]
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / f"plain-{name}" / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"quantization_config": case.config}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: a\nmodels: [b]\nmethod: {name: task_arithmetic, scale: 0.5}\nquantise: fp8-block\n")
    code, text = run(capsys, "merge", str(recipe), "-o", str(tmp_path / "out"))
    assert code == 0, text
    assert "4 matrices" in text and "fp8 with a scale for each block of 128 × 128" in " ".join(text.split())
    base = thetau.open(tmp_path / "a")
    merged = thetau.merge([thetau.open(tmp_path / "b") - base], thetau.methods.TaskArithmetic(scale=0.5))
    exact = (base + merged).state_dict(dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        for name in (f"model.layers.{layer}.self_attn.k_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight"):
            codes, scales = quantised(exact[name], "fp8-block")
            assert same(stored[name], codes)
            assert same(stored[name + "_scale_inv"], scales)
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) == 4
    code, text = run(capsys, "verify", str(tmp_path / "out"), "--again")
    assert code == 0, text
    code, text = run(capsys, "merge", str(recipe), "-o", str(tmp_path / "rows"), "--quantise", "fp8-row")
    assert code == 0, text
    assert load_file(tmp_path / "rows" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].shape == (256, 1)
    code, text = run(
        capsys,
        "merge",
        "--method",
        "average",
        "-b",
        str(tmp_path / "a"),
        "-m",
        str(tmp_path / "b"),
        "-o",
        str(tmp_path / "plain"),
    )
    assert code == 0, text
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    got, want = load_file(tmp_path / "plain" / "model.safetensors"), thetau.open(tmp_path / "b").state_dict(dtype="float32")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.bfloat16
        torch.testing.assert_close(got[name].float(), value, rtol=2.0**-8, atol=1e-6)  # true values, rounded once to eight bits


@FAR
@pytest.mark.parametrize("scheme", SUFFIX)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (thetau.open(model(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    merged = 0.5 * a + 0.5 * b
    merged.save(tmp_path / "whole", quantise=scheme)
    from thetau.checkpoint.quantised.writing import Coded

    encode, seen = Coded.encode, []

    def failing(self: Coded, read: Any) -> Any:
        seen.append(self.spec.name)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return encode(self, read)

    one = thetau.Engine(workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(Coded, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            merged.save(tmp_path / "out", quantise=scheme, resume=True, engine=one)
    assert not (tmp_path / "out").exists()
    report = merged.save(tmp_path / "out", quantise=scheme, resume=True, engine=one)
    assert any("were there from an earlier run" in note for note in report.notes)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scheme", SUFFIX)
def test_zeros_tiny_and_huge_values(tmp_path: Path, scheme: str) -> None:
    """A block of zeros has the scale 1; values near the ends of float32 stay numbers."""
    model(tmp_path / "a", 0, dtype=torch.float32)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    name, largest = "model.layers.0.mlp.up_proj.weight", torch.finfo(torch.float32).max
    stored[name][:128] = 0
    stored[name][128:] *= largest / stored[name].abs().max()
    other = "model.layers.1.mlp.up_proj.weight"
    stored[other] = stored[other] * 1e-42
    save_file(stored, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    thetau.open(tmp_path / "a").save(tmp_path / "out", quantise=scheme)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not written[name][:128].float().any()
    if scheme != "fp8-tensor":
        assert (written[name + SUFFIX[scheme]].reshape(-1)[: 128 if scheme == "fp8-row" else 1] == 1).all()
    read = thetau.open(tmp_path / "out").state_dict(dtype="float32")
    assert all(value.isfinite().all() for value in read.values())
    torch.testing.assert_close(read[name].abs().max(), torch.tensor(largest), rtol=1e-6, atol=0.0)
    assert (read[other] - stored[other]).abs().max() <= torch.finfo(
        torch.float32
    ).tiny  # below a float's normal range, precision ends
    assert thetau.verify(tmp_path / "out").good


def test_values_that_the_models_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    """The library that runs the model multiplies codes out in that dtype."""
    a = thetau.open(model(tmp_path / "a", 0, dtype=torch.float16))
    with pytest.raises(OutputError, match=r"does not fit float16. Choose another output dtype"):
        (1e6 * a - 999_999.0 * thetau.open(model(tmp_path / "b", 1, dtype=torch.float16))).save(
            tmp_path / "out", quantise="fp8-row"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exclude", [[], ["*up_proj*"]])
def test_nan_is_refused(tmp_path: Path, exclude: list[str]) -> None:
    """Whether the tensor is computed or goes over as it is: a scale of NaN would lose a whole block."""
    model(tmp_path / "a", 0)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(stored, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj"):
        thetau.open(tmp_path / "a").save(tmp_path / "out", quantise="fp8-block", exclude=exclude)
    assert not (tmp_path / "out").exists()


def test_excluded_matrices_are_quantised_too(tmp_path: Path) -> None:
    a = thetau.open(model(tmp_path / "a", 0))
    a.save(tmp_path / "all", quantise="fp8-row")
    a.save(tmp_path / "some", quantise="fp8-row", exclude=["*up_proj*"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "some"))
    assert all(same(other[name], value) for name, value in one.items())


def test_matrices_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """transformers would read other blocks: the whole module stays as it is, since libraries join q, k and v; its rows can be quantised."""
    a = thetau.open(model(tmp_path / "a", 0, head_dim=64))
    a.save(tmp_path / "blocks", quantise="fp8-block")
    stored = load_file(tmp_path / "blocks" / "model.safetensors")
    assert {name.split(".")[3] for name, value in stored.items() if value.dtype == torch.float8_e4m3fn} == {"mlp"}
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "blocks").state_dict()
    read = thetau.open(tmp_path / "blocks").state_dict()
    assert all(same(live[name], value) for name, value in read.items())
    a.save(tmp_path / "rows", quantise="fp8-row")
    assert load_file(tmp_path / "rows" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight_scale"].shape == (64, 1)
    small = thetau.open(dense(tmp_path / "small", "llama", 0))
    with pytest.raises(
        OutputError,
        match=r"would quantise nothing of .*small: '.*' \[\d+, \d+\] cannot be divided into blocks of 128 × 128: take `fp8-row`",
    ):
        small.save(tmp_path / "none", quantise="fp8-block")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    a, b = (thetau.open(model(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    with pytest.raises(OutputError, match=r"quantises a model; of a task vector most would be lost"):
        (a - b).save(tmp_path / "out", quantise="fp8-row")
    with pytest.raises(OutputError, match=r"must be said in a config.json, and a single file has none. Write a folder"):
        a.save(tmp_path / "out.safetensors", quantise="fp8-row")
    with pytest.raises(OutputError, match=r"float8_e5m2 would be the dtype of all others, without scales"):
        a.save(tmp_path / "out", quantise="fp8-row", dtype="float8_e5m2")
    with pytest.raises(OutputError, match=r"must be one of fp8-tensor, fp8-row, fp8-block. Got 'int4'"):
        a.save(tmp_path / "out", quantise="int4")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(OutputError, match=r"must be said in a config.json, and .*a has none"):
        thetau.open(tmp_path / "a").save(tmp_path / "out", quantise="fp8-row")
    with pytest.raises(RecipeError, match=r"quantise: Input should be 'fp8-tensor', 'fp8-row' or 'fp8-block'"):
        thetau.recipes.from_mapping({"base": "a", "models": ["b"], "method": "ties", "quantise": "int4"})
    assert list(SCHEMES) == list(SUFFIX)


@FAR
def test_a_recipe_of_mergekit_is_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("ab"):
        model(tmp_path / name, seed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: 0.5}}\n"
    )
    code, text = run(capsys, "merge", str(recipe), "-o", str(tmp_path / "out"), "--quantise", "fp8-block")
    assert code == 0, text
    exact = (0.5 * thetau.open(tmp_path / "a") + 0.5 * thetau.open(tmp_path / "b")).state_dict(dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    codes, scales = quantised(exact["model.layers.0.mlp.up_proj.weight"], "fp8-block")
    assert same(stored["model.layers.0.mlp.up_proj.weight"], codes)
    assert same(stored["model.layers.0.mlp.up_proj.weight_scale_inv"], scales)
    code, text = run(capsys, "verify", str(tmp_path / "out"), "--again")
    assert code == 0, text
