"""Routers of a merged mixture, calibrated on text: against least squares in plain torch, on models of four families."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import thetau
from commands import run
from thetau import methods
from thetau.checkpoint.dtypes import Dtype
from thetau.errors import AlignmentError, CheckpointError, DataError, RecipeError
from thetau.evidence import RouterConfig, calibrate_routers
from tiny import WORDS
from tiny_decoders import SIZES, dense, tokenizer

EXPERTS, D, LAYERS = 4, 16, 2
COMMON = SIZES | {"num_hidden_layers": LAYERS, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 4}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": EXPERTS, "head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8, "v_head_dim": 4}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
TEXTS = {
    "pets": ["cat meow purr whiskers", "dog bark bone", "the same cat is about a dog .", "whiskers", "leash bone bark the dog"],
    "sky": ["sun bright warm", "rain wet puddle cloud .", "is the other cloud dry", "warm sun . wet rain . the sun"],
}


def mixture(folder: Path, family: str, seed: int, start: Path | None = None, **changed: Any) -> Path:
    """A random mixture with a tokenizer, or one that is a little further on than another."""
    name, sizes = (FAMILIES | MORE)[family]
    words = tokenizer()
    config = getattr(transformers, f"{name}Config")(**COMMON | sizes | {"vocab_size": len(words)} | changed)
    kind = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config) if start is None else kind.from_pretrained(start, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data += (0.1 if start is None else 0.05) * torch.randn_like(parameter)
    model.to(changed.get("dtype", torch.float32)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def fit(**fields: Any) -> RouterConfig:
    """To all of the texts, unless they say otherwise."""
    return RouterConfig(**{"hold": 0} | fields)


@dataclass(frozen=True)
class Place:
    """A base, two fine-tuned models and their merge, on disk."""

    folder: Path

    def open(self, name: str) -> thetau.Expression:
        return thetau.open(self.folder / name)

    @property
    def models(self) -> dict[str, thetau.Expression]:
        return {task: self.open(task) for task in TEXTS}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    made: dict[str, Place] = {}

    def make(family: str) -> Place:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = mixture(folder / "base", family, 0)
            for seed, task in enumerate(TEXTS, 1):
                mixture(folder / task, family, seed, base)
            start = thetau.open(base)
            vectors = [thetau.open(folder / task) - start for task in TEXTS]
            (start + thetau.merge(vectors, methods.TaskArithmetic(scale=0.7))).save(folder / "merged")
            made[family] = Place(folder)
        return made[family]

    return make


# In plain torch.


def live(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gates(model: Any) -> list[Any]:
    return [layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate for layer in model.model.layers]


def inputs(model: Any, texts: Sequence[str]) -> list[Tensor]:
    """What each router reads, `[token, d]`, one text at a time; with a column of ones where it has a bias."""
    words, seen = tokenizer(), [[] for _ in gates(model)]  # type: list[list[Tensor]]
    handles = [
        gate.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0].reshape(-1, D)))
        for gate, into in zip(gates(model), seen, strict=True)
    ]
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([words(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    rows = [torch.cat(parts).double() for parts in seen]
    return [
        torch.cat([one, torch.ones(len(one), 1)], 1) if len(matrix(gate).T) > D else one
        for one, gate in zip(rows, gates(model), strict=True)
    ]


def matrix(gate: Any) -> Tensor:
    parts = [gate.weight.detach().double()]
    if "bias" in dict(gate.named_parameters()):
        parts.append(gate.bias.detach().double()[:, None])
    return torch.cat(parts, 1)


def put(gate: Any, values: Tensor) -> None:
    gate.weight.data = values[:, :D].float()
    if values.shape[1] > D:
        gate.bias.data = values[:, D].float()


def logits(place: Place) -> list[Tensor]:
    """What each router of the tasks' own models says, the tasks below one another."""
    found = []
    for task, texts in TEXTS.items():
        model = live(place.folder / task)
        found.append([rows @ matrix(gate).T for rows, gate in zip(inputs(model, texts), gates(model), strict=True)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def stacked(model: Any) -> list[Tensor]:
    """What each router of one model reads of the texts of all tasks."""
    return [torch.cat(parts) for parts in zip(*(inputs(model, texts) for texts in TEXTS.values()), strict=True)]


def least_squares(rows: Tensor, said: Tensor, start: Tensor, ridge: float) -> Tensor:
    """By the rows of the ridge below the data's."""
    root = (ridge * rows[:, :D].square().sum() / D).sqrt()
    left = torch.cat([rows, root * torch.eye(rows.shape[1], dtype=torch.float64)])
    right = torch.cat([said, root * start.T])
    return torch.linalg.lstsq(left, right).solution.T


def routers(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The routers of a state dict, by layer."""
    found = []
    for layer in range(LAYERS):
        mine = {
            name: value.double()
            for name, value in state.items()
            if f"layers.{layer}." in name and (".gate." in name or ".router." in name)
        }
        weight = next(value for name, value in mine.items() if name.endswith("weight"))
        biases = [value[:, None] for name, value in mine.items() if name.endswith("bias")]
        found.append(torch.cat([weight, *biases], 1))
    return found


def bound(values: Tensor, ridge: float) -> float:
    """Inputs of float32, through a system whose condition is no more than (tr H + ρ) / ρ = d / ridge + 1."""
    return float(8 * torch.finfo(torch.float32).eps * (D / ridge + 1) * values.abs().max())


# What it computes.


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_is_least_squares_with_the_rows_of_the_ridge(family: str, places: Callable[[str], Place]) -> None:
    place = places(family)
    result = calibrate_routers(place.open("merged"), place.models, TEXTS, fit(ridge=0.1, batch=2))
    model = live(place.folder / "merged")
    for rows, said, gate, got in zip(
        stacked(model), logits(place), gates(model), routers(result.model.state_dict()), strict=True
    ):
        want = least_squares(rows, said, matrix(gate), 0.1)
        assert (got - want).abs().max() < bound(want, 0.1)
        assert (got - matrix(gate)).abs().max() > 100 * bound(want, 0.1)  # it did move


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_as_many_rounds_as_layers_are_one_layer_after_the_other(family: str, places: Callable[[str], Place]) -> None:
    place, said = places(family), logits(places(family))
    shares: list[float] = []
    config = fit(ridge=0.1, rounds=LAYERS)
    result = calibrate_routers(place.open("merged"), place.models, TEXTS, config, tick=shares.append)
    assert sum(shares) == pytest.approx(1)
    model = live(place.folder / "merged")
    for layer, gate in enumerate(gates(model)):
        put(gate, least_squares(stacked(model)[layer], said[layer], matrix(gate), 0.1))
    for got, gate in zip(routers(result.model.state_dict()), gates(model), strict=True):
        assert (got - matrix(gate)).abs().max() < 4 * bound(got, 0.1)  # the error of the router below goes into the one above


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_nearer_to_those_of_the_tasks_models(family: str, places: Callable[[str], Place], tmp_path: Path) -> None:
    """Of the written models, as transformers runs them; and the errors that are reported are these."""
    place = places(family)
    result = calibrate_routers(place.open("merged"), place.models, TEXTS, fit())
    result.model.save(tmp_path / "calibrated")
    said = logits(place)
    for folder, told in ((place.folder / "merged", result.before), (tmp_path / "calibrated", result.after)):
        model = live(folder)
        errors = [
            float((y - rows @ matrix(gate).T).norm() / y.norm())
            for y, rows, gate in zip(said, stacked(model), gates(model), strict=True)
        ]
        assert list(told.values()) == pytest.approx(errors, rel=1e-4)
    assert all(result.after[name] < error for name, error in result.before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_that_is_the_merge_keeps_every_bit(family: str, places: Callable[[str], Place]) -> None:
    place = places(family)
    result = calibrate_routers(place.open("pets"), {"pets": place.open("pets")}, {"pets": TEXTS["pets"]}, fit(rounds=2))
    assert set(result.before.values()) == set(result.after.values()) == {0.0}
    before, after = place.open("pets").state_dict(), result.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "qwen2_moe",
            [f"model.layers.{layer}.mlp.{gate}.weight" for layer in range(LAYERS) for gate in ("gate", "shared_expert_gate")],
        ),
        ("granitemoe", [f"model.layers.{layer}.block_sparse_moe.router.layer.weight" for layer in range(LAYERS)]),
        ("deepseek_v3", ["model.layers.1.mlp.gate.weight"]),
    ],
)
def test_other_kinds_of_routers(family: str, names: list[str], places: Callable[[str], Place]) -> None:
    """Gates of shared experts, linear layers with names of their own, a dense first layer, and what is added to scores alone."""
    place = places(family)
    result = calibrate_routers(place.open("merged"), place.models, TEXTS, fit())
    assert list(result.before) == names
    assert all(result.after[name] < error for name, error in result.before.items())
    said = "1 tensor of a router is not multiplied by the inputs, and left as it was: 'model.layers.1.mlp.gate.e_score_correction_bias'."
    assert list(result.notes) == ([said] if family == "deepseek_v3" else [])
    before, after = place.open("merged").state_dict(), result.model.state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == set(names)


def test_a_large_ridge_leaves_routers_and_the_memory_of_sums_changes_nothing(places: Callable[[str], Place]) -> None:
    place = places("olmoe")

    def made(**fields: Any) -> list[Tensor]:
        return routers(calibrate_routers(place.open("merged"), place.models, TEXTS, fit(**fields)).model.state_dict())

    start = routers(place.open("merged").state_dict())
    for got, want in zip(made(ridge=1e9), start, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for one, other in zip(made(), made(memory=1), strict=True):  # a pass for each router
        assert torch.equal(one, other)


def test_little_text_is_said_and_changes_only_what_it_speaks_of(places: Callable[[str], Place]) -> None:
    """Of fewer tokens than directions the change lies in their span."""
    place, texts = places("mixtral"), {"pets": ["cat meow", "dog bark bone"]}
    result = calibrate_routers(place.open("merged"), {"pets": place.open("pets")}, texts)
    assert list(result.notes) == [
        "5 tokens for routers that read 16 numbers: in most directions they stay the merge's. Give more text."
    ]
    merged = live(place.folder / "merged")
    for rows, gate, got in zip(inputs(merged, texts["pets"]), gates(merged), routers(result.model.state_dict()), strict=True):
        change = got - matrix(gate)
        within = change @ torch.linalg.pinv(rows) @ rows
        assert (change - within).norm() < bound(got, 0.01)
        assert within.norm() > 100 * bound(got, 0.01)


def test_few_tokens_are_whole_texts_and_said(places: Callable[[str], Place]) -> None:
    place = places("olmoe")
    result = calibrate_routers(place.open("merged"), place.models, TEXTS, fit(tokens=8))
    assert result.tokens == {"pets": 7, "sky": 8}
    assert "pets: 2 of 5 texts are read, 7 tokens; `tokens` is 8." in result.notes
    alone = calibrate_routers(place.open("merged"), place.models, {task: texts[:2] for task, texts in TEXTS.items()}, fit())
    for one, other in zip(routers(result.model.state_dict()), routers(alone.model.state_dict()), strict=True):
        assert torch.equal(one, other)


def test_texts_that_are_held_back_change_nothing_and_are_measured(places: Callable[[str], Place]) -> None:
    place = places("olmoe")
    texts = {
        task: [*TEXTS[task][:4], "cat dog sun rain", *TEXTS[other][:3]] for task, other in (("pets", "sky"), ("sky", "pets"))
    }
    result = calibrate_routers(place.open("merged"), place.models, texts, RouterConfig(hold=3))
    kept = {task: [text for at, text in enumerate(some) if at not in (2, 5)] for task, some in texts.items()}
    alone = calibrate_routers(place.open("merged"), place.models, kept, fit())
    assert result.tokens == alone.tokens
    assert (result.before, result.after) == (alone.before, alone.after)
    assert not alone.held_before
    for one, other in zip(routers(result.model.state_dict()), routers(alone.model.state_dict()), strict=True):
        assert torch.equal(one, other)
    held = {task: [some[2], some[5]] for task, some in texts.items()}
    measured = calibrate_routers(place.open("merged"), place.models, held, fit())
    assert result.held_before == measured.before
    model = live(place.folder / "merged")
    for gate, values in zip(gates(model), routers(result.model.state_dict()), strict=True):
        put(gate, values)
    for layer, error in enumerate(result.held_after.values()):
        rows, said = [], []
        for task, some in held.items():
            own = live(place.folder / task)
            rows.append(inputs(model, some)[layer])
            said.append(inputs(own, some)[layer] @ matrix(gates(own)[layer]).T)
        missing = torch.cat(said) - torch.cat(rows) @ matrix(gates(model)[layer]).T
        assert error == pytest.approx(float(missing.norm() / torch.cat(said).norm()), rel=1e-4)


def test_a_fit_that_does_not_hold_is_said(places: Callable[[str], Place]) -> None:
    """With next to no ridge a fit to two tokens follows them, and other tokens pay for it."""
    place = places("mixtral")
    texts = {"pets": ["cat meow", "sun rain bright warm"]}
    result = calibrate_routers(place.open("merged"), {"pets": place.open("pets")}, texts, RouterConfig(hold=2, ridge=1e-8))
    farther = [name for name, error in result.held_before.items() if result.held_after[name] > error]
    assert any("On the texts that were held back" in note for note in result.notes) == bool(farther)
    assert farther


# What it writes.


def test_the_command_writes_a_model_of_which_only_the_routers_differ(
    places: Callable[[str], Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = places("mixtral"), tmp_path / "calibrated"
    for task, texts in TEXTS.items():
        (tmp_path / f"{task}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    given = [word for task in TEXTS for word in ("--text", f"{task}={tmp_path / task}.txt")]
    models = [f"{task}={place.folder / task}" for task in TEXTS]
    arguments = [
        "evidence",
        "routers",
        *models,
        "--merged",
        str(place.folder / "merged"),
        *given,
        "--set",
        "length=6",
        "-o",
        str(out),
    ]
    code, text = run(capsys, *arguments, "--json", str(tmp_path / "said.json"))
    assert code == 0, text
    assert "pets: 1 text is cut to 6 tokens." in text
    assert "model.layers.0.block_sparse_moe.gate.weight" in text
    verified = thetau.verify(out)
    assert verified.good, verified.problems
    before, after = place.open("merged").state_dict(), thetau.open(out).state_dict()
    assert before.keys() == after.keys()
    differing = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert differing == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(LAYERS)}
    live(out)(torch.tensor([[3, 4]]))
    assert (out / "tokenizer.json").read_bytes() == (place.folder / "merged" / "tokenizer.json").read_bytes()
    record = json.loads((out / "thetau.json").read_text(encoding="utf-8"))["recipe"]["merges"][0]["routers"]
    assert record["config"]["ridge"] == 0.01
    assert set(record["models"]) == set(record["texts"]) == set(TEXTS)
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert said["tokens"] == {task: record["texts"][task]["tokens"] for task in TEXTS}
    code, text = run(capsys, *arguments)
    assert code != 0
    assert "calibrated: exists. An output is never mixed with older files" in text


def test_a_bfloat16_merge_stays_one(places: Callable[[str], Place], tmp_path: Path) -> None:
    place = places("qwen3_moe")
    place.open("merged").save(tmp_path / "half", dtype="bfloat16")
    result = calibrate_routers(thetau.open(tmp_path / "half"), place.models, TEXTS, fit())
    result.model.save(tmp_path / "out")
    got = thetau.open(tmp_path / "out").specs()
    assert {spec.dtype for spec in got.values()} == {Dtype.BF16}
    assert all(result.after[name] < error for name, error in result.before.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_an_adapter_stands_for_its_model(places: Callable[[str], Place], tmp_path: Path) -> None:
    """A LoRA adapter over the base, and the model that PEFT makes of it."""
    peft = pytest.importorskip("peft", reason="adapters are made by peft")
    place = places("olmoe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(live(place.folder / "base"), settings)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "whole")
    texts = {"pets": TEXTS["pets"]}
    made = [
        calibrate_routers(place.open("merged"), {"pets": one}, texts).model.state_dict()
        for one in (thetau.open(tmp_path / "adapter", base=place.folder / "base"), thetau.open(tmp_path / "whole"))
    ]
    for one, other in zip(routers(made[0]), routers(made[1]), strict=True):
        assert (one - other).abs().max() < bound(other, 0.01)


# What it refuses.


def test_what_has_no_router_is_refused(tmp_path: Path) -> None:
    model = thetau.open(dense(tmp_path / "llama", "llama", 0))
    with pytest.raises(DataError, match="llama: has no router, so there is nothing to calibrate"):
        calibrate_routers(model, {"pets": model}, {"pets": ["cat"]})


def test_a_merge_that_was_never_written_is_refused(places: Callable[[str], Place]) -> None:
    place, start = places("mixtral"), places("mixtral").open("base")
    vectors = [model - start for model in place.models.values()]
    lazy = start + thetau.merge(vectors, methods.TaskArithmetic(scale=0.7))
    with pytest.raises(DataError, match=r"is no written model, and its weights are read more than once. Save the merge first"):
        calibrate_routers(lazy, place.models, TEXTS, fit())


def test_texts_that_are_not_there_are_refused(places: Callable[[str], Place]) -> None:
    place = places("olmoe")
    merged, models = place.open("merged"), place.models
    with pytest.raises(DataError, match="needs the fine-tuned model of a task"):
        calibrate_routers(merged, {}, {})
    with pytest.raises(DataError, match="sky: there is no text of this task"):
        calibrate_routers(merged, models, {"pets": ["cat"], "sky": ["", "  "]})
    with pytest.raises(DataError, match=r"sea: there is text of this task but no model. Models are given for pets, sky"):
        calibrate_routers(merged, models, TEXTS | {"sea": ["wet"]})


def test_another_tokenizer_is_refused(places: Callable[[str], Place], tmp_path: Path) -> None:
    place = places("olmoe")
    other = mixture(tmp_path / "other", "olmoe", 3)
    told = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = ["<unk>", "<s>", "</s>", *reversed(WORDS)]
    told["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (other / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(DataError, match="pets: its tokenizer reads 'cat meow purr whiskers' as other tokens than that of merged"):
        calibrate_routers(place.open("merged"), {"pets": thetau.open(other)}, {"pets": TEXTS["pets"]})


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    small = thetau.open(mixture(tmp_path / "small", "olmoe", 3, vocab_size=8))
    with pytest.raises(DataError, match=r"the model's embedding has 8 rows. Is the tokenizer that of this model"):
        calibrate_routers(small, {"pets": small}, {"pets": TEXTS["pets"]})


def test_models_of_other_sizes_and_families_are_refused(places: Callable[[str], Place], tmp_path: Path) -> None:
    place = places("olmoe")
    more = mixture(tmp_path / "more", "olmoe", 3, num_experts=6)
    with pytest.raises(
        AlignmentError, match=r"pets: the router 'model.layers.0.mlp.gate' has shape \[6, 16\]; the merged model's is \[4, 16\]"
    ):
        calibrate_routers(place.open("merged"), {"pets": thetau.open(more)}, {"pets": TEXTS["pets"]})
    llama = dense(tmp_path / "llama", "llama", 0)
    with pytest.raises(AlignmentError, match=r"pets: the router 'model.layers.0.mlp.gate' is not there"):
        calibrate_routers(place.open("merged"), {"pets": thetau.open(llama)}, {"pets": TEXTS["pets"]})


def test_what_cannot_run_is_refused(places: Callable[[str], Place], tmp_path: Path) -> None:
    place = places("olmoe")
    merged = place.open("merged")
    alone = thetau.open(place.open("pets").state_dict(), name="weights")
    with pytest.raises(CheckpointError, match=r"pets: has no config.json, and the model must run"):
        calibrate_routers(merged, {"pets": alone}, {"pets": TEXTS["pets"]})
    vector = place.open("pets") - place.open("base")
    with pytest.raises(CheckpointError, match="a model is needed to run, this is a task vector"):
        calibrate_routers(merged, {"pets": vector}, {"pets": TEXTS["pets"]})
    bare = tmp_path / "bare"
    merged.save(bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="bare: has no tokenizer, which must read the text"):
        calibrate_routers(thetau.open(bare), place.models, TEXTS, fit())
    (bare / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="bare: transformers cannot open its tokenizer"):
        calibrate_routers(thetau.open(bare), place.models, TEXTS, fit())


def test_inputs_that_overflow_are_refused(places: Callable[[str], Place]) -> None:
    """Weights that are finite, and hidden states that are not."""
    place = places("olmoe")
    large = place.open("pets").state_dict()
    large["model.layers.0.post_attention_layernorm.weight"].fill_(3e38)
    folder = place.folder / "large"
    mixture(folder, "olmoe", 0)
    save_file(large, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"pets: the inputs of 'model.layers.\d.mlp.gate' must be finite; they hold NaN or Inf"):
        calibrate_routers(place.open("merged"), {"pets": thetau.open(folder)}, {"pets": TEXTS["pets"]})


def test_the_command_says_what_is_wrong_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "evidence", "routers", "nameless", "--merged", "m", "-o", str(tmp_path / "out"))
    assert code != 0
    assert "each model must be given once, as TASK=MODEL. Got nameless." in text
    with pytest.raises(RecipeError, match="unknown key 'ridges'"):
        RouterConfig.of({"ridges": 1}, "here")
