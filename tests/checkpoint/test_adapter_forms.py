"""Every form of adapter against PEFT's own `merge_and_unload`: weights, and what the models then give."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thetau
from thetau.errors import AlignmentError, CheckpointError
from tiny_adapters import HIDDEN, PIXELS, TOKENS, Mixture, Pictures, gpt2, llama, unet

Build = Callable[[], nn.Module]


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}

CASES: dict[str, tuple[Build, Any, Mapping[str, Tensor]]] = {
    "convolutions": (Pictures, peft.LoraConfig(**LORA, target_modules=["conv", "point", "line", "out"]), PIXELS),
    "convolutions, DoRA": (Pictures, peft.LoraConfig(**LORA, use_dora=True, target_modules=["conv", "point", "line"]), PIXELS),
    "convolutions, rank-stabilised": (
        Pictures,
        peft.LoraConfig(**LORA, use_rslora=True, target_modules=["conv", "line"]),
        PIXELS,
    ),
    "biases of B": (Pictures, peft.LoraConfig(**LORA, lora_bias=True, target_modules=["conv", "out"]), PIXELS),
    "biases of B, GPT-2": (
        gpt2,
        peft.LoraConfig(**LORA, lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True),
        TOKENS,
    ),
    "DoRA, transposed": (
        gpt2,
        peft.LoraConfig(**LORA, use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        TOKENS,
    ),
    "DoRA, embedding": (llama, peft.LoraConfig(**LORA, use_dora=True, target_modules=["embed_tokens", "v_proj"]), TOKENS),
    "patterns": (
        llama,
        peft.LoraConfig(
            **LORA, target_modules=["q_proj", "v_proj"], rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 9}
        ),
        TOKENS,
    ),
    "trained tokens": (
        llama,
        peft.LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 0, 19]}),
        TOKENS,
    ),
    "trained tokens, a list": (llama, peft.LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 7]), TOKENS),
    "trained tokens alone": (llama, peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]), TOKENS),
    "experts": (
        Mixture,
        peft.LoraConfig(**LORA, target_modules=["first"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        HIDDEN,
    ),
    "experts, patterns": (
        Mixture,
        peft.LoraConfig(
            **LORA,
            target_modules=["first"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"gate_up_proj": 9},
        ),
        HIDDEN,
    ),
    "one parameter of the experts": (
        Mixture,
        peft.LoraConfig(**LORA, target_modules=[], target_parameters=["experts.down_proj"]),
        HIDDEN,
    ),
    "experts, transposed": (
        lambda: Mixture(transposed=True),
        peft.LoraConfig(**LORA, target_modules=["first"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        HIDDEN,
    ),
    "square experts, transposed": (
        lambda: Mixture(hidden=6, transposed=True),
        peft.LoraConfig(**LORA, target_modules=["first"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        HIDDEN,
    ),
    "square experts": (
        lambda: Mixture(hidden=6),
        peft.LoraConfig(**LORA, target_modules=["first"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        HIDDEN,
    ),
    "LoHa": (llama, peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"]), TOKENS),
    "LoHa, patterns": (
        llama,
        peft.LoHaConfig(
            r=3, alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 7}
        ),
        TOKENS,
    ),
    "LoHa, convolutions": (Pictures, peft.LoHaConfig(r=3, alpha=5, target_modules=["conv", "point", "line"]), PIXELS),
    "LoHa, cores": (
        Pictures,
        peft.LoHaConfig(r=3, alpha=5, target_modules=["conv", "line"], use_effective_conv2d=True),
        PIXELS,
    ),
    "LoKr": (llama, peft.LoKrConfig(r=2, alpha=5, target_modules=["q_proj", "down_proj"]), TOKENS),
    "LoKr, both decomposed": (llama, peft.LoKrConfig(r=1, alpha=5, target_modules=["q_proj"], decompose_both=True), TOKENS),
    "LoKr, whole factors": (llama, peft.LoKrConfig(r=64, alpha=5, target_modules=["q_proj"]), TOKENS),
    "LoKr, convolutions": (Pictures, peft.LoKrConfig(r=1, alpha=5, target_modules=["conv", "point", "line"]), PIXELS),
    "LoKr, cores": (
        Pictures,
        peft.LoKrConfig(r=1, alpha=5, target_modules=["conv"], use_effective_conv2d=True),  # PEFT fails on `line`
        PIXELS,
    ),
    "LoKr, whole kernels": (Pictures, peft.LoKrConfig(r=32, alpha=5, target_modules=["conv", "line"]), PIXELS),
    "(IA)³": (
        llama,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        TOKENS,
    ),
    "(IA)³, transposed": (
        gpt2,
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        TOKENS,
    ),
    "(IA)³, convolutions": (
        Pictures,
        peft.IA3Config(target_modules=["conv", "point"], feedforward_modules=["point"]),
        PIXELS,
    ),
}


def trained(
    tmp_path: Path, build: Build, config: Any, name: str = "adapter"
) -> tuple[Path, dict[str, Tensor], nn.Module, nn.Module]:
    """A folder of the adapter, the base's weights, the base, and the model that PEFT merges; parameters random."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on fan_in_fan_out, tied weights and embeddings
        torch.manual_seed(0)
        base = build()
        before = {key: value.clone() for key, value in base.state_dict().items()}
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        merged = model.merge_and_unload()
        torch.manual_seed(0)
        fresh = build()
    return tmp_path / name, before, fresh, merged


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_over_its_base_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    build, config, inputs = CASES[case]
    folder, before, fresh, merged = trained(tmp_path, build, config)
    got = thetau.open(folder, base=before).state_dict()
    want = merged.state_dict()
    moved = [name for name in before if not torch.equal(want[name], before[name])]
    assert moved, "the adapter must do something"
    assert sorted(got) == sorted(before)
    for name in before:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    fresh.load_state_dict(got)
    with torch.no_grad():
        ours, theirs = (
            out if isinstance(out, Tensor) else out.logits for out in (fresh.eval()(**inputs), merged.eval()(**inputs))
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["DoRA, transposed", "LoKr", "LoHa, cores", "experts", "trained tokens", "(IA)³"])
def test_rows_equal_the_whole_bit_for_bit(tmp_path: Path, case: str) -> None:
    build, config, _ = CASES[case]
    folder, before, _, _ = trained(tmp_path, build, config)
    base = thetau.open(before)
    source = (thetau.open(folder, base=base) - base).terms[0][1]
    for name, spec in source.specs.items():
        whole = source.read(name)
        for start, stop in ((0, 1), (1, spec.rows), (spec.rows // 2, spec.rows // 2 + 1), (2, 2)):
            assert torch.equal(source.read(name, start, stop), whole[start:stop]), name


def test_convolutions_in_groups_are_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AlignmentError, match="A convolution in groups has no low-rank difference"):
        thetau.open(tmp_path / "adapter", base=build())


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    """PEFT writes each into a folder of its own but `default`; the state of a training run has them in one file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(3, 3))
        weights = {"0.weight": base[0].weight.detach().clone(), "0.bias": base[0].bias.detach().clone()}
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        model.add_adapter("second", config)
    model.save_pretrained(tmp_path / "both")
    state = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    (tmp_path / "state").mkdir()
    save_file(state, tmp_path / "state" / "adapter_model.safetensors")
    (tmp_path / "state" / "adapter_config.json").write_text((tmp_path / "both" / "adapter_config.json").read_text())
    first, second = (model.base_model.model[0].get_delta_weight(name) + weights["0.weight"] for name in ("default", "second"))
    for path, want in (("both", first), ("both#second", second), ("state#default", first), ("state#second", second)):
        got = thetau.open(str(tmp_path / path), base=weights).state_dict()["0.weight"]
        torch.testing.assert_close(got, want, msg=path)
    with pytest.raises(CheckpointError, match=r"holds 2 adapters \(default, second\)\. Choose one: `.*state#default`"):
        thetau.open(tmp_path / "state", base=weights)
    with pytest.raises(CheckpointError, match=r"holds no adapter 'secnd'\. Did you mean 'second'\?"):
        thetau.open(f"{tmp_path}/state#secnd", base=weights)


# Kohya's and diffusers' files.


def parts() -> dict[str, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return {
            "down_blocks.0.attentions.0.to_q": (torch.randn(2, 4), torch.randn(4, 2)),
            "down_blocks.0.resnets.0.conv1": (torch.randn(3, 3, 3, 3), torch.randn(4, 3, 1, 1)),
        }


def expected(scale: Callable[[int], float]) -> dict[str, Tensor]:
    """The base with B·A · scale(rank), the convolution's product entry by entry."""
    out = unet()
    for path, (a, b) in parts().items():
        delta = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape(out[f"{path}.weight"].shape)
        out[f"{path}.weight"] = out[f"{path}.weight"] + scale(len(a)) * delta
    return out


def kohya(alpha: float | None) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, (a, b) in parts().items():
        name = f"lora_unet_{path.replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        out |= {f"{name}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    return out


@pytest.mark.parametrize("alpha", [1.0, 8.0, None])
def test_kohyas_files(tmp_path: Path, alpha: float | None) -> None:
    save_file(kohya(alpha), tmp_path / "style.safetensors")
    got = thetau.open(tmp_path / "style.safetensors", base=unet()).state_dict()
    want = expected(lambda rank: 1.0 if alpha is None else alpha / rank)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-5, msg=name)


