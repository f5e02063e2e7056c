"""Mixtures of experts out of dense models, from mergekit-moe's configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import thetau
from thetau.checkpoint import open_source
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, CheckpointError, RecipeError, ThetauError
from thetau.facade import Expression, ThetauWarning
from thetau.models import gates as live
from thetau.models.gates import prompt_states
from thetau.recipes.mergekit.moe import is_moe, moe
from thetau.recipes.mergekit.moe.gates import Drawn
from tiny import one_thread  # noqa: F401
from tiny_decoders import dense, tokenizer

PROMPTS = [["cat dog meow", "purr"], ["sun rain bright warm dry"], ["question about the"], ["bone leash ."]]
SAID = torch.tensor([[1, 5, 9, 7, 12, 3, 20, 11]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Folders of a base and two others of a family."""
    root = tmp_path_factory.mktemp("dense")

    def make(family: str) -> list[str]:
        for seed in range(3):
            if not (root / f"{family}{seed}").exists():
                dense(root / f"{family}{seed}", family, seed)
        return [str(root / f"{family}{seed}") for seed in range(3)]

    return make


def experts(paths: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"source_model": path, "positive_prompts": PROMPTS[i], **more} for i, path in enumerate(paths)]


def written(document: dict[str, Any], folder: Path, **options: Any) -> Path:
    made = moe(document, **options)
    Expression(((1.0, made),), reference=made).save(folder)
    return folder


