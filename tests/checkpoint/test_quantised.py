"""Every quantised form against values computed from its codes, by itself and through the engine."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import thetau
from encoders import CASES, Case, mxfp4_experts
from fixtures import load_folder, write_model, write_shards
from thetau.checkpoint import open_source
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.quantised import QuantisedSource
from thetau.errors import CheckpointError

# Random weights are no fine-tune of one another, and the engine says so.
FAR = pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")
SHAPE = (64, 64)
LAYERS = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
Values = dict[str, Tensor]


def model(folder: Path, case: Case, seed: int, *, shape: tuple[int, int] = SHAPE, dtype: str = "float32") -> Values:
    """A folder with two quantised weights and one plain tensor; the values that it stands for come back."""
    stored: Values = {"model.norm.weight": torch.randn(16, generator=torch.Generator().manual_seed(seed))}
    values = dict(stored)
    for number, name in enumerate(LAYERS):
        parts, values[name] = case(name, shape, seed + 10 * number)
        stored |= parts
    write_model(folder, stored, {"model_type": "llama", "dtype": dtype, "quantization_config": case.config})
    return values


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_rows_are_what_the_codes_stand_for(tmp_path: Path, case: Case) -> None:
    values = model(tmp_path / "m", case, 0)
    source = open_source(tmp_path / "m")
    assert list(source.specs) == ["model.norm.weight", *LAYERS] or sorted(source.specs) == sorted(values)
    for name, want in values.items():
        assert source.specs[name].shape == tuple(want.shape)
        assert source.specs[name].dtype is Dtype.F32
        torch.testing.assert_close(source.read(name), want, rtol=0, atol=0)
        for start, stop in ((0, 0), (0, 1), (3, 7), (5, 16), (15, 16)):
            torch.testing.assert_close(source.read(name, start, stop), want[start:stop], rtol=0, atol=0)
        if name in LAYERS:
            assert source.place(name) is None
            assert torch.equal(source.read(name, 33, 50), want[33:50])


def test_what_is_written_has_no_quantisation(tmp_path: Path, case: Case) -> None:
    values = model(tmp_path / "m", case, 0, dtype="bfloat16")
    report = (1.0 * thetau.open(tmp_path / "m")).save(tmp_path / "out")
    got = load_folder(tmp_path / "out")
    assert sorted(got) == sorted(values)
    for name in LAYERS:
        assert torch.equal(got[name], values[name].bfloat16())
    assert torch.equal(got["model.norm.weight"], values["model.norm.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "bfloat16"}
    assert any(
        "read dequantised; what is made of this model is written as bfloat16 without quantisation unless `--quantise` asks for it"
        in note
        for note in report.notes
    )
    assert isinstance(open_source(tmp_path / "out"), type(open_source({"a": torch.ones(2)})).__mro__[1])


@FAR
def test_two_models_average(tmp_path: Path, case: Case) -> None:
    one, other = (model(tmp_path / name, case, seed) for name, seed in (("a", 0), ("b", 1)))
    (0.5 * thetau.open(tmp_path / "a") + 0.5 * thetau.open(tmp_path / "b")).save(tmp_path / "out")
    got = load_folder(tmp_path / "out")
    assert sorted(got) == sorted(one)
    for name, value in got.items():
        torch.testing.assert_close(value, (one[name].double() + other[name].double()).div(2).float(), rtol=1e-6, atol=1e-7)


def test_shards(tmp_path: Path) -> None:
    parts, value = CASES["bitsandbytes NF4, nested"](LAYERS[0], SHAPE, 0)
    folder = write_shards(tmp_path / "m", parts)
    assert torch.equal(open_source(folder).read(LAYERS[0]), value)


def test_odd_shapes(tmp_path: Path) -> None:
    """Rows that begin in the middle of a byte and of a block; blocks that end at the edge."""
    for name, shape in (
        ("bitsandbytes NF4", (7, 33)),
        ("fp8, a scale a block", (70, 40)),
        ("GPTQ, 3 bits", (33, 96)),
        ("integers", (5, 7)),
    ):
        values = model(tmp_path / name.replace(" ", "-"), CASES[name], 3, shape=shape)
        source = open_source(tmp_path / name.replace(" ", "-"))
        for start in range(shape[0]):
            assert torch.equal(source.read(LAYERS[0], start, start + 1), values[LAYERS[0]][start : start + 1]), (name, start)
        assert torch.equal(source.read(LAYERS[0], 3, shape[0]), values[LAYERS[0]][3:])


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts, value = mxfp4_experts(name, 3, 64, 40, torch.Generator().manual_seed(0))
    bias = torch.randn(3, 40)
    write_model(
        tmp_path / "m", parts | {f"{name}_bias": bias}, {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    )
    source = open_source(tmp_path / "m")
    assert {key: spec.shape for key, spec in source.specs.items()} == {name: (3, 64, 40), f"{name}_bias": (3, 40)}
    assert torch.equal(source.read(name), value)
    assert torch.equal(source.read(name, 1, 2), value[1:2])
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = convert_moe_packed_tensors(parts[f"{name}_blocks"], parts[f"{name}_scales"])
    assert torch.equal(source.read(name).bfloat16(), theirs)


DATA = sorted((Path(__file__).parent / "data").glob("*.safetensors"))


@pytest.mark.parametrize("file", DATA, ids=lambda file: file.stem)
def test_as_its_own_library_reads_it(tmp_path: Path, file: Path) -> None:
    """Files that bitsandbytes and compressed-tensors made (`data/make.py`), and what they read them as."""
    with safe_open(file, "pt") as opened:
        quantisation = json.loads(opened.metadata()["config"])
    stored = load_file(file)
    expected = stored.pop("expected")
    dtype = str(expected.dtype).removeprefix("torch.")
    write_model(tmp_path / "m", stored, {"dtype": dtype, "quantization_config": quantisation})
    source = open_source(tmp_path / "m")
    assert list(source.specs) == ["proj.weight"]
    assert source.specs["proj.weight"].dtype.torch == expected.dtype
    assert torch.equal(source.read("proj.weight").to(expected.dtype), expected)


def test_every_library_is_there() -> None:
    assert len(DATA) == 10


@pytest.mark.parametrize("name", ["fp8, a scale in all", "fp8, a scale a row", "fp8, a scale a block", "fp8, e5m2"])
def test_fp8_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, _ = CASES[name](LAYERS[0], SHAPE, 0)
    write_model(tmp_path / "m", parts, {"quantization_config": CASES[name].config})
    stored = list(parts.values())
    scale = stored[1].reshape(1, 1) if stored[1].ndim == 0 else stored[1]
    theirs = Fp8Dequantize(None)._dequantize_one(stored[0], scale, output_dtype=torch.bfloat16)
    source = open_source(tmp_path / "m")
    assert torch.equal(source.read(LAYERS[0]).to(source.specs[LAYERS[0]].dtype.torch), theirs)


def test_a_state_dict_tells_its_form_itself() -> None:
    for name, case in CASES.items():
        parts, value = case(LAYERS[0], SHAPE, 0)
        if "quant_method" in case.config and case.config["quant_method"] in ("gptq", "awq"):
            with pytest.raises(
                CheckpointError, match=r"qweight' .* holds codes of a quantised weight .* nothing beside it says which form"
            ):
                open_source(parts)
        elif "expert_dtype" in case.config:
            with pytest.raises(
                CheckpointError, match=r"q_proj.*holds (codes|scales) of a quantised weight .* nothing beside it says"
            ):
                open_source(parts)
        elif "weight_block_size" not in case.config:  # of blocks that nobody would guess
            source = open_source(parts)
            assert torch.equal(source.read(LAYERS[0]), value), name
            assert any("Nothing beside them says how they are quantised" in note for note in source.notes)


def test_scales_of_activations_are_left_out_and_said(tmp_path: Path) -> None:
    model(tmp_path / "m", CASES["fp8, a scale a block"], 0)
    source = open_source(tmp_path / "m")
    assert any(
        "2 scales of activations and caches are left out (model.layers.0.self_attn.q_proj.input_scale" in note
        for note in source.notes
    )


def test_no_more_is_read_than_rows_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a transposed weight with long rows on a disk, only the columns that are wanted."""
    case = CASES["GPTQ, 4 bits"]
    parts, value = case(LAYERS[0], (2048, 64), 0)
    write_model(tmp_path / "m", parts, {"quantization_config": case.config})
    source = open_source(tmp_path / "m")
    assert isinstance(source, QuantisedSource)
    whole: list[str] = []
    read = source.stored.read

    def watched(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        whole.append(name)
        return read(name, start, stop)

    monkeypatch.setattr(source.stored, "read", watched)
    assert torch.equal(source.read(LAYERS[0], 100, 164), value[100:164])
    assert not any(name.endswith(".qweight") for name in whole)


def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    values = model(tmp_path / "m", case, 5)
    monkeypatch.setattr("thetau.checkpoint.quantised.source.CHUNK", 7 * SHAPE[1])
    assert torch.equal(open_source(tmp_path / "m").read(LAYERS[1]), values[LAYERS[1]])


@FAR
def test_excluded_weights_are_written_plain(tmp_path: Path) -> None:
    values = model(tmp_path / "base", CASES["bitsandbytes NF4"], 0, dtype="bfloat16")
    model(tmp_path / "a", CASES["bitsandbytes NF4"], 1, dtype="bfloat16")
    base, other = thetau.open(tmp_path / "base"), thetau.open(tmp_path / "a")
    (base + 0.5 * (other - base)).save(tmp_path / "out", exclude=["*.q_proj.weight"])
    got = load_folder(tmp_path / "out")
    assert torch.equal(got[LAYERS[0]], values[LAYERS[0]].bfloat16())


def test_one_shard_file(tmp_path: Path) -> None:
    parts, value = CASES["bitsandbytes int8"](LAYERS[0], SHAPE, 0)
    write_model(tmp_path / "m", parts)
    (tmp_path / "m" / "config.json").unlink()
    file = next((tmp_path / "m").glob("*.safetensors"))
    assert sorted(load_file(file)) == sorted(parts)
    assert torch.equal(open_source(file).read(LAYERS[0]), value)


def test_another_process_reads_the_same(tmp_path: Path, case: Case) -> None:
    """A source travels to Ray's workers, where its files are opened anew."""
    values = model(tmp_path / "m", case, 0)
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "m")))
    assert torch.equal(source.read(LAYERS[0], 3, 9), values[LAYERS[0]][3:9])


def test_a_plan_counts_what_the_parts_take(tmp_path: Path) -> None:
    model(tmp_path / "m", CASES["bitsandbytes NF4"], 0)
    source = open_source(tmp_path / "m")
    demand = source.demand(LAYERS[0])
    assert 64 * 64 // 2 <= demand.read < 64 * 64
    assert demand.memory >= 64 * 64 * 4
    assert demand.by == "torch"
