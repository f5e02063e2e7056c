"""Second moments of linear layers against loops over examples and positions: every kind of layer, padding, resumption, the file, the command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thetau
from commands import run
from synthetic import relative
from thetau.errors import AlignmentError, DataError, OutputError, RecipeError
from thetau.evidence import MomentConfig, collect_second_moments
from thetau.evidence import moments as room
from thetau.evidence.files import read_facts
from thetau.evidence.layers import groups, layers_of, measurable, sharing, watched
from thetau.finetune import FinetuneConfig, finetune
from thetau.linalg.gram import add_upper, mirrored
from thetau.methods import RegMean
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.tasks import Task, encode, load_task, make_head
from tiny import make_model, make_task
from tiny import one_thread as one_thread

F32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task, and a model fine-tuned on it."""
    folder = tmp_path_factory.mktemp("moments")
    torch.set_num_threads(1)
    base = make_model(folder / "base")
    task = load_task(make_task(folder / "data", "animals"))
    finetune(load_encoder(base), task, folder / "tuned", FinetuneConfig(steps=10, lr=5e-3, batch_size=16), base=str(base))
    return folder


@pytest.fixture
def encoder(place: Path) -> Encoder:
    return load_encoder(place / "base")


@pytest.fixture
def task(place: Path) -> Task:
    return load_task(place / "data" / "animals")


def outer(rows: Tensor) -> Tensor:
    """Σ r rᵀ in float64, one row after the other."""
    total = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    for row in rows.reshape(-1, rows.shape[-1]).double():
        total += torch.outer(row, row)
    return total


@pytest.mark.parametrize("width", [3, 512, 1030])
def test_the_upper_triangle_in_strips_is_the_whole_product(width: int) -> None:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(width, width, dtype=torch.float64)
    add_upper(total, rows)
    want = rows.double().T @ rows.double()
    sizes = want.diagonal().sqrt()
    assert float(((mirrored(total) - want).abs() / (sizes[:, None] * sizes)).max()) <= 40 * F32


def test_grams_are_those_of_a_loop_over_examples_without_padding(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path
) -> None:
    weights = read_weights(place / "tuned")
    done: list[int] = []
    made = collect_second_moments(
        encoder, task, weights, tmp_path / "g.safetensors", "gram", MomentConfig(examples=12, batch=5), tick=done.append
    )
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert sum(done) == made.examples == 12
    found = load_file(tmp_path / "g.safetensors")
    inputs = encode(encoder, task, "train", max_length=64, limit=12)
    assert len(set(inputs.lengths)) > 1, "there is something to pad"
    encoder.load(weights, "tuned")
    for name in found:
        seen: list[Tensor] = []
        module = encoder.backbone.get_submodule(name.removesuffix(".weight"))
        handle = module.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0].detach().flatten(0, -2)))
        for index in range(12):
            encoder.module(**inputs.batch([index]))
        handle.remove()
        rows = torch.cat(seen)
        assert made.rows[name] == len(rows) == (12 if "pooler" in name else sum(inputs.lengths))
        assert relative(found[name], outer(rows) / len(rows)) < 100 * F32, name
    assert set(found) == set(measurable(encoder))
    assert made.idle == ()
    assert any("1 of 7 layers saw fewer rows than they have inputs (pooler.dense.weight)" in note for note in made.notes)
    assert not any(module._forward_hooks for module in encoder.module.modules())
    facts = read_facts(tmp_path / "g.safetensors", "gram")
    assert (facts["task"], facts["examples"], facts["fingerprint"]) == ("animals", "12", weights_hash(weights))
    twice = [name for name in found if "query" in name or "value" in name]
    assert torch.equal(found[twice[0]], found[twice[1]]), "one input"


def test_gradients_are_those_of_a_loop_over_examples_and_classes(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path
) -> None:
    weights = read_weights(place / "tuned")
    head = make_head(encoder, task)
    config = MomentConfig(examples=6, batch=4)
    collect_second_moments(encoder, task, weights, tmp_path / "s.safetensors", "gradients", config)
    found = load_file(tmp_path / "s.safetensors")
    inputs = encode(encoder, task, "train", max_length=64, limit=6)
    encoder.load(weights, "tuned")
    for name in list(found)[:3]:
        outputs: list[Tensor] = []
        module = encoder.backbone.get_submodule(name.removesuffix(".weight"))
        handle = module.register_forward_hook(lambda _, given, out, outputs=outputs: outputs.append(out))
        total = torch.zeros(module.out_features, module.out_features, dtype=torch.float64)  # type: ignore[arg-type]
        for index in range(6):
            for label in range(2):
                outputs.clear()
                told = head.logits(encoder.module(**inputs.batch([index]))).log_softmax(-1)[0, label]
                (slope,) = torch.autograd.grad(told, outputs)
                total += float(told.exp().detach()) * outer(slope[0])
        handle.remove()
        assert relative(found[name], total / 6) < 1e-4, name


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["gram", "gradients"])
def test_cut_off_in_few_bytes_and_resumed_it_has_the_same_bits(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path, kind: Any
) -> None:
    weights = read_weights(place / "tuned")
    config = MomentConfig(examples=20, batch=3, save_every=6)
    collect_second_moments(encoder, task, weights, tmp_path / "whole.safetensors", kind, config)
    few = replace(config, memory=8 * 16 * 16)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) >= 34:  # in the second run over the examples
            raise Stop

    with pytest.raises(Stop):
        collect_second_moments(encoder, task, weights, tmp_path / "cut.safetensors", kind, few, tick=stop)
    assert not (tmp_path / "cut.safetensors").exists()
    again: list[int] = []
    made = collect_second_moments(
        load_encoder(place / "base"), task, weights, tmp_path / "cut.safetensors", kind, few, tick=again.append
    )
    assert made.runs > 1
    assert again[:2] == [20, 12], "the first group is kept, and the second from its last state on"
    assert any("the examples ran" in note for note in made.notes)
    first, second = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.glob(".cut*")), "no state is left"


