"""GGUF files: written with the `gguf` package, read as transformers reads them and as the formats are defined."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import thetau
from fixtures import load_folder
from thetau.checkpoint import open_source
from thetau.errors import CheckpointError

HIDDEN, FFN, HEADS, KV, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 32
Kind = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny(family: str, seed: int) -> Any:
    options: dict[str, Any] = {"head_dim": HIDDEN // HEADS} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def paired(value: Tensor, heads: int) -> Tensor:
    """The two halves of each head, row by row in turn, as llama.cpp has them."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def write_gguf(path: Path, model: Any, kind: Kind, **fields: Any) -> dict[str, Tensor]:
    """A GGUF file of a model; the values that it holds, in the model's own order of rows, as the package dequantises them."""
    family = model.config.model_type
    writer = gguf.GGUFWriter(str(path), family)
    config = model.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    values = {}
    for name, value in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(rest, 0) if family == "llama" else 0
        stored = paired(value, heads) if heads else value
        to = f"blk.{layer}.{NAMES[rest]}.{end}" if rest in NAMES else f"{NAMES[stem]}.{end}"
        flat = stored.float().numpy()
        if stored.ndim < 2:
            writer.add_tensor(to, flat)
            values[name] = value
            continue
        raw = gguf.quants.quantize(flat, kind)
        writer.add_tensor(to, raw, raw_shape=raw.shape, raw_dtype=kind)
        back = torch.from_numpy(gguf.quants.dequantize(raw, kind)).float().reshape(stored.shape)
        if heads:  # back to the model's order: of pairs, all the first ones of a head, then all the second
            back = back.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        values[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_rows(tmp_path: Path, family: str, kind: Kind) -> None:
    values = write_gguf(tmp_path / "m.gguf", tiny(family, 0), kind)
    source = open_source(tmp_path / "m.gguf")
    assert sorted(source.specs) == sorted(values)
    for name, want in values.items():
        assert source.specs[name].shape == tuple(want.shape)
        assert torch.equal(source.read(name).float(), want), name
        assert torch.equal(
            source.read(name, 5, 77 if want.shape[0] > 77 else 9).float(), want[5 : 77 if want.shape[0] > 77 else 9]
        )


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_the_output_runs_in_transformers(tmp_path: Path, family: str) -> None:
    model = tiny(family, 0)
    values = write_gguf(tmp_path / "m.gguf", model, Kind.Q8_0)
    report = thetau.open(tmp_path / "m.gguf").save(tmp_path / "out", dtype="float32")
    assert any("a GGUF file (Q8_0), read dequantised under the names of transformers" in note for note in report.notes)
    got = load_folder(tmp_path / "out")
    assert all(torch.equal(got[name], value) for name, value in values.items())
    model.load_state_dict(values)
    tokens = torch.tensor([[1, 5, 7, 2, 4, 8]])
    with torch.no_grad():
        want = model(tokens).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")  # random weights are no fine-tune
def test_two_files_average_into_bfloat16(tmp_path: Path) -> None:
    values = [write_gguf(tmp_path / f"{name}.gguf", tiny("Llama", seed), Kind.Q4_0) for seed, name in enumerate("ab")]
    (0.5 * thetau.open(tmp_path / "a.gguf") + 0.5 * thetau.open(tmp_path / "b.gguf")).save(tmp_path / "out")
    got = load_folder(tmp_path / "out")
    for name, value in values[0].items():
        want = (value.double() + values[1][name].double()).div(2).float()
        assert torch.equal(got[name], want.to(got[name].dtype)), name
        assert got[name].dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_codes_of_eight_bits_by_their_definition(tmp_path: Path) -> None:
    """Q8_0: a half-precision scale and 32 signed codes; Q4_0: a scale and 16 bytes whose lower halves come first, less 8."""
    for kind, size in ((Kind.Q8_0, 34), (Kind.Q4_0, 18)):
        path = tmp_path / f"{kind.name}.gguf"
        write_gguf(path, tiny("Qwen2", 0), kind)
        reader = gguf.GGUFReader(str(path))
        raw = next(bytes(one.data.tobytes()) for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
        want = []
        for at in range(0, len(raw), size):
            scale = float(np.frombuffer(raw[at : at + 2], dtype=np.float16)[0])
            if kind == Kind.Q8_0:
                codes = list(struct.unpack("32b", raw[at + 2 : at + size]))
            else:
                codes = [byte & 15 for byte in raw[at + 2 : at + size]] + [byte >> 4 for byte in raw[at + 2 : at + size]]
                codes = [code - 8 for code in codes]
            want += [scale * code for code in codes]
        read = open_source(path).read("model.layers.1.mlp.up_proj.weight")
        assert torch.equal(read.reshape(-1), torch.tensor(want))


def test_a_folder_with_its_own_config(tmp_path: Path) -> None:
    model = tiny("Llama", 0)
    write_gguf(tmp_path / "m.gguf", model, Kind.Q8_0, llama__rope__scaling__type="linear")
    with pytest.raises(CheckpointError, match=r"scales its rotary positions .* Put that config\.json"):
        open_source(tmp_path / "m.gguf")
    model.config.save_pretrained(tmp_path)
    thetau.open(tmp_path).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == HIDDEN


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny("Llama", 0), Kind.Q8_0)
    raw = path.read_bytes()
    for count in (0, 3, 40, 200, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut.gguf").write_bytes(raw[:count])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_source(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(
        raw.replace(
            b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
            b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00mamba",
        )
    )
    with pytest.raises(
        CheckpointError,
        match="architecture 'mamba' cannot be read; llama, qwen2, qwen3, smollm3, gemma, gemma2, gemma3, phi3 can",
    ):
        open_source(tmp_path / "other.gguf")
    (tmp_path / "odd.gguf").write_bytes(raw.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_xx\.weight' is no tensor of 'llama'"):
        open_source(tmp_path / "odd.gguf")


# Families whose names llama.cpp's own table gives, and whose config lies beside the file.

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {key: value for key, value in SMALL.items() if key != "head_dim"}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {key: value for key, value in SMALL.items() if key != "head_dim"}),
}


