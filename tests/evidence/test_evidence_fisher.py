"""The Fisher diagonal against per-example loops, its file, its resumption and its command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import thetau
from commands import run
from thetau.checkpoint import open_source
from thetau.errors import AlignmentError, CheckpointError, DataError, OutputError, RecipeError
from thetau.evidence import FisherConfig, collect_fisher, fisher_sums
from thetau.evidence import fisher as room
from thetau.evidence.files import read_facts
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.state import StateFolder
from thetau.models import Encoder, load_encoder, read_weights, weights_hash
from thetau.tasks import Task, encode, load_task, make_head
from thetau.tasks.head import AnyHead, Head
from thetau.tasks.inputs import Inputs
from thetau.tasks.language_heads import TextToTextHead
from thetau.tasks.probe import LinearHead
from tiny import make_model, make_task
from tiny import one_thread as one_thread


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks, and a model fine-tuned on one of them."""
    folder = tmp_path_factory.mktemp("fisher")
    torch.set_num_threads(1)
    base = make_model(folder / "base")
    task = load_task(make_task(folder / "data", "animals"))
    make_task(folder / "data", "weather")
    finetune(load_encoder(base), task, folder / "tuned", FinetuneConfig(steps=30, lr=5e-3, batch_size=16), base=str(base))
    return folder


@pytest.fixture
def encoder(place: Path) -> Encoder:
    return load_encoder(place / "base")


@pytest.fixture
def task(place: Path) -> Task:
    return load_task(place / "data" / "animals")


def by_hand(module: nn.Module, inputs: Inputs, head: AnyHead, names: Sequence[str], labels: str) -> dict[str, Tensor]:
    """One example and one class at a time, with nothing but autograd."""
    known = dict(module.named_parameters())
    found = {name: torch.zeros_like(known[name]) for name in names}
    for index in range(len(inputs)):
        shares = head.logits(module(**inputs.batch([index]))).softmax(-1)[0].detach()
        for label, share in enumerate(shares):
            if labels == "empirical":
                share = float(label == inputs.labels[index])
            module.zero_grad()
            (-head.loss(module(**inputs.batch([index])), torch.tensor([label]))).backward()
            for name in names:
                slope = known[name].grad
                found[name] += 0 if slope is None else share * slope**2
    module.zero_grad()
    return found