def test_a_finished_file_is_kept_and_another_refused(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, out = read_weights(place / "tuned"), tmp_path / "g.safetensors"
    made = collect_second_moments(encoder, task, weights, out, "gram", MomentConfig(examples=3))
    monkeypatch.setattr(room, "Run", None)
    again = collect_second_moments(encoder, task, weights, out, "gram", MomentConfig(examples=3, memory=1))
    assert again == replace(made, cached=True)
    with pytest.raises(OutputError, match=r"hold this very evidence of gram. It holds one of the model on 'animals'"):
        collect_second_moments(encoder, task, weights, out, "gram", MomentConfig(examples=4))
    with pytest.raises(OutputError, match="It holds something else"):
        collect_second_moments(encoder, task, weights, out, "gradients", MomentConfig(examples=3))


def test_what_cannot_be_measured(place: Path, encoder: Encoder, task: Task, tmp_path: Path) -> None:
    weights, out = dict(read_weights(place / "tuned")), tmp_path / "g.safetensors"
    with pytest.raises(AlignmentError):
        collect_second_moments(encoder, task, {name: w for name, w in weights.items() if "query" not in name}, out)
    weights["encoder.layer.0.attention.self.query.weight"] = torch.full((16, 16), float("nan"))
    with pytest.raises(DataError, match=r"the inputs of 'encoder\.layer\.0\.\S+' must be finite"):
        collect_second_moments(encoder, task, weights, out, "gram", MomentConfig(examples=3))
    with pytest.raises(DataError, match="must be finite"):
        collect_second_moments(encoder, task, weights, out, "gradients", MomentConfig(examples=3))
    encoder.load(weights, "broken")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        collect_second_moments(encoder, task, weights, out)
    for given, message in (
        ({"examples": 0}, "examples"),
        ({"exampels": 3}, "Did you mean 'examples'"),
        ({"memory": 0}, "memory"),
    ):
        with pytest.raises(RecipeError, match=message):
            MomentConfig.of(given, "here")
    assert groups({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


# Kinds of layers


def holding(module: nn.Module) -> Encoder:
    """An encoder around a module, whose checkpoint has its own names."""
    return Encoder(
        module=nn.Sequential(),
        folder=Path("nowhere"),
        names={name: name for name, _ in module.named_parameters()},
        carried={},
        dtypes={},
        max_length=1,
        base_hash="",
        form="",
    )


class Outside(nn.Module):
    """What `Encoder.module` is: something around a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.backbone(x)
        return out


def rows_of(backbone: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, str]]:
    """What every layer saw and made, the output, and who shares with whom."""
    encoder = replace(holding(backbone), module=Outside(backbone).eval())
    layers = measurable(encoder)
    seen: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    with watched(encoder, layers, seen=seen.__setitem__, made=made.__setitem__):
        out = encoder.module(x)
    return seen, made, out, sharing(encoder, layers, {"x": x})


class Attention(nn.Module):
    def __init__(self, *, first: bool, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=first, bias=bias)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False, attn_mask=self.mask)[0]
        return out


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_in_one_function_is_taken_apart_and_gives_the_same(first: bool, mask: str) -> None:
    torch.manual_seed(0)
    module = Attention(first=first, bias=mask != "bool").eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    length = 5 if first else 3
    above = torch.ones(length, length).triu(1)
    module.mask = {"none": None, "bool": above.bool(), "float": above * -1e9}[mask]
    with torch.no_grad():
        want = module(x)
        seen, made, out, shared = rows_of(module, x)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module(x), want, rtol=0, atol=0)
    assert set(seen) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    along = x if first else x.transpose(0, 1)
    torch.testing.assert_close(seen["attn.in_proj_weight"], along)
    bias = module.attn.in_proj_bias
    torch.testing.assert_close(made["attn.in_proj_weight"], nn.functional.linear(along, module.attn.in_proj_weight, bias))
    inner, own = seen["attn.out_proj.weight"], module.attn.out_proj
    torch.testing.assert_close(nn.functional.linear(inner, own.weight, own.bias), want if first else want.transpose(0, 1))
    assert shared == {name: name for name in seen}


CONVOLUTIONS: Mapping[str, Any] = {
    "patches": nn.Conv2d(3, 5, 4, stride=4, bias=False),
    "padded": nn.Conv2d(3, 5, (3, 2), padding=1, dilation=(1, 2)),
    "same": nn.Conv2d(3, 5, 3, padding="same"),
    "reflected": nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"),
    "one": nn.Conv1d(3, 5, 3, stride=2, padding=1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_of_unfolded_inputs(kind: str) -> None:
    module = CONVOLUTIONS[kind]
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    x = x if kind == "one" else x[..., None] * torch.randn(8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen, made, out, _ = rows_of(nn.Sequential(module), x)
        told = seen["0.weight"] @ module.weight.flatten(1).T + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(told, made["0.weight"])
    torch.testing.assert_close(made["0.weight"].transpose(1, 2).reshape(out.shape), out)


def test_gpt2s_layers_are_transposed_and_grouped_convolutions_are_left_out() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(6, 4)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        seen, made, _, _ = rows_of(nn.Sequential(layer), x)
    torch.testing.assert_close(seen["0.weight"] @ layer.weight + layer.bias, made["0.weight"])
    assert layers_of(nn.Conv2d(4, 4, 3, groups=4)) == []
    assert layers_of(nn.MultiheadAttention(8, 2, add_bias_kv=True)) == []


def test_a_text_to_text_models_padding_counts_nowhere(tmp_path: Path) -> None:
    """Encoder, decoder and what the decoder reads: one example at a time there is no padding but in the labels' texts."""
    tiny_language = pytest.importorskip("tiny_language")
    from thetau.tasks.prompted import label_inputs
    from thetau.tasks.templates import read_prompt

    encoder = load_encoder(tiny_language.folder_of(tmp_path, "t5"), "text_to_text")
    (tmp_path / "p.yaml").write_text('template: "{text} ?"\nlabels: {cat: cat, dog: "dog bark bone"}\n', encoding="utf-8")
    prompt = read_prompt(tmp_path / "p.yaml", masked=False)
    inputs = label_inputs(encoder.tokenizer, prompt, ["cat meow purr sun", "dog"], None, [0, 1], 32)
    layers = measurable(encoder)
    sums: list[dict[str, Tensor]] = []
    for batches in ([[0, 1]], [[0], [1]]):
        total = {name: torch.zeros(layer.d_in, layer.d_in) for name, layer in layers.items()}

        def seen(name: str, x: Tensor, total: dict[str, Tensor] = total) -> None:
            rows = place.rows(x)
            total[name] += rows.T @ rows

        with torch.no_grad(), watched(encoder, layers, seen=seen) as place:
            for batch in batches:
                place.columns = inputs.batch(batch)
                encoder.module(**dict(place.columns))
        sums.append(total)
    for name in layers:
        assert relative(sums[0][name], sums[1][name]) < 1e-4, name
    cross = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    with torch.no_grad():
        hidden: Any = encoder.backbone.get_submodule("encoder")
        rows = torch.cat([hidden(input_ids=inputs.batch([i])["input_ids"]).last_hidden_state[0] for i in (0, 1)])
    assert relative(sums[0][cross], 2 * outer(rows).float()) < 1e-4, "two labels an example"


# The command, and a merge with what it wrote


def test_the_command_and_a_merge(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, facts = tmp_path / "g.safetensors", tmp_path / "facts.json"
    arguments = ["evidence", "gram", "--model", str(place / "tuned"), "--data", str(place / "data"), "--examples", "8"]
    code, text = run(capsys, *arguments, "-o", str(out), "--json", str(facts), "--max-memory", "3KB", "--set", "max_length=16")
    assert code == 0, text
    assert "animals, 8 examples, 7 layers" in text
    assert "1 of 7 layers saw fewer rows" in text
    assert json.loads(facts.read_text())["runs"] > 1
    code, text = run(capsys, *arguments, "-o", str(out), "--set", "max_length=16")
    assert code == 0, text
    assert "(from before)" in text
    code, text = run(capsys, *arguments, "-o", str(tmp_path / "n.safetensors"), "--max-memory", "some")
    assert code == 1
    assert "--max-memory" in text
    other = ["evidence", "gradients", *arguments[2:], "-o", str(tmp_path / "s.safetensors")]
    code, text = run(capsys, *other)
    assert code == 0, text
    assert "animals, 8 examples, labels true, 7 layers" in text
    base = thetau.open(place / "base")
    vector = (thetau.open(place / "tuned") - base).named("animals")
    merged = thetau.merge([vector], RegMean(unseen="mean"), evidence={"gram": {"animals": out}}).state_dict()
    for name, tensor in vector.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0)
    with pytest.raises(
        RecipeError, match=r"holds evidence of the kind `gradients`\. Give the one that `thetau evidence gram` collects"
    ):
        thetau.merge([vector], RegMean(), evidence={"gram": {"animals": tmp_path / "s.safetensors"}})
