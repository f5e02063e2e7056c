"""Tied tensors: what is tied is said by configs, classes and shared storage; outputs give the logits that plain torch gives, once reloaded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

import thetau
from fixtures import random_weights, shifted, write_model
from thetau.engine.patchwork import Patchwork
from thetau.errors import AlignmentError
from tiny_decoders import dense

transformers = pytest.importorskip("transformers")
State = dict[str, Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[3, 5, 7, 4, 6]])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is probably not the model:thetau.ThetauWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing.*:FutureWarning"
    ),  # PEFT asks transformers for what it is renaming
]


def model(folder: Path, seed: int, **config: Any) -> Path:
    return dense(folder, "llama", seed, num_hidden_layers=1, **{"tie_word_embeddings": True, **config})


def state(folder: Path) -> State:
    """As stored, and the head that the stored config implies."""
    found = load_file(folder / "model.safetensors")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return found if not tied or HEAD in found else found | {HEAD: found[EMBED]}


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return transformers.LlamaForCausalLM.from_pretrained(folder).eval()(IDS).logits


def expected(folder: Path, weights: State) -> Tensor:
    """Logits of a live model whose head is a tensor of its own."""
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    live = transformers.LlamaForCausalLM(config).eval()
    live.load_state_dict(weights)
    with torch.no_grad():
        return live(IDS).logits


def average(*states: State) -> State:
    return {name: sum(one[name] for one in states) / len(states) for name in states[0]}


def told(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


def test_all_tied_stay_tied(tmp_path: Path) -> None:
    folders = [model(tmp_path / str(seed), seed) for seed in range(3)]
    base, *others = [thetau.open(folder) for folder in folders]
    (base + thetau.merge([one - base for one in others], thetau.methods.TaskArithmetic(scale=0.5))).save(tmp_path / "out")
    states = [state(folder) for folder in folders]
    want = {name: states[0][name] + 0.5 * sum(one[name] - states[0][name] for one in states[1:]) for name in states[0]}
    assert told(tmp_path / "out") and HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(logits(tmp_path / "out"), expected(folders[0], want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [thetau.methods.Average(), thetau.methods.Ties(density=1.0)])
def test_one_fine_tune_with_a_head_of_its_own(tmp_path: Path, method: Any) -> None:
    folders = [model(tmp_path / "base", 0), model(tmp_path / "tied", 1), model(tmp_path / "own", 2, tie_word_embeddings=False)]
    base, *others = [thetau.open(folder) for folder in folders]
    report = (base + thetau.merge([one - base for one in others], method)).save(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    states = [state(folder) for folder in folders]
    assert not told(tmp_path / "out")
    assert any("is a tensor of its own" in note for note in report.notes)
    if isinstance(method, thetau.methods.Average):
        want = average(*states[1:])
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(tmp_path / "out"), expected(folders[0], want), rtol=1e-4, atol=1e-4)
    assert not torch.equal(got[HEAD], got[EMBED])
    torch.testing.assert_close(logits(tmp_path / "out"), expected(folders[0], got), rtol=1e-4, atol=1e-4)
    assert thetau.facade.verify(tmp_path / "out").good


def test_a_base_with_a_head_and_a_tied_fine_tune(tmp_path: Path) -> None:
    folders = [model(tmp_path / "base", 0, tie_word_embeddings=False), model(tmp_path / "tied", 1)]
    base, tied = (thetau.open(folder) for folder in folders)
    (base + 0.5 * (tied - base)).save(tmp_path / "out")
    want = average(*(state(folder) for folder in folders))
    torch.testing.assert_close(logits(tmp_path / "out"), expected(folders[0], want), rtol=1e-4, atol=1e-4)


def stored_twice(folder: Path, seed: int, moved: float = 0.0) -> Path:
    """Both copies under a config that says tied."""
    model(folder, seed)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBED] + moved}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_copies_get_one_mask(tmp_path: Path) -> None:
    folders = [stored_twice(tmp_path / str(seed), seed) for seed in range(3)]
    base, *others = [thetau.open(folder) for folder in folders]
    dare = thetau.methods.DareLinear(drop=0.5)
    (base + thetau.merge([one - base for one in others], dare)).save(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got[HEAD], got[EMBED]) and told(tmp_path / "out")
    for number, folder in enumerate(folders):
        weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if name != HEAD}
        write_model(tmp_path / "once" / str(number), weights, json.loads((folder / "config.json").read_text()))
    start, *rest = [thetau.open(tmp_path / "once" / str(number)) for number in range(3)]
    want = (start + thetau.merge([one - start for one in rest], dare)).state_dict()
    assert torch.equal(got[EMBED], want[EMBED])  # the same mask as where one copy is stored
    assert thetau.gram([others[0] - base])[0, 0] == thetau.gram([rest[0] - start])[0, 0]  # and counted once


def test_two_copies_that_differ_are_believed(tmp_path: Path) -> None:
    folders = [stored_twice(tmp_path / "base", 0), stored_twice(tmp_path / "model", 1, moved=0.1)]
    base, other = (thetau.open(folder) for folder in folders)
    (base + 0.5 * (other - base)).save(tmp_path / "out")
    want = average(*(load_file(folder / "model.safetensors") for folder in folders))
    assert not told(tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), expected(folders[0], want), rtol=1e-4, atol=1e-4)


def test_an_excluded_copy_unties(tmp_path: Path) -> None:
    folders = [stored_twice(tmp_path / str(seed), seed) for seed in range(2)]
    base, other = (thetau.open(folder) for folder in folders)
    (base + thetau.merge([other - base], thetau.methods.TaskArithmetic(scale=1.0), exclude=[HEAD])).save(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert not told(tmp_path / "out")
    assert torch.equal(got[HEAD], load_file(folders[0] / "model.safetensors")[HEAD])
    torch.testing.assert_close(got[EMBED], load_file(folders[1] / "model.safetensors")[EMBED])


def test_equal_experts_are_no_tie(tmp_path: Path) -> None:
    """A lost expert was silently replaced by another one whose values were the same in the base."""
    base = {f"layers.0.mlp.experts.{n}.w1.weight": torch.ones(3, 2) for n in range(3)}
    other = {name: value + n for n, (name, value) in enumerate(base.items())}
    del other["layers.0.mlp.experts.2.w1.weight"]
    with pytest.raises(AlignmentError, match="lacks 1 tensors"):
        thetau.merge([thetau.open(other) - thetau.open(base)], thetau.methods.Average())
    base["layers.0.mlp.experts.0.w1.weight"] = base["layers.0.mlp.experts.0.w1.weight"].clone()
    more = {**base, "layers.0.mlp.experts.3.w1.weight": torch.ones(3, 2)}
    with pytest.raises(AlignmentError, match="has 1 tensors"):
        thetau.merge([thetau.open(more) - thetau.open(base)], thetau.methods.Average())


def test_equal_values_without_a_word_are_no_tie(tmp_path: Path) -> None:
    weights = random_weights(0)
    copy = {**weights, HEAD: weights["embeddings.word_embeddings.weight"].clone()}
    with pytest.raises(AlignmentError, match=r"equal values alone do not"):
        thetau.merge([thetau.open(shifted(weights, 1)) - thetau.open(copy)], thetau.methods.Average())


def test_save_models_metadata_is_a_word(tmp_path: Path) -> None:
    """safetensors' `save_model` stores a shared tensor once and says so in the file."""
    module = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 3), "lm_head": torch.nn.Linear(3, 5, bias=False)})
    module["lm_head"].weight = module["embed_tokens"].weight
    save_model(module, str(tmp_path / "model.safetensors"))
    base = {name: value.clone() for name, value in module.state_dict().items()}
    start = thetau.open(base)
    got = (
        start + thetau.merge([thetau.open(tmp_path / "model.safetensors") - start], thetau.methods.TaskArithmetic(scale=1.0))
    ).state_dict()
    assert all(torch.equal(got[name], base[name]) for name in base)