@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")])
def test_diffusers_files(tmp_path: Path, ends: tuple[str, str]) -> None:
    tensors = {f"unet.{path}.{end}": value for path, pair in parts().items() for end, value in zip(ends, pair, strict=True)}
    tensors |= {f"text_encoder.layer.q.{ends[0]}": torch.ones(1, 4), f"text_encoder.layer.q.{ends[1]}": torch.ones(4, 1)}
    (tmp_path / "style").mkdir()
    save_file(tensors, tmp_path / "style" / "pytorch_lora_weights.safetensors")
    model = thetau.open(tmp_path / "style", base=unet())
    for name, value in expected(lambda rank: 1.0).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-5, msg=name)
    assert any("1 modules of 'text_encoder' are left out" in note for note in model.save(tmp_path / "out").notes)


def test_processors_of_older_diffusers(tmp_path: Path) -> None:
    base = {"mid.attn1.to_q.weight": torch.zeros(3, 3)}
    tensors = {
        "unet.mid.attn1.processor.to_q_lora.down.weight": torch.ones(1, 3),
        "unet.mid.attn1.processor.to_q_lora.up.weight": torch.ones(3, 1),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    assert torch.equal(
        thetau.open(tmp_path / "old.safetensors", base=base).state_dict()["mid.attn1.to_q.weight"], torch.ones(3, 3)
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lora_unet_x.dora_scale": torch.ones(4, 1)}, r"holds LyCORIS's DoRA \('lora_unet_x\.dora_scale'\)"),
        ({"lora_unet_x.hada_w1_a": torch.ones(4, 1)}, r"holds LyCORIS's LoHa \('lora_unet_x\.hada_w1_a'\)"),
        ({"lora_unet_x.oft_blocks": torch.ones(4, 1)}, r"holds OFT \('lora_unet_x\.oft_blocks'\)"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(4, 1)}, r"holds LoCon's Tucker form"),
        ({"something.else": torch.ones(4, 1)}, r"holds an unknown layout \('something\.else'\)"),
    ],
)
def test_parts_of_files_that_are_not_read(tmp_path: Path, extra: dict[str, Tensor], message: str) -> None:
    save_file(kohya(1.0) | extra, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=message):
        thetau.open(tmp_path / "style.safetensors", base=unet())