def stored(folder: str | Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def loaded(folder: Path) -> Any:
    """The model, every tensor of which is in the files and no other."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(SAID).logits
    return found


CASES = [
    ("llama", "mixtral", False, "MixtralForCausalLM"),
    ("mistral", "mixtral", False, "MixtralForCausalLM"),
    ("qwen2", "qwen", True, "Qwen2MoeForCausalLM"),
    ("llama", "qwen", True, "Qwen2MoeForCausalLM"),
    ("qwen3", "qwen3", False, "Qwen3MoeForCausalLM"),
]


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
@pytest.mark.parametrize(("family", "architecture", "shared", "name"), CASES)
def test_a_mixture_loads_and_runs_and_its_experts_are_the_models(
    family: str, architecture: str, shared: bool, name: str, models: Callable[..., list[str]], tmp_path: Path
) -> None:
    paths = models(family)
    document = {"base_model": paths[0], "experts": experts(paths[1:]), "architecture": architecture, "gate_mode": "hidden_avg"}
    if shared:
        document["shared_experts"] = [{"source_model": paths[0], "positive_prompts": PROMPTS[2]}]
    out = written(document, tmp_path / "out")
    model = loaded(out)
    assert type(model).__name__ == name
    assert torch.isfinite(logits(model)).all()
    tensors, base = stored(out), stored(paths[0])
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for expert, path in enumerate(paths[1:]):
        theirs = stored(path)
        for layer in range(3):
            for part, short in parts.items():
                inner = (
                    f"block_sparse_moe.experts.{expert}.{short}" if architecture == "mixtral" else f"mlp.experts.{expert}.{part}"
                )
                assert torch.equal(
                    tensors[f"model.layers.{layer}.{inner}.weight"], theirs[f"model.layers.{layer}.mlp.{part}.weight"]
                )
    assert all(torch.equal(tensors[key], value) for key, value in base.items() if ".mlp." not in key)
    if shared:
        assert torch.equal(tensors["model.layers.1.mlp.shared_expert.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert (out / "tokenizer.json").read_bytes() == (Path(paths[0]) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("family", "architecture"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3")])
def test_a_mixture_of_the_base_is_the_base(
    family: str, architecture: str, models: Callable[..., list[str]], tmp_path: Path
) -> None:
    base = models(family)[0]
    same = [{"source_model": base, "residual_scale": 1.0}] * 3
    out = written({"base_model": base, "experts": same, "architecture": architecture, "gate_mode": "random"}, tmp_path / "out")
    assert torch.allclose(logits(loaded(out)), logits(loaded(Path(base))), atol=1e-4)


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_gates_are_those_of_a_plain_computation(mode: str, models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    given = experts(paths[1:])
    given[0]["negative_prompts"] = PROMPTS[3]
    tensors = stored(written({"base_model": paths[0], "experts": given, "gate_mode": mode}, tmp_path / "out"))
    model, words = loaded(Path(paths[0])).double(), tokenizer()

    def look(prompts: list[str]) -> Tensor:  # one prompt at a time, so that nothing is padded
        found = []
        for text in prompts:
            ids = torch.tensor([words("<s>" + text, add_special_tokens=False)["input_ids"]])
            assert ids[0, 0] == 1
            with torch.no_grad():
                states = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
            if mode == "cheap_embed":
                found.append(model.model.embed_tokens(ids)[0].detach().sum(0).expand(3, -1))
            else:
                found.append(states.mean(1) if mode == "hidden_avg" else states[:, -1])
        if mode == "cheap_embed":
            return torch.nn.functional.normalize(torch.stack(found).sum(0), dim=-1)
        return torch.stack(found).mean(0)

    first = torch.nn.functional.normalize(look(PROMPTS[0]) - look(PROMPTS[3]), dim=-1)
    second = torch.nn.functional.normalize(look(PROMPTS[1]), dim=-1)
    for layer in range(3):
        gate = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        assert torch.allclose(gate, torch.stack([first[layer], second[layer]]), atol=2e-5)


def test_how_many_prompts_run_at_once_changes_no_gate(models: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(models("qwen3")[0])
    prompts = [text for some in PROMPTS for text in some]
    together = prompt_states(source, prompts, "mean")
    monkeypatch.setattr(live, "ACTIVATIONS", 1)
    assert together.shape == (5, 3, 16)
    assert torch.allclose(prompt_states(source, prompts, "mean"), together, atol=1e-5)
    with pytest.raises(CheckpointError, match="at most 64"):
        prompt_states(source, ["cat " * 70], "last")
    source.folder = None
    with pytest.raises(CheckpointError, match="it has no folder"):
        prompt_states(source, ["cat"], "last")


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
def test_deepseek_has_the_names_of_its_code_and_computes_as_it_does(models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    half = {"residual_scale": 0.5}
    document = {
        "base_model": paths[0],
        "experts": experts([paths[0]] * 2, **half),
        "shared_experts": [{"source_model": paths[0], **half}],
        "gate_mode": "random",
    }
    out = written(document, tmp_path / "out")
    config, tensors = json.loads((out / "config.json").read_text()), stored(out)
    assert (config["model_type"], config["n_routed_experts"], config["n_shared_experts"]) == ("deepseek", 2, 1)
    assert config["moe_intermediate_size"] == 24 and config["norm_topk_prob"] and config["num_experts_per_tok"] == 2
    inner = {name.split(".mlp.")[1] for name in tensors if ".layers.0.mlp." in name}
    matrices = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"{stem}.{part}.weight" for stem in ("experts.0", "experts.1", "shared_experts") for part in matrices}
    assert inner == {*wanted, "gate.weight"}

    class Mixture(torch.nn.Module):
        """DeepSeek-MoE (arXiv:2401.06066): softmax over the gate, the best k normalised, and the shared expert beside them."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def one(self, stem: str, x: Tensor) -> Tensor:
            gate, up, down = (tensors[f"model.layers.{self.layer}.mlp.{stem}.{part}.weight"] for part in matrices)
            return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

        def forward(self, x: Tensor) -> Tensor:
            shares = (x @ tensors[f"model.layers.{self.layer}.mlp.gate.weight"].T).softmax(-1)
            routed = sum(shares[..., e, None] * self.one(f"experts.{e}", x) for e in range(2))
            return routed + self.one("shared_experts", x)

    model = loaded(Path(paths[0]))
    before = logits(model)
    for index, layer in enumerate(model.model.layers):
        layer.mlp = Mixture(index)
    assert torch.allclose(logits(model), before, atol=1e-4), "half of the MLP twice is the MLP"


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
def test_scales_and_noise_are_as_said_and_the_seed_makes_them(models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    given = [
        {"source_model": paths[1], "noise_scale": 0.1, "residual_scale": 0.5},
        {"source_model": paths[2], "residual_scale": 0.25},
        {"source_model": paths[1], "noise_scale": 0.1, "residual_scale": 0.5},
    ]
    document = {"base_model": paths[0], "experts": given, "gate_mode": "uniform_random"}
    tensors = stored(written(document, tmp_path / "a", seed=3))
    theirs = [stored(path) for path in paths]
    name, short = "model.layers.{}.mlp.{}.weight", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    assert torch.equal(tensors[short.format(0, 1, "w2")], theirs[2][name.format(0, "down_proj")] * 0.25)
    assert torch.equal(tensors[short.format(0, 1, "w1")], theirs[2][name.format(0, "gate_proj")])
    parts = {"w1": ("gate_proj", 1.0), "w3": ("up_proj", 1.0), "w2": ("down_proj", 0.5)}
    noise = torch.cat(
        [
            ((tensors[short.format(layer, e, p)] / scale - theirs[1][name.format(layer, part)]) / 0.1).flatten()
            for layer in range(3)
            for e in (0, 2)
            for p, (part, scale) in parts.items()
        ]
    )
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5 and abs(noise.std() - 1) < 5 / (2 * len(noise)) ** 0.5
    assert not torch.equal(tensors[short.format(0, 0, "w1")], tensors[short.format(0, 2, "w1")]), "each expert has its own noise"
    gates = torch.cat([tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(3)])
    assert gates.abs().max() <= 0.25 and gates.std() > 0.1
    again, other = stored(written(document, tmp_path / "b", seed=3)), stored(written(document, tmp_path / "c", seed=4))
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert not torch.equal(tensors[short.format(0, 0, "w1")], other[short.format(0, 0, "w1")])


def test_noise_depends_on_nothing_but_seed_name_and_element() -> None:
    noise = Drawn({"a": (300, 400), "b": (300, 400)}, seed=1, what="noise")
    whole = noise.read("a")
    assert torch.equal(torch.cat([noise.read("a", 0, 7), noise.read("a", 7, 299), noise.read("a", 299)]), whole)
    assert torch.equal(Drawn({"a": (300, 400)}, seed=1, what="noise").read("a"), whole)
    assert not torch.equal(noise.read("b"), whole)
    assert abs(float((whole * noise.read("b")).mean())) < 5 / 120000**0.5


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
def test_a_recorded_recipe_makes_the_same_bits_again(models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    document = {"base_model": paths[0], "experts": experts(paths[1:], noise_scale=0.1), "gate_mode": "hidden"}
    made = moe(document, seed=7)
    said = json.loads(json.dumps(made.recipe()))
    assert is_moe(said) and said["seed"] == 7 and said["architecture"] == "mixtral"
    assert moe(said).key == made.key
    first, second = stored(written(document, tmp_path / "a", seed=7)), stored(written(said, tmp_path / "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
def test_an_adapter_is_part_of_base_and_expert(models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj", "q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for part, rows in (("mlp.up_proj", 24), ("self_attn.q_proj", 16)):
        stem = f"base_model.model.model.layers.1.{part}"
        deltas[f"{stem}.lora_A.weight"] = torch.randn(2, 16, generator=generator)
        deltas[f"{stem}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    from safetensors.torch import save_file

    save_file(deltas, adapter / "adapter_model.safetensors")
    document = {
        "base_model": f"{paths[0]}+{adapter}",
        "experts": [
            {"source_model": f"{paths[1]}+{adapter}", "positive_prompts": PROMPTS[0]},
            {"source_model": {"model": {"path": paths[2]}}, "positive_prompts": PROMPTS[1]},
        ],
    }
    tensors = stored(written(document, tmp_path / "out"))
    for part, ours, theirs in (
        ("mlp.up_proj", "block_sparse_moe.experts.0.w3", paths[1]),
        ("self_attn.q_proj", "self_attn.q_proj", paths[0]),
    ):
        stem = f"base_model.model.model.layers.1.{part}"
        want = (
            stored(theirs)[f"model.layers.1.{part}.weight"]
            + 2 * deltas[f"{stem}.lora_B.weight"] @ deltas[f"{stem}.lora_A.weight"]
        )
        assert torch.allclose(tensors[f"model.layers.1.{ours}.weight"], want, atol=1e-5)


@pytest.mark.filterwarnings("ignore::thetau.facade.ThetauWarning")
def test_dtypes_rope_and_silent_keys_go_over(models: Callable[..., list[str]], tmp_path: Path) -> None:
    base = dense(tmp_path / "base", "llama", 0, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    config = json.loads((base / "config.json").read_text())
    for key in ("rms_norm_eps", "num_key_value_heads"):
        config.pop(key)
    (base / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}))
    document = {"base_model": str(base), "experts": experts(models("llama")[1:]), "dtype": "bfloat16"}
    made = moe(document)
    out = written(document, tmp_path / "out")
    said = json.loads((out / "config.json").read_text())
    assert (said["rope_theta"], said["rms_norm_eps"], said["torch_dtype"]) == (5000.0, 1e-6, "bfloat16")
    assert {value.dtype for value in stored(out).values()} == {torch.bfloat16}
    assert any("rounded to bfloat16" in note for note in made.notes)
    model = loaded(out)
    assert model.config.rope_parameters["rope_theta"] == 5000.0 and model.config.rms_norm_eps == 1e-6


def test_a_window_is_dropped_and_said(models: Callable[..., list[str]]) -> None:
    paths = models("mistral")
    made = moe({"base_model": paths[0], "experts": experts(paths[1:]), "gate_mode": "random"})
    assert made.files["config.json"]["sliding_window"] is None
    assert any("window of 4096 tokens" in note for note in made.notes)


def test_gates_that_are_nearly_parallel_are_warned_of_with_their_layers(models: Callable[..., list[str]], tmp_path: Path) -> None:
    paths = models("llama")
    given = [
        {"source_model": paths[1], "positive_prompts": ["cat dog meow purr"]},
        {"source_model": paths[2], "positive_prompts": ["dog cat meow purr"]},
    ]
    made = moe({"base_model": paths[0], "experts": given, "gate_mode": "cheap_embed"})
    with pytest.warns(ThetauWarning) as caught:
        Expression(((1.0, made),), reference=made).save(tmp_path / "out")
    assert any("experts 0 and 1 are nearly parallel in every layer" in str(one.message) for one in caught)


def test_the_target_is_chosen_as_mergekit_does(models: Callable[..., list[str]]) -> None:
    paths = models("llama")

    def kind(**more: Any) -> str:
        document = {"base_model": paths[0], "experts": experts(paths[1:]), **more}
        return str(moe(document).files["config.json"]["model_type"])

    silent, prompted = {"source_model": paths[0]}, {"source_model": paths[0], "positive_prompts": PROMPTS[2]}
    assert kind() == "mixtral"
    assert kind(shared_experts=[silent]) == "deepseek"
    assert kind(shared_experts=[prompted]) == "qwen2_moe"
    assert kind(architecture="DeepSeek") == "deepseek"
    assert kind(architecture="qwen", shared_experts=[prompted]) == "qwen2_moe"


def broken(paths: list[str], **changed: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"base_model": paths[0], "experts": experts(paths[1:])}
    return {key: value for key, value in {**document, **changed}.items() if value != "gone"}


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"gate_mod": "hidden"}, "unknown key 'gate_mod'. Did you mean 'gate_mode'?"),
    ({"gate_mode": "hiden"}, "Did you mean 'hidden'?"),
    ({"base_model": "gone"}, "base_model is missing"),
    ({"experts_per_token": 3}, "at most the number of experts, 2. Got 3"),
    ({"experts_per_token": 0}, "experts_per_token"),
    ({"dtype": "bf16"}, "dtype: must be one of float32"),
    ({"architecture": "mixtrel"}, "Did you mean 'mixtral'?"),
    ({"architecture": "qwen3"}, "can be made of qwen3 models, the base's `model_type` is 'llama'"),
    ({"architecture": "qwen2_moe"}, "exactly one shared expert. Got 0"),
]


@pytest.mark.parametrize(("changed", "said"), PROBLEMS)
def test_what_a_config_says_wrong_is_said(changed: dict[str, Any], said: str, models: Callable[..., list[str]]) -> None:
    with pytest.raises(RecipeError) as caught:
        moe(broken(models("llama"), **changed), "moe.yaml")
    assert said in str(caught.value) and str(caught.value).startswith("moe.yaml: ")


def test_experts_that_make_no_sense_are_refused(models: Callable[..., list[str]]) -> None:
    a, b, c = models("llama")
    one = {"source_model": b, "positive_prompts": ["cat"]}
    for given, said in (
        ([{"source_model": b}, {"source_model": c}], "experts.0: `gate_mode: hidden` needs `positive_prompts`"),
        ([one, {**one, "source_model": c}], "the prompts are the same for all"),
        ([one, {**one, "positive_prompts": ["dog"]}], "all are the same model"),
        ([one, {"source_model": c, "positive_prompts": [" "]}], "a prompt must hold some text"),
        (
            [one, {"source_model": c, "positive_prompt": ["x"]}],
            "unknown key 'experts.1.positive_prompt'. Did you mean 'positive_prompts'?",
        ),
        ([one, {"model": c, "positive_prompts": ["x"]}], "experts.1.source_model is missing"),
        ([one, {"source_model": "x+y+z", "positive_prompts": ["x"]}], "takes one adapter"),
    ):
        with pytest.raises(RecipeError) as caught:
            moe({"base_model": a, "experts": given})
        assert said in str(caught.value)
    assert moe({"base_model": a, "experts": [one, {**one, "positive_prompts": ["dog"]}]}, allow_same=True)
    with pytest.raises(RecipeError) as caught:
        moe({"base_model": a, "experts": experts([b, c]), "architecture": "mixtral", "shared_experts": [{"source_model": a}]})
    assert "no shared expert. Got 1" in str(caught.value)


def test_models_that_do_not_fit_are_refused(models: Callable[..., list[str]], tmp_path: Path) -> None:
    a, b, _ = models("llama")
    for name, family, changed, said in (
        ("wide", "llama", {"intermediate_size": 32}, "intermediate_size 32, the base's 24"),
        ("deep", "llama", {"num_hidden_layers": 4}, "num_hidden_layers 4, the base's 3"),
        ("other", "mistral", {}, "model_type 'mistral', the base's 'llama'"),
        ("biased", "llama", {"mlp_bias": True}, "in its MLPs that no expert has"),
    ):
        path = str(dense(tmp_path / name, family, 1, **changed))
        with pytest.raises(AlignmentError) as caught:
            moe({"base_model": a, "experts": experts([b, path])})
        assert said in str(caught.value) and "experts.1" in str(caught.value)
    base = str(dense(tmp_path / "attention", "llama", 1, attention_bias=True))
    with pytest.raises(AlignmentError, match="a Mixtral has no place for"):
        moe({"base_model": base, "experts": experts([a, b])})
    config = tmp_path / "wide" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 32', '"intermediate_size": 24'))
    with pytest.raises(AlignmentError, match=r"of shape \[32, 16\]; the base has \[24, 16\]"):
        moe({"base_model": a, "experts": experts([b, str(tmp_path / "wide")])})
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        moe(
            {"base_model": str(Path(a) / "model.safetensors"), "experts": experts([a, b]), "gate_mode": "random"}
        ) if False else moe({"base_model": str(bare(tmp_path, a)), "experts": experts([a, b])})

    config = bare(tmp_path / "more", a) / "config.json"
    said = json.loads((Path(a) / "config.json").read_text())
    config.write_text(json.dumps({key: value for key, value in said.items() if key != "hidden_size"}))
    with pytest.raises(AlignmentError, match="It lacks hidden_size"):
        moe({"base_model": str(config.parent), "experts": experts([a, b])})


def bare(root: Path, model: str) -> Path:
    folder = root / "bare"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((Path(model) / "model.safetensors").read_bytes())
    return folder


def test_a_budget_that_no_layer_fits_is_refused_before_the_first_byte(models: Callable[..., list[str]]) -> None:
    paths = models("llama")
    with pytest.raises(ThetauError, match="one layer at a time"):
        moe({"base_model": paths[0], "experts": experts(paths[1:])}, engine=Engine(max_memory=1000))


def test_nothing_is_read_before_it_is_wanted(models: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = models("llama")
    source = type(open_source(paths[0]))

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(source, "read", refuse)
    made = moe({"base_model": paths[0], "experts": experts(paths[1:])})
    assert len(made.specs) == 3 * (6 + 1 + 2 * 3) + 3
    assert [walk.what for child in made.children() for walk in child.passes()] == [
        "run the base over the prompts, a layer at a time"
    ]


def test_only_such_configs_are_taken() -> None:
    assert is_moe({"base_model": "a", "experts": []})
    assert is_moe({"base_model": "a", "expert": [], "gate_mode": "hidden"})
    assert not is_moe({"base_model": "a", "models": [], "merge_method": "linear"})
    assert not is_moe([1]) and thetau.__version__