@pytest.mark.parametrize(
    "stored",
    [["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"]],
)
def test_three_names_in_one_and_one_in_another(tmp_path: Path, stored: list[str]) -> None:
    config = transformers.T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]

    def weights(seed: int) -> State:
        torch.manual_seed(seed)
        return {name: value.clone() for name, value in transformers.T5ForConditionalGeneration(config).state_dict().items()}

    config.architectures = ["T5ForConditionalGeneration"]
    base, other = weights(0), weights(1)
    fewer = {name: value for name, value in other.items() if name not in names or name in stored}
    start = thetau.open(write_model(tmp_path / "base", base, config.to_dict()))
    vector = thetau.merge(
        [thetau.open(write_model(tmp_path / "other", fewer, config.to_dict())) - start], thetau.methods.TaskArithmetic(scale=0.5)
    )
    got = (start + vector).state_dict()
    for name, value in base.items():
        torch.testing.assert_close(got[name], value + 0.5 * (other[name] - value), msg=name)
    back = thetau.open(write_model(tmp_path / "few", fewer, config.to_dict()))
    got = (back + thetau.merge([thetau.open(tmp_path / "base") - back], thetau.methods.TaskArithmetic(scale=0.5))).state_dict()
    assert got.keys() == fewer.keys()
    torch.testing.assert_close(got[stored[0]], (other[stored[0]] + base[stored[0]]) / 2)


# Adapters over a tied base


def adapted(base: Path, folder: Path, **settings: Any) -> Tensor:
    """Train nothing, draw everything: an adapter, and the logits that PEFT's live model gives with it."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ties
        torch.manual_seed(3)
        module = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, init_lora_weights=False, **settings)
        )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "modules_to_save" in name or "trainable_tokens" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        module.save_pretrained(folder)
        with torch.no_grad():
            return module.eval()(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=[
        "both saved",
        "embedding saved",
        "head saved",
        "head adapted",
        "embedding adapted",
        "both adapted",
        "neither",
        "tokens",
        "tokens of both",
        "tokens, tied",
        "embedding saved, tied",
        "head saved, tied",
        "head adapted, tied",
        "embedding adapted, tied",
    ],
)
def test_adapters_over_a_tied_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = model(tmp_path / "base", 0)
    want = adapted(base, tmp_path / "adapter", **settings)
    opened = thetau.open(tmp_path / "adapter", base=base)
    opened.save(tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), want, rtol=1e-4, atol=1e-4)
    start = thetau.open(base)
    (opened - start).save(tmp_path / "vector.safetensors")
    (start + thetau.open(tmp_path / "vector.safetensors")).save(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), want, rtol=1e-4, atol=1e-4)
    (start + thetau.merge([opened - start], thetau.methods.TaskArithmetic(scale=1.0))).save(tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("twice", [False, True])
def test_a_model_of_a_base_and_an_adapter_as_one_source(tmp_path: Path, saved: list[str], twice: bool) -> None:
    """As recipes that move layers take it; over a base that stores one copy, or both."""
    base = (stored_twice if twice else model)(tmp_path / "base", 0)
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=saved)
    opened = thetau.open(tmp_path / "adapter", base=base)
    source = Patchwork.of(opened, label="one")
    want = opened.state_dict()
    assert want.keys() == source.specs.keys() and HEAD in want
    for name, value in want.items():
        assert torch.equal(source.read(name), value), name