def test_kohyas_names_that_the_base_lacks_or_has_twice(tmp_path: Path) -> None:
    tensors = {name.replace("down_blocks_0", "input_blocks_0"): value for name, value in kohya(1.0).items()}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(AlignmentError, match=r"changes 'input_blocks_0_attentions_0_to_q.weight', which the base .* lacks"):
        thetau.open(tmp_path / "style.safetensors", base=unet())
    save_file(kohya(1.0), tmp_path / "style.safetensors")
    twice = unet() | {"down.blocks.0.attentions.0.to_q.weight": torch.zeros(4, 4)}
    with pytest.raises(AlignmentError, match=r"may stand for 'down_blocks.0.attentions.0.to_q.weight' or 'down.blocks.0"):
        thetau.open(tmp_path / "style.safetensors", base=twice)


# Bad input.


BASE = {"a.weight": torch.eye(3), "e.weight": torch.ones(5, 3)}
PAIR = {"base_model.model.a.lora_A.weight": torch.ones(1, 3), "base_model.model.a.lora_B.weight": torch.ones(3, 1)}


def write(folder: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", None, PAIR)
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"is a PEFT adapter without its `adapter_config\.json`"):
            thetau.open(path, base=BASE)


def test_rank_zero(tmp_path: Path) -> None:
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(0, 3), "base_model.model.a.lora_B.weight": torch.ones(3, 0)}
    with pytest.raises(CheckpointError, match="gives 'a' rank 1, its weights have rank 0"):
        thetau.open(write(tmp_path / "adapter", {}, tensors), base=BASE)