def small(family: str, seed: int) -> Any:
    name, config, sizes = MORE[family]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def converted(path: Path, family: str, model: Any) -> None:
    """A file as llama.cpp converts a model: names by the package's own table, Gemma's norms plus one, SmolLM3's queries and keys in pairs."""
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    table = gguf.get_tensor_name_map(next(one for one, said in gguf.MODEL_ARCH_NAMES.items() if said == family), 2)
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, end = name.rpartition(".")
        to = table.get_name(stem)
        assert to is not None, name
        stored = value + 1 if family.startswith("gemma") and name.endswith("norm.weight") else value
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2], 0) if family == "smollm3" else 0
        writer.add_tensor(f"{to}.{end}", (paired(stored, heads) if heads else stored).contiguous().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", MORE)
def test_more_families(tmp_path: Path, family: str) -> None:
    """Every tensor under its name in transformers, and the output runs as the model does."""
    model = small(family, 0)
    (tmp_path / "m").mkdir()
    converted(tmp_path / "m" / "m.gguf", family, model)
    with pytest.raises(
        CheckpointError, match=rf"m.gguf: does not say all that a config of '{family}' must. Put the original model's config.json"
    ):
        open_source(tmp_path / "m" / "m.gguf")
    model.config.save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m" / "m.gguf")
    for name, value in model.state_dict().items():
        if name in source.specs:
            torch.testing.assert_close(source.read(name), value, rtol=0, atol=2.0**-22)  # norms had one added and taken off
    thetau.open(tmp_path / "m" / "m.gguf").save(tmp_path / "out")
    tokens = torch.tensor([[1, 5, 7, 2, 4, 8]])
    live, said = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values())
    with torch.no_grad():
        torch.testing.assert_close(live.eval()(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is probably not the model that it was fine-tuned from")  # random weights are no fine-tune
def test_a_file_of_gemma_against_its_original(tmp_path: Path) -> None:
    """The folder that it was made of and the file are one model: their difference is what adding one to norms lost."""
    model = small("gemma2", 0)
    model.save_pretrained(tmp_path / "folder")
    converted(tmp_path / "folder" / "m.gguf", "gemma2", model)
    vector = (thetau.open(tmp_path / "folder" / "m.gguf") - thetau.open(tmp_path / "folder" / "model.safetensors")).state_dict()
    assert max(float(value.abs().max()) for value in vector.values()) <= 2.0**-22
