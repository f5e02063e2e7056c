"""LoRA adapters against PEFT's own `merge_and_unload`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thetau
from fixtures import assert_same, bits
from thetau.checkpoint.lora import BLOCK, LoraSource
from thetau.errors import AlignmentError, CheckpointError

Build = Callable[[], nn.Module]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8
    )
    return transformers.BertModel(config)


def classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8
    )
    return transformers.LlamaForCausalLM(config)


def make(tmp_path: Path, build: Build, **lora: Any) -> tuple[Path, Path, dict[str, Tensor]]:
    """A base folder, an adapter folder with random A and B, and PEFT's merged weights."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on fan_in_fan_out, tied weights and embeddings
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(tmp_path / "base")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=lora.pop("r", 4), lora_alpha=lora.pop("lora_alpha", 6), **lora))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
    return tmp_path / "base", tmp_path / "adapter", load_file(tmp_path / "merged" / "model.safetensors")


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6), (name, (got[name] - value).abs().max())


CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "plain": (bert, {"target_modules": ["query", "value"]}),
    "all linear layers": (bert, {"target_modules": "all-linear"}),
    "rank-stabilised": (bert, {"target_modules": ["query", "dense"], "use_rslora": True}),
    "rank and alpha patterns": (
        bert,
        {
            "target_modules": ["query", "key", "dense"],
            "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 3},
            "alpha_pattern": {"key": 11, "layer.0.intermediate.dense": 5},
        },
    ),
    "rank-stabilised patterns": (bert, {"target_modules": ["query", "key"], "rank_pattern": {"query": 9}, "use_rslora": True}),
    "all biases": (bert, {"target_modules": ["query", "dense"], "bias": "all"}),
    "biases of LoRA layers": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "modules to save": (classifier, {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "a sequence classifier": (classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "embeddings": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "DoRA": (bert, {"target_modules": ["query", "dense"], "use_dora": True}),
    "rank-stabilised DoRA": (bert, {"target_modules": ["query"], "use_dora": True, "use_rslora": True}),
    "Gaussian start": (bert, {"target_modules": ["query"], "init_lora_weights": "gaussian"}),
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "GPT-2, square": (gpt2, {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "GPT-2, flag forgotten": (gpt2, {"target_modules": ["c_attn", "attn.c_proj"]}),
    "Llama": (llama, {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "Llama with embeddings and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "Llama with head saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_over_its_base_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    build, options = CASES[case]
    base_path, adapter, want = make(tmp_path, build, **options)
    base = thetau.open(base_path)
    before = base.state_dict()
    model = thetau.open(adapter, base=base)
    assert model.is_model
    assert_close(model.state_dict(), want)
    moved = [name for name in want if not torch.allclose(want[name], before[name], rtol=1e-5, atol=1e-6)]
    assert moved, "the adapter must do something"
    vector = (model - base).state_dict()
    assert [name for name in vector if vector[name].abs().max() > 1e-5] == [name for name in vector if name in moved]
    for name in moved:
        assert torch.allclose(vector[name], want[name] - before[name], rtol=1e-3, atol=1e-6), name


def test_mixed_linear_and_transposed_layers(tmp_path: Path) -> None:
    """PEFT keeps one flag for both, so only shapes and names can tell."""

    class Mixed(transformers.GPT2Model):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head = nn.Linear(16, 5, bias=False)
            self.square = nn.Linear(16, 16, bias=False)

    def build() -> nn.Module:
        return Mixed(transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))

    base, adapter, want = make(tmp_path, build, target_modules=["c_attn", "c_proj", "head", "square"])
    assert_close(thetau.open(adapter, base=base).state_dict(), want)


def test_minus_its_base_the_base_cancels_and_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_path, adapter, _ = make(tmp_path, bert, target_modules=["query"])
    base = thetau.open(base_path)
    vector = thetau.open(adapter, base=base) - base
    assert vector.is_vector
    assert [(weight, type(source)) for weight, source in vector.terms] == [(1.0, LoraSource)]
    weights, config = load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())
    delta = vector.state_dict()
    prefix = "base_model.model.encoder.layer.0.attention.self.query.lora_"
    want = weights[f"{prefix}B.weight"] @ weights[f"{prefix}A.weight"] * (config["lora_alpha"] / config["r"])
    assert torch.equal(delta["encoder.layer.0.attention.self.query.weight"], want)
    changed = {"encoder.layer.0.attention.self.query.weight", "encoder.layer.1.attention.self.query.weight"}
    assert {name for name, value in delta.items() if value.any()} == changed


def test_rows_equal_the_whole_bit_for_bit(tmp_path: Path) -> None:
    rows, width, rank = 3 * BLOCK // 64 + 17, 64, 5
    base = {
        "a.weight": torch.randn(rows, width),
        "b.weight": torch.randn(width, rows // 40),
        "e.weight": torch.randn(rows, width),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "use_dora": False}
    prefix = "base_model.model."
    tensors = {
        f"{prefix}a.lora_A.weight": torch.randn(rank, width),
        f"{prefix}a.lora_B.weight": torch.randn(rows, rank),
        f"{prefix}b.lora_A.weight": torch.randn(rank, rows // 40),
        f"{prefix}b.lora_B.weight": torch.randn(width, rank),
        f"{prefix}e.lora_embedding_A": torch.randn(rank, rows),
        f"{prefix}e.lora_embedding_B": torch.randn(width, rank),
    }
    source = (thetau.open(write_adapter(tmp_path / "adapter", config, tensors), base=base) - thetau.open(base)).terms[0][1]
    for name, spec in source.specs.items():
        whole = source.read(name)
        assert whole.shape == spec.shape
        for start, stop in [(0, 1), (1, 2), (7, spec.rows), (spec.rows - 1, spec.rows), (3, 3), (spec.rows // 3, spec.rows // 2)]:
            assert torch.equal(bits(source.read(name, start, stop)), bits(whole[start:stop])), (name, start, stop)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, torch_file: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if torch_file:
        torch.save(dict(tensors), folder / "adapter_model.bin")
    else:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


WEIGHTS = {"a.weight": torch.eye(3), "a.bias": torch.zeros(3), "head.weight": torch.ones(2, 3)}
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
LORA = {"base_model.model.a.lora_A.weight": torch.ones(1, 3), "base_model.model.a.lora_B.weight": torch.ones(3, 1)}


def test_the_older_torch_form(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA, torch_file=True)
    assert torch.equal(thetau.open(folder, base=WEIGHTS).state_dict()["a.weight"], torch.eye(3) + 2)


def test_a_base_with_another_prefix(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA)
    prefixed = {f"model.{name}": value for name, value in WEIGHTS.items()}
    assert torch.equal(thetau.open(folder, base=prefixed).state_dict()["model.a.weight"], torch.eye(3) + 2)
    longer = {name.replace("model.a", "model.model.a"): value for name, value in LORA.items()}
    folder = write_adapter(tmp_path / "longer", CONFIG, longer)
    assert torch.equal(thetau.open(folder, base=WEIGHTS).state_dict()["a.weight"], torch.eye(3) + 2)


def test_a_base_in_half_precision_gets_the_sum_rounded_once(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, {name: value / 3 for name, value in LORA.items()})
    base = {name: value.to(torch.bfloat16) for name, value in WEIGHTS.items()}
    got = thetau.open(folder, base=base).state_dict()
    third = torch.ones(1) / 3
    want = (torch.eye(3) + (third * third) * 2).to(torch.bfloat16)
    assert_same({"a.weight": got["a.weight"]}, {"a.weight": want})


def test_new_base_weights_and_low_rank_together(tmp_path: Path) -> None:
    """PEFT saves a targeted embedding's own weights too, which may have been trained or resized before."""
    tensors = LORA | {"base_model.model.a.base_layer.weight": 5 * torch.eye(3)}
    got = thetau.open(write_adapter(tmp_path / "adapter", CONFIG, tensors), base=WEIGHTS).state_dict()
    assert torch.equal(got["a.weight"], 5 * torch.eye(3) + 2)


def test_the_notes_name_the_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA)
    report = thetau.open(folder, base=WEIGHTS).save(tmp_path / "out")
    assert f"{folder}: LoRA adapter, restored over state dict of 3 tensors in 1 tensors." in report.notes


def test_nan_in_an_adapter_names_the_adapters_file(tmp_path: Path) -> None:
    tensors = {name: value.clone() for name, value in LORA.items()}
    tensors["base_model.model.a.lora_B.weight"][1, 0] = float("nan")
    folder = write_adapter(tmp_path / "adapter", CONFIG, tensors)
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: tensor 'a\.weight' holds 3 NaN and 0 infinite values of 9"
    ):
        thetau.open(folder, base=WEIGHTS).save(tmp_path / "out")


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "OFT"}, "only LORA, LOHA, LOKR, IA3, TRAINABLE_TOKENS adapters can be restored .* Got peft_type 'OFT'"),
        ({"peft_type": "ADALORA"}, "Got peft_type 'ADALORA'"),
        ({}, "Got peft_type None"),
        ([], "Got peft_type 'list'"),
        (CONFIG | {"layer_replication": [[0, 1]]}, "uses layer_replication, which thetau cannot restore"),
        (CONFIG | {"use_qalora": True}, "uses use_qalora, which thetau cannot restore"),
        (CONFIG | {"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights: pissa_niter_4` changed the base's own weights"),
        (CONFIG | {"init_lora_weights": "olora"}, "`init_lora_weights: olora` changed the base's own weights"),
        (CONFIG | {"r": 7}, "gives 'a' rank 7, its weights have rank 1"),
        (CONFIG | {"r": "x"}, "gives 'a' rank 'x', its weights have rank 1"),
        (CONFIG | {"lora_alpha": "x"}, "gives 'a' no usable rank or alpha"),
        (CONFIG | {"lora_alpha": None}, "gives 'a' no usable rank or alpha"),
        (CONFIG | {"rank_pattern": ["a"]}, "gives 'a' no usable rank or alpha"),
        (CONFIG | {"alpha_pattern": {"(": 3}}, "gives 'a' no usable rank or alpha"),
    ],
)
def test_configurations_that_cannot_be_restored(tmp_path: Path, config: Any, message: str) -> None:
    folder = write_adapter(tmp_path / "adapter", config, LORA)
    with pytest.raises(CheckpointError, match=message) as caught:
        thetau.open(folder, base=WEIGHTS)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a":' * 100_000])
def test_damaged_configurations(tmp_path: Path, content: bytes) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        thetau.open(folder, base=WEIGHTS)


P = "base_model.model."


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{P}a.lora_A.weight": torch.ones(1, 4), f"{P}a.lora_B.weight": torch.ones(3, 1)},
            r"changes 'a\.weight' by shape \[3, 4\], the base .* has \[3, 3\]",
        ),
        (
            {f"{P}a.lora_A.weight": torch.ones(1, 3), f"{P}a.lora_B.weight": torch.ones(3, 2)},
            r"\[1, 3\] and .* \[3, 2\] do not multiply",
        ),
        (
            {f"{P}a.lora_A.weight": torch.ones(1, 3, 1, 1), f"{P}a.lora_B.weight": torch.ones(3, 1, 1, 1)},
            r"changes 'a\.weight' by shape \[3, 3, 1, 1\], the base .* has \[3, 3\]",
        ),
        (
            {f"{P}a.lora_A.weight": torch.ones(1, 3), f"{P}a.lora_B.weight": torch.ones(3, 1, 1, 1)},
            "must be two matrices, or two convolutions of which B is 1 × 1",
        ),
        ({f"{P}a.lora_A.weight": torch.tensor(1.0), f"{P}a.lora_B.weight": torch.tensor(1.0)}, "must be matrices"),
        (
            {f"{P}b.lora_A.weight": torch.ones(1, 3), f"{P}b.lora_B.weight": torch.ones(3, 1)},
            r"changes 'b\.weight', which the base .* lacks\. Did you mean 'a\.weight'\?",
        ),
        ({f"{P}a.lora_A.weight": torch.ones(1, 3)}, "'a' has only one of its two LoRA matrices"),
        ({f"{P}a.lora_magnitude_vector.weight": torch.ones(3)}, "'a' has only one of its two LoRA matrices"),
        (LORA | {f"{P}a.lora_B.bias": torch.ones(2)}, r"changes 'a\.bias' by shape \[2\], the base .* has \[3\]"),
        (LORA | {f"{P}a.lora_C.bias": torch.ones(3)}, r"a\.lora_C\.bias' is a part of LoRA that thetau does not know"),
        (LORA | {f"{P}head.weight": torch.ones(5, 4)}, r"changes 'head\.weight' by shape \[5, 4\], the base .* has \[2, 3\]"),
        (LORA | {f"{P}head.weight": torch.ones(2, 3), f"{P}x.head.weight": torch.ones(2, 3)}, r"both stand for 'head\.weight'"),
        (
            LORA | {f"{P}a.lora_magnitude_vector.weight": torch.ones(1)},
            r"lora_magnitude_vector\.weight' by shape \[1\], the base .* has \[3\]",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, tensors)
    with pytest.raises(AlignmentError, match=message) as caught:
        thetau.open(folder, base=WEIGHTS)
    assert str(folder) in str(caught.value)


def test_a_saved_head_of_other_rows_is_left_out_by_name(tmp_path: Path) -> None:
    """Only the merge knows what is excluded, so it is the merge that refuses other labels, with both numbers."""
    base = thetau.open(WEIGHTS)
    vector = (
        thetau.open(write_adapter(tmp_path / "adapter", CONFIG, LORA | {f"{P}head.weight": torch.ones(5, 3)}), base=base) - base
    )
    with pytest.raises(AlignmentError, match=r"'head.weight' has another vocabulary: 5 rows instead of 2.*`exclude`"):
        vector.state_dict()
    assert "head.weight" not in vector.state_dict(exclude=["head.*"])


def test_all_problems_come_together(tmp_path: Path) -> None:
    tensors = {f"{P}{m}.lora_{side}.weight": torch.ones(1, 3) if side == "A" else torch.ones(3, 1) for m in "bc" for side in "AB"}
    with pytest.raises(AlignmentError) as caught:
        thetau.open(write_adapter(tmp_path / "adapter", CONFIG, tensors), base=WEIGHTS)
    assert "'c.weight'" in str(caught.value)
    assert "'b.weight'" in str(caught.value)


def test_a_task_head_beside_the_adapter_is_left_out_by_name(tmp_path: Path) -> None:
    tensors = LORA | {f"{P}haed.weight": torch.ones(2, 3)}
    base = thetau.open(WEIGHTS)
    vector = thetau.open(write_adapter(tmp_path / "adapter", CONFIG, tensors), base=base) - base
    with pytest.raises(
        AlignmentError, match=r"has 1 tensors that .* lacks: 'haed\.weight'\..*`exclude.*Did you mean 'head\.weight'\?"
    ):
        vector.state_dict()
    merged = thetau.merge([vector], thetau.methods.Average(), exclude=["haed.*"])
    with pytest.warns(thetau.ThetauWarning, match="probably not the model"):  # ones are a large step
        got = merged.state_dict()
    assert "haed.weight" not in got
    assert got["a.weight"].any()


def test_the_base_is_needed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA)
    with pytest.raises(
        CheckpointError, match=r"a LoRA adapter needs its base. Give it: `thetau.open\(adapter, base=...\)`, or `--base`"
    ):
        thetau.open(folder)
    base = thetau.open(WEIGHTS)
    with pytest.raises(AlignmentError, match=r"An adapter's base must be one opened checkpoint. Got <task vector"):
        thetau.open(folder, base=thetau.open(folder, base=base) - base)


def test_an_adapter_without_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", CONFIG, LORA)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        thetau.open(folder, base=WEIGHTS)