def test_nan_in_a_names_the_adapters_file(tmp_path: Path) -> None:
    tensors = {name: value.clone() for name, value in PAIR.items()}
    tensors["base_model.model.a.lora_A.weight"][0, 1] = float("nan")
    folder = write(tmp_path / "adapter", {}, tensors)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: tensor 'a\.weight' holds 3 NaN"):
        thetau.open(folder, base=BASE).save(tmp_path / "out")


def test_an_adapter_of_another_model_gets_a_word(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    for said, warned in (("org/other", True), ("org/base", False), (str(tmp_path / "base"), False), (None, False)):
        folder = write(tmp_path / f"adapter-{said}".replace("/", "-"), {"base_model_name_or_path": said}, PAIR)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thetau.open(folder, base=tmp_path / "base").state_dict()
        assert any("says that it was trained on 'org/other'" in str(one.message) for one in caught) == warned, said


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(1, 3)}, "does not say which"),
        (
            {"trainable_token_indices": [7]},
            {"base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(1, 3)},
            r"changes 'e\.weight' in 1 rows up to 7, by shape \[1, 3\], the base .* has \[5, 3\]",
        ),
        ({"peft_type": "IA3"}, {"base_model.model.a.ia3_l": torch.ones(4, 1)}, r"by shape \[4, 1\], the base .* has \[3, 3\]"),
        ({"peft_type": "LOHA"}, {"base_model.model.a.hada_w1_a": torch.ones(3, 1)}, "'a' lacks its part 'hada_w1_b'"),
        ({"peft_type": "LOKR", "alpha": 1}, {"base_model.model.a.lokr_w1": torch.ones(3, 1)}, "'a' lacks its part 'lokr_w2_a'"),
        (
            {"peft_type": "LOKR", "alpha": 1},
            {"base_model.model.a.lokr_w1": torch.ones(2, 1), "base_model.model.a.lokr_w2": torch.ones(2, 2)},
            r"by 8 entries, the base .* has \[3, 3\]",
        ),
        ({}, PAIR | {"base_model.model.a.lora_B.bias": torch.ones(3)}, "whose layer has none in the base"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        thetau.open(write(tmp_path / "adapter", config, tensors), base=BASE)


def test_two_parameters_of_one_shape_are_not_guessed(tmp_path: Path) -> None:
    base = {"experts.gate_proj": torch.ones(2, 4, 3), "experts.up_proj": torch.ones(2, 4, 3)}
    tensors = {
        "base_model.model.experts.lora_A.weight": torch.ones(2, 3),
        "base_model.model.experts.lora_B.weight": torch.ones(4, 2),
    }
    config = {"target_parameters": ["experts.gate_proj", "experts.up_proj"]}
    with pytest.raises(AlignmentError, match=r"may stand for 'experts.gate_proj' or 'experts.up_proj', which have one shape"):
        thetau.open(write(tmp_path / "adapter", config, tensors), base=base)


def test_saved_adapters_are_what_their_files_say(tmp_path: Path) -> None:
    """The plain product of what lies in the file, as a check on PEFT too."""
    build, config, _ = CASES["convolutions"]
    folder, before, _, _ = trained(tmp_path, build, config)
    weights = load_file(folder / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.conv.lora_{side}.weight"] for side in "AB")
    want = before["conv.weight"] + 1.5 * (b.flatten(1) @ a.flatten(1)).reshape(8, 3, 3, 3)
    torch.testing.assert_close(thetau.open(folder, base=before).state_dict()["conv.weight"], want)