def away(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest relative distance of any tensor."""
    assert sorted(got) == sorted(want)
    return max(float((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-12)) for name in want)


@pytest.mark.parametrize("labels", ["true", "empirical"])
@pytest.mark.parametrize("batch", [1, 32])
def test_it_is_the_sum_over_examples_and_classes(encoder: Encoder, task: Task, labels: Any, batch: int) -> None:
    head, inputs = make_head(encoder, task), encode(encoder, task, "train", max_length=32, limit=12)
    names = [name for name, _ in encoder.module.named_parameters()]
    got = fisher_sums(encoder.module, inputs, head, names, FisherConfig(labels=labels, batch=batch))
    assert away(got, by_hand(encoder.module, inputs, head, names, labels)) < 1e-5


class Bend(nn.Module):
    """Two layers that torch can map over examples, as it can those of image models."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.second = nn.Parameter(torch.randn(4, 6, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize((x @ self.first).tanh() @ self.second, dim=-1)


class Looking(Bend):
    """The same, but it looks at values, which a map over examples cannot."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return super().forward(x)


class Points:
    """Inputs of five numbers; labels of three classes, or numbers."""

    hash = unlabelled = "points"
    truncated = 0

    def __init__(self, count: int = 11, *, numbers: bool = False, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 5, generator=generator)
        values = torch.randn(count, generator=generator).tolist() if numbers else [index % 3 for index in range(count)]
        self.labels: Sequence[int | float] = values if labelled else []
        self.lengths = (1,) * count

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"x": self.x[list(indices)]}

    def targets(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor(self.labels)[list(indices)]


NAMES = ("first", "second")
HEAD = Head(classes=nn.functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(2)), dim=-1), scale=4.0)


@pytest.mark.parametrize("labels", ["true", "empirical", "sampled"])
def test_mapped_over_a_batch_and_one_by_one_are_the_same(labels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    mappable = room._Run._mappable

    def watched(self: Any, batch: list[int]) -> bool:
        seen.append(mappable(self, batch))
        return seen[-1]

    monkeypatch.setattr(room._Run, "_mappable", watched)
    config = FisherConfig(labels=labels, batch=32)
    mapped = fisher_sums(Bend(), Points(), HEAD, NAMES, config)
    looped = fisher_sums(Looking(), Points(), HEAD, NAMES, config)
    single = fisher_sums(Bend(), Points(), HEAD, NAMES, replace(config, batch=1))
    assert seen == [True, False], "with batches of one there is nothing to map"
    assert away(mapped, single) < 1e-5
    assert away(looped, single) < 1e-5


def test_true_labels_keep_the_uncertain_examples_that_batches_lose() -> None:
    """The ports' square of ∂ Σ √p log p is 0 for two classes at p = ½; here such an example counts fully."""
    head = Head(classes=torch.eye(6)[:2], scale=1.0)
    module = Bend()
    with torch.no_grad():
        module.second[:, 1] = module.second[:, 0]  # both classes are equally likely, whatever the input
    inputs = Points(3)
    names = ("second",)
    got = fisher_sums(module, inputs, head, names, FisherConfig())
    assert away(got, by_hand(module, inputs, head, names, "true")) < 1e-5
    features = module(inputs.x)
    told = head.logits(features).log_softmax(-1)
    assert torch.allclose(told.exp(), torch.full_like(told, 0.5))
    port = torch.autograd.grad((told.exp().detach().sqrt() * told).sum(), [module.second])[0].square()
    assert float(port.sum()) < 1e-8 * float(got["second"].sum())


def test_drawn_labels_follow_the_seed_and_the_example_alone() -> None:
    config = FisherConfig(labels="sampled", draws=3)
    first, other = (fisher_sums(Bend(), Points(), HEAD, NAMES, replace(config, seed=seed)) for seed in (0, 1))
    again = fisher_sums(Bend(), Points(), HEAD, NAMES, replace(config, batch=2))
    assert away(again, first) < 1e-5
    assert away(other, first) > 1e-2
    many = fisher_sums(Bend(), Points(3), HEAD, NAMES, replace(config, draws=4000))
    assert away(many, fisher_sums(Bend(), Points(3), HEAD, NAMES, FisherConfig())) < 0.05, "in the mean it is the true one"


def test_beyond_the_most_classes_labels_are_drawn() -> None:
    drawn = fisher_sums(Bend(), Points(), HEAD, NAMES, FisherConfig(most_classes=2))
    assert away(drawn, fisher_sums(Bend(), Points(), HEAD, NAMES, FisherConfig(labels="sampled"))) == 0
    assert away(drawn, fisher_sums(Bend(), Points(), HEAD, NAMES, FisherConfig(most_classes=3))) > 1e-2


def test_a_regression_takes_the_squared_gradient_of_its_prediction() -> None:
    head = LinearHead(weight=HEAD.classes[:1], bias=torch.tensor([0.3]), scale=2.0, regression=True)
    module, inputs = Bend(), Points(numbers=True)
    want = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    weighed = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for index in range(len(inputs)):
        told = head.logits(module(inputs.x[[index]]))[0, 0]
        for name, slope in zip(NAMES, torch.autograd.grad(told, list(module.parameters())), strict=True):
            want[name] += slope**2
            weighed[name] += (slope * (told.detach() - inputs.labels[index])) ** 2
    for batch in (1, 8):
        for labels in ("true", "sampled"):
            assert away(fisher_sums(module, inputs, head, NAMES, FisherConfig(labels=labels, batch=batch)), want) < 1e-5  # type: ignore[arg-type]
        assert away(fisher_sums(module, inputs, head, NAMES, FisherConfig(labels="empirical", batch=batch)), weighed) < 1e-5


def test_a_text_to_text_head_is_a_distribution_over_the_labels() -> None:
    scores = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -3.0, -3.5]])
    labels, shares = TextToTextHead().outcomes(scores)
    assert labels.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(shares, scores.softmax(-1))
    assert torch.allclose(TextToTextHead().log_likelihood(scores, torch.tensor([1, 2])), scores.log_softmax(-1)[[0, 1], [1, 2]])
    numbers = TextToTextHead(values=(0.0, 2.0, 4.0))
    assert numbers.outcomes(scores)[0].tolist() == [[0.0, 2.0, 4.0]] * 2
    halfway = numbers.log_likelihood(scores, torch.tensor([1.0, 4.0]))
    assert torch.allclose(halfway, torch.stack([scores.log_softmax(-1)[0, :2].mean(), scores.log_softmax(-1)[1, 2]]))


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="a Fisher needs at least one example"):
        fisher_sums(Bend(), Points(0), HEAD, NAMES, FisherConfig())
    with pytest.raises(DataError, match=r"needs a label for each example\. Got 0 for 11 examples\. Use labels true"):
        fisher_sums(Bend(), Points(labelled=False), HEAD, NAMES, FisherConfig(labels="empirical"))
    assert (
        away(
            fisher_sums(Bend(), Points(labelled=False), HEAD, NAMES, FisherConfig()),
            by_hand(Bend(), Points(), HEAD, NAMES, "true"),
        )
        > 0
    )
    for batch in (1, 8):
        broken = Bend()
        with torch.no_grad():
            broken.first[0, 0] = float("nan")
        with pytest.raises(DataError, match=r"must be finite; these weights give NaN or Inf for example 0"):
            fisher_sums(broken, Points(), HEAD, NAMES, FisherConfig(batch=batch))
        with pytest.raises(DataError, match="must be finite"):
            fisher_sums(broken, Points(), HEAD, NAMES, FisherConfig(batch=batch, labels="empirical"))
    monkeypatch.setattr(Bend, "forward", lambda self, x: x @ torch.eye(5, 6))
    with pytest.raises(DataError, match="the head does not depend on the model's parameters"):
        fisher_sums(Bend(), Points(), HEAD, NAMES, FisherConfig())


