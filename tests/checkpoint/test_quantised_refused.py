"""What is no whole quantised checkpoint of a form that is read: refused, with the file, the tensor and the remedy."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from encoders import CASES
from fixtures import write_model
from thetau.checkpoint import open_source
from thetau.checkpoint.quantised.refused import METHODS
from thetau.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"
STEM = NAME.removesuffix(".weight")
Values = dict[str, Tensor]


def opened(folder: Path, form: str, change: Callable[[Values], object], **config: Any) -> str:
    """The message with which a changed checkpoint is refused."""
    parts, _ = CASES[form](NAME, (64, 64), 0)
    change(parts)
    write_model(folder, parts, {"quantization_config": CASES[form].config | config})
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    return str(caught.value)


LOST = [
    (form, name)
    for form, case in CASES.items()
    for name in case(NAME, (64, 64), 0)[0]
    if not name.endswith(("weight_format", "g_idx", "input_scale"))
]


@pytest.mark.parametrize(("form", "name"), LOST)
def test_a_part_is_missing(tmp_path: Path, form: str, name: str) -> None:
    """Whatever part of a weight is lost, nothing is read, and the message names the file and a tensor of that weight."""
    message = opened(tmp_path / "m", form, lambda parts: (parts.pop(name), parts.update({"norm.weight": torch.ones(3)})))
    assert str(tmp_path / "m") in message
    assert STEM in message or "none of" in message


ROWS = [
    (form, name) for form, name in LOST if not (name == NAME and form in ("fp8, a scale in all", "fp8, e5m2"))
]  # one scale fits any


@pytest.mark.parametrize(("form", "name"), ROWS)
def test_a_part_has_another_shape(tmp_path: Path, form: str, name: str) -> None:
    def cut(parts: Values) -> None:
        value = parts[name]
        parts[name] = torch.cat([value, value[:1]]) if value.ndim else torch.stack([value, value, value])

    message = opened(tmp_path / "m", form, cut)
    assert str(tmp_path / "m") in message
    assert STEM in message


@pytest.mark.parametrize("form", CASES)
def test_the_config_says_nothing(tmp_path: Path, form: str) -> None:
    parts, _ = CASES[form](NAME, (64, 64), 0)
    write_model(tmp_path / "m", parts, {"model_type": "llama"})
    with pytest.raises(CheckpointError, match=re.escape(STEM)) as caught:
        open_source(tmp_path / "m")
    if "weight_block_size" not in CASES[form].config:  # whose blocks nothing explains then
        assert "config.json says nothing of quantisation" in str(caught.value)


@pytest.mark.parametrize("form", CASES)
def test_the_config_says_another_form(tmp_path: Path, form: str) -> None:
    other = "gptq" if "GPTQ" not in form else "bitsandbytes"
    parts, _ = CASES[form](NAME, (64, 64), 0)
    write_model(tmp_path / "m", parts, {"quantization_config": {"quant_method": other, "bits": 4}})
    with pytest.raises(CheckpointError, match=re.escape(STEM)):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("form", CASES)
def test_the_config_says_quantised_where_nothing_is(tmp_path: Path, form: str) -> None:
    write_model(tmp_path / "m", {NAME: torch.ones(4, 4)}, {"quantization_config": CASES[form].config})
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "m")
    message = str(caught.value)
    assert str(tmp_path / "m" / "config.json") in message
    assert f"none of {tmp_path / 'm'} is: {NAME!r} is float32 and has no scales" in message
    assert "take this entry out of the config" in message


@pytest.mark.parametrize("method", METHODS)
def test_forms_that_are_not_read_are_refused_by_name(tmp_path: Path, method: str) -> None:
    write_model(tmp_path / "m", {NAME: torch.ones(4, 4)}, {"quantization_config": {"quant_method": method.upper()}})
    with pytest.raises(
        CheckpointError, match=rf"config.json: `{method}` weights cannot be read. Take the original, unquantised checkpoint"
    ):
        open_source(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("W_q", "hqq"),
        ("codebooks", "aqlm"),
        ("q_weight", "exl2"),
        ("trellis", "exl3"),
        ("weight._data", "quanto"),
        ("res_centroids", "vptq"),
    ],
)
def test_forms_that_are_not_read_are_told_by_their_tensors(name: str, method: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{STEM}.{name}' is a part of `{method}` weights, which cannot be read"):
        open_source({f"{STEM}.{name}": torch.ones(4, 4, dtype=torch.int32)})


@pytest.mark.parametrize(
    "end", ["qweight", "qzeros", "g_idx", "weight", "weight_packed", "weight.absmax", "experts_blocks", "weight_scale", "packed"]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_codes_are_never_a_buffer(end: str, dtype: torch.dtype) -> None:
    weights = {"norm.weight": torch.ones(4), f"{STEM}.{end}": torch.ones(4, 4, dtype=dtype)}
    with pytest.raises(CheckpointError, match=rf"'{STEM}\.{end}'"):
        thetau.open(weights)


@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv", "SCB", "weight_scale_2"])
def test_scales_are_never_a_weight(end: str) -> None:
    weights = {f"{STEM}.weight": torch.ones(4, 4), f"{STEM}.{end}": torch.ones(4)}
    with pytest.raises(CheckpointError, match=rf"'{STEM}\.{end}'|'{STEM}\.weight' must be int8"):
        thetau.open(weights)


def test_plain_models_stay_as_they_are(tmp_path: Path) -> None:
    """Counters, positions, masks and plain 8-bit floats belong to no quantised weight."""
    weights = {
        "embeddings.position_ids": torch.arange(8)[None],
        "bn.num_batches_tracked": torch.tensor(3),
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "attn.masked_bias": torch.tensor(-1e4),
        "layer_scale": torch.ones(3),
        "logit_scale": torch.tensor(2.0),
        "proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }
    write_model(tmp_path / "m", weights)
    source = open_source(tmp_path / "m")
    assert {name: source.specs[name].dtype.torch for name in weights} == {name: value.dtype for name, value in weights.items()}
    assert source.files == {}


def test_a_quantised_shard_without_its_scales(tmp_path: Path) -> None:
    one, _ = CASES["fp8, a scale a block"](NAME, (64, 64), 0)
    other, _ = CASES["fp8, a scale a block"]("model.layers.1.mlp.up_proj.weight", (64, 64), 1)
    other = {name: value for name, value in other.items() if "scale" not in name}
    write_model(tmp_path / "m", one | other, {"quantization_config": CASES["fp8, a scale a block"].config})
    with pytest.raises(
        CheckpointError, match=r"safetensors: 'model.layers.1.mlp.up_proj.weight' is a weight in fp8 and its scale .* is missing"
    ):
        open_source(tmp_path / "m")


def test_two_forms_for_one_tensor(tmp_path: Path) -> None:
    """Where two conversions fit a name, both are named."""
    parts, _ = CASES["integers"](NAME, (64, 64), 0)
    parts[f"{STEM}.SCB"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"in bitsandbytes int8|in compressed-tensors int8") as caught:
        open_source(parts)
    assert "bitsandbytes int8" in str(caught.value) and "compressed-tensors int8" in str(caught.value)


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("GPTQ, 4 bits", {"bits": 8}, "holds no 8-bit codes of 64 inputs"),
        ("GPTQ, 4 bits", {"checkpoint_format": "marlin"}, "GPTQ's format 'marlin'"),
        ("AWQ", {"version": "gemv"}, "AWQ's packing 'gemv'"),
        ("AWQ", {"bits": 3}, "with 3 bits"),
        ("fp8, a scale a block", {"weight_block_size": [16, 16]}, "must be a single number or have shape [4, 4], [64, 1]"),
    ],
)
def test_configs_that_lie(tmp_path: Path, form: str, config: dict[str, Any], message: str) -> None:
    assert message in opened(tmp_path / "m", form, lambda parts: None, **config)


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"shape": [64, 64]}',
        '{"shape": [64, -64], "blocksize": 64}',
        '{"shape": [64, 64], "blocksize": 63}',
        '{"shape": [4096], "blocksize": 64, "nested_offset": "x"}',
        '{"shape": [8, 8], "blocksize": 64}',
    ],
)
def test_damaged_states_of_bitsandbytes(tmp_path: Path, state: str) -> None:
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    raw = torch.tensor(list(state.encode()), dtype=torch.uint8)
    message = opened(tmp_path / "m", "bitsandbytes NF4", lambda parts: parts.update({key: raw}))
    assert NAME in message


def test_groups_beyond_the_scales(tmp_path: Path) -> None:
    message = opened(tmp_path / "m", "GPTQ, 4 bits", lambda parts: parts[f"{STEM}.g_idx"].fill_(2))
    assert "must give each input of" in message


WRONG = [None, 0, -1, 3, 1e400, "x", [], [4], {}, {"weights": 3}, True, [[1], 2], "gptq_v2"]


@pytest.mark.parametrize("form", CASES)
def test_nothing_but_our_own_errors(tmp_path: Path, form: str) -> None:
    """Whatever a config or a header says, it is read or refused, and no other error comes out."""
    draw = random.Random(form)
    parts, _ = CASES[form](NAME, (64, 64), 0)
    for trial in range(60):
        config = json.loads(json.dumps(CASES[form].config))
        changed = dict(parts)
        if draw.random() < 0.6:
            table = config
            while isinstance(table, dict) and table:
                key = draw.choice([*table, "group_size", "bits"])
                if isinstance(table.get(key), dict) and draw.random() < 0.8:
                    table = table[key]
                    continue
                table[key] = draw.choice(WRONG)
                break
        if draw.random() < 0.7:
            name = draw.choice(list(changed))
            value = changed[name]
            change = draw.choice(["cut", "flat", "dtype", "bytes", "name"])
            if change == "cut" and value.ndim:
                changed[name] = value[: draw.randrange(len(value) + 1)].clone()
            elif change == "flat":
                changed[name] = value.reshape(-1)
            elif change == "dtype":
                kind = draw.choice([torch.float32, torch.int64, torch.uint8, torch.int8, torch.bfloat16])
                value = (
                    value.view(torch.uint8) if value.dtype == torch.float4_e2m1fn_x2 else value
                )  # torch converts no such pairs
                changed[name] = value.float().nan_to_num(0).clamp(-100, 100).to(kind)
            elif change == "bytes":
                raw = value.reshape(-1).view(torch.uint8)
                changed[name] = (
                    torch.tensor([draw.randrange(256) for _ in range(raw.numel())], dtype=torch.uint8)
                    .view(value.dtype)
                    .reshape(value.shape)
                )
            else:
                changed[name + draw.choice(["_x", ".scales", "_scale"])] = changed.pop(name)
        write_model(tmp_path / f"m{trial}", changed, {"quantization_config": config})
        with contextlib.suppress(CheckpointError):
            source = open_source(tmp_path / f"m{trial}")
            for name, spec in source.specs.items():
                assert source.read(name).shape == spec.shape


def header(folder: Path, dtype: str, shape: list[int], size: int) -> Path:
    """A file with one tensor, in a dtype that torch need not know."""
    folder.mkdir()
    entry = json.dumps({NAME: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(size))
    return folder


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_six_bit_floats_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: tensor '{NAME}' is in {dtype}, the 6-bit floats of MXFP6"
    ) as caught:
        open_source(header(tmp_path / "m", dtype, [4, 8], 24))
    assert "Take the original, unquantised checkpoint" in str(caught.value)


def test_complex_numbers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is in C64, complex numbers, which cannot be read"):
        open_source(header(tmp_path / "m", "C64", [4, 8], 256))


@pytest.mark.parametrize(("shape", "size"), [([4, 7], 14), ([], 1), ([4, 8], 32)])
def test_pairs_of_numbers_that_do_not_fit_their_bytes(tmp_path: Path, shape: list[int], size: int) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor '{NAME}' of shape .* cannot lie at bytes 0:{size}"):
        open_source(header(tmp_path / "m", "F4", shape, size))


@pytest.mark.parametrize(("dtype", "what"), [("F4", "float4_e2m1fn_x2"), ("F8_E8M0", "float8_e8m0fnu")])
@pytest.mark.parametrize("kind", ["model", "task_vector"])
def test_codes_and_exponents_alone_are_no_weights(tmp_path: Path, dtype: str, what: str, kind: str) -> None:
    """Neither means a number without the other: they are never merged as floats, whatever the file says that it is."""
    size = 16 if dtype == "F4" else 32
    folder = tmp_path / "m"
    folder.mkdir()
    table = {"__metadata__": {"thetau.kind": kind}, NAME: {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, size]}}
    entry = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(size))
    with pytest.raises(CheckpointError, match=r"model.safetensors.*up_proj.weight") as caught:
        open_source(folder)
    assert what in str(caught.value) or "is missing" in str(caught.value)


def test_an_exponent_that_is_no_number(tmp_path: Path) -> None:
    """E8M0's last code is NaN: a merge refuses it, and never writes it."""
    parts, _ = CASES["MXFP8, exponents in E8M0"](NAME, (64, 64), 0)
    parts[f"{STEM}.weight_scale"].view(torch.uint8)[3, 1] = 255
    write_model(tmp_path / "m", parts, {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp8"}})
    with pytest.raises(CheckpointError, match=re.escape(NAME)):
        thetau.open(tmp_path / "m").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