def test_the_module_is_left_as_it_was() -> None:
    module = Bend().train()
    module.second.requires_grad_(False)
    fisher_sums(module, Points(), HEAD, NAMES, FisherConfig())
    assert module.training
    assert module.first.requires_grad
    assert not module.second.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": 0}, "examples"),
        ({"labels": "given"}, "labels"),
        ({"batch": 0}, "batch"),
        ({"split": "dev"}, "split"),
        ({"normalise": 1}, "normalise"),
        ({"exampels": 3}, "Did you mean 'examples'"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FisherConfig.of(given, "here")


# The file


def test_the_file_has_the_checkpoints_names_and_says_where_it_is_from(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path
) -> None:
    weights = read_weights(place / "tuned")
    done: list[int] = []
    out = tmp_path / "new" / "animals.safetensors"
    made = collect_fisher(encoder, task, weights, out, FisherConfig(examples=10), origin="tuned", tick=done.append)
    assert sum(done) == made.examples == 10
    assert weights_hash(encoder.weights()) == encoder.base_hash, "the base is back"
    tensors = load_file(out)
    assert set(tensors) == set(encoder.names.values()), "the integer buffer has none"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert made.zero == ("pooler.dense.weight", "pooler.dense.bias") or set(made.zero) == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    head = make_head(encoder, task)
    encoder.load(weights, "tuned")
    inputs = encode(encoder, task, "train", max_length=64, limit=10)
    live = [f"backbone.{name}" for name in encoder.names]
    want = by_hand(encoder.module, inputs, head, live, "true")
    assert away({f"backbone.{name}": 10 * tensors[stored] for name, stored in encoder.names.items()}, want) < 1e-5
    assert made.norm == pytest.approx(float(sum(value.square().sum() for value in tensors.values())) ** 0.5)
    facts = read_facts(out, "fisher")
    assert facts["kind"] == "evidence"
    assert (facts["model"], facts["task"], facts["examples"], facts["labels"]) == ("tuned", "animals", "10", "true")
    assert facts["fingerprint"] == weights_hash(weights)
    assert facts["version"] == thetau.__version__
    assert not list(tmp_path.glob("new/.*")), "no state is left"


def test_it_opens_as_a_source(place: Path, encoder: Encoder, task: Task, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    collect_fisher(encoder, task, read_weights(place / "tuned"), out, FisherConfig(examples=3))
    source = open_source(out)
    assert source.degree == 0
    assert source.partial, "an absent tensor stands for zeros"
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(source.read(name, 2, 5), load_file(out)[name][2:5])
    assert torch.equal(thetau.open(out).state_dict()[name], load_file(out)[name])


def test_normalised_has_the_norm_one(place: Path, encoder: Encoder, task: Task, tmp_path: Path) -> None:
    weights = read_weights(place / "tuned")
    plain = collect_fisher(encoder, task, weights, tmp_path / "a.safetensors", FisherConfig(examples=6))
    made = collect_fisher(encoder, task, weights, tmp_path / "b.safetensors", FisherConfig(examples=6, normalise=True))
    assert made.normalised
    assert made.norm == plain.norm
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert float(sum(value.square().sum() for value in b.values())) == pytest.approx(1.0)
    assert (
        away({name: value * made.norm for name, value in b.items() if value.any()}, {n: v for n, v in a.items() if v.any()})
        < 1e-5
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path, labels: Any
) -> None:
    weights = read_weights(place / "tuned")
    config = FisherConfig(examples=20, labels=labels, batch=3, save_every=5)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    collect_fisher(encoder, task, weights, whole, config)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) >= 15:
            raise Stop

    with pytest.raises(Stop):
        collect_fisher(encoder, task, weights, cut, config, tick=stop)
    assert not cut.exists()
    assert weights_hash(encoder.weights()) == encoder.base_hash
    (state,) = tmp_path.glob(".cut.safetensors.*.training")
    with safe_open(state / "state.safetensors", framework="pt") as file:
        step = json.loads(file.metadata()["thetau.state"])["step"]
    assert 5 <= step < 15
    again: list[int] = []
    collect_fisher(load_encoder(place / "base"), task, weights, cut, config, tick=again.append)
    assert again[0] == step
    assert sum(again) == 20
    first, second = load_file(whole), load_file(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not state.exists()


def test_a_finished_file_is_kept_and_another_one_refused(
    place: Path, encoder: Encoder, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, out = read_weights(place / "tuned"), tmp_path / "f.safetensors"
    made = collect_fisher(encoder, task, weights, out, FisherConfig(examples=4))
    before = out.read_bytes()
    monkeypatch.setattr(room, "_Run", None)
    again = collect_fisher(encoder, task, weights, out, FisherConfig(examples=4, save_every=1))
    assert again == replace(made, cached=True)
    with pytest.raises(OutputError, match=r"must be new, or hold this very Fisher. It holds one of the model on 'animals'"):
        collect_fisher(encoder, task, weights, out, FisherConfig(examples=5))
    assert out.read_bytes() == before
    (tmp_path / "other.safetensors").write_bytes((place / "tuned" / "model.safetensors").read_bytes())
    with pytest.raises(OutputError, match="It holds something else"):
        collect_fisher(encoder, task, weights, tmp_path / "other.safetensors", FisherConfig(examples=5))
    with pytest.raises(OutputError, match=r"Let its name end in \.safetensors"):
        collect_fisher(encoder, task, weights, tmp_path / "f.bin")


def test_bad_models_and_heads(place: Path, encoder: Encoder, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, out = read_weights(place / "tuned"), tmp_path / "f.safetensors"
    config = FisherConfig(examples=4)
    with pytest.raises(DataError, match="the head does not read what"):
        collect_fisher(encoder, task, weights, out, config, head=HEAD)
    with pytest.raises(DataError, match=r"must have the task's 2 classes\. Got 3; it is another task's"):
        collect_fisher(encoder, task, weights, out, config, head=Head(classes=torch.eye(3, 16)))
    certain = Head(classes=torch.stack([torch.ones(16), -torch.ones(16)]), scale=1e30)
    with pytest.raises(DataError, match="the Fisher of the model is zero everywhere"):
        collect_fisher(encoder, task, weights, out, config, head=certain)
    with pytest.raises(AlignmentError):
        collect_fisher(encoder, task, {name: value for name, value in weights.items() if "query" not in name}, out, config)
    encoder.load(weights, "tuned")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        collect_fisher(encoder, task, weights, out, config)
    assert not out.exists()
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="bad: cannot be read as evidence"):
        read_facts(tmp_path / "bad", "fisher")


def test_a_state_of_other_settings_is_not_taken_up(tmp_path: Path) -> None:
    assert StateFolder.beside(tmp_path / "a", "k1").folder != StateFolder.beside(tmp_path / "a", "k2").folder


# The command


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, facts = tmp_path / "animals.safetensors", tmp_path / "facts.json"
    arguments = ["evidence", "fisher", "--model", str(place / "tuned"), "--data", str(place / "data"), "--examples", "8"]
    code, text = run(capsys, *arguments, "-o", str(out), "--json", str(facts), "--set", "max_length=16")
    assert code == 0, text
    assert "animals, 8 examples, labels true, 23 tensors" in text
    assert "2 tensors do not act on the task" in text
    assert json.loads(facts.read_text())["examples"] == 8
    assert read_facts(out, "fisher")["model"] == str(place / "tuned")
    assert read_facts(out, "fisher")["weights"] == thetau.open(place / "tuned").terms[0][1].fingerprint()
    code, text = run(capsys, *arguments, "-o", str(out), "--set", "max_length=16")
    assert code == 0, text
    assert "(from before)" in text
    named = [*arguments, "--task", "weather", "--base", str(place / "base"), "--labels", "sampled", "--normalise", "--batch", "2"]
    code, text = run(capsys, *named, "-o", str(tmp_path / "weather.safetensors"))
    assert code == 0, text
    assert "weather, 8 examples, labels sampled" in text
    assert ", divided by it" in text


def test_the_command_refuses(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "f.safetensors")
    arguments = ["evidence", "fisher", "--model", str(place / "tuned"), "--data", str(place / "data"), "-o", out]
    other = make_model(tmp_path / "other", seed=1)
    code, text = run(capsys, *arguments, "--base", str(other))
    assert code == 1
    assert "was fine-tuned from another base" in text
    code, text = run(capsys, *arguments, "--examples", "0", "--set", "labls=true")
    assert code == 1
    assert "2 problems" in text
    plain = ["evidence", "fisher", "--model", str(place / "base"), "--task", "animals", "--data", str(place / "data"), "-o", out]
    code, text = run(capsys, *plain)
    assert code == 1
    assert "has no record of its base. Name it: --base" in text
    assert not list(tmp_path.glob("*.safetensors"))
