"""Localisation with data: the mask lowers the loss, the two regularisers are what they say, and the file is a sparse task vector."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thetau
from commands import run
from synthetic import checked
from thetau.checkpoint.compressed import CompressedSource
from thetau.errors import AlignmentError, DataError, RecipeError
from thetau.evidence import Learned, MaskConfig, learn_mask, localize
from thetau.evidence.masks import few, largest, settled
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import Encoder, load_encoder, weights_hash
from thetau.tasks import Task, load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

FAST = MaskConfig(density=0.05, steps=8, lr=30.0, per_class=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task, and a model fine-tuned on it."""
    folder = tmp_path_factory.mktemp("masks")
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


@pytest.fixture
def vector(place: Path) -> Any:
    return (thetau.open(place / "tuned") - thetau.open(place / "base")).named("animals")


# Learning on a model whose every number is known


class Line(nn.Module):
    """x ↦ x · w, so that the gradient in w is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))
        self.other = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + 0 * self.other


class Rows:
    """Six inputs, one a weight."""

    labels = (0.0,) * 6
    lengths = (1,) * 6
    hash = unlabelled = "rows"
    truncated = 0

    def __len__(self) -> int:
        return 6

    def batch(self, indices: Any) -> dict[str, Tensor]:
        return {"x": torch.eye(6)[list(indices)]}


class Wanted:
    """The loss asks for 1 in the first three places and for 0 in the others."""

    goal = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])

    def logits(self, features: Tensor) -> Tensor:
        return features

    linear = predict = outcomes = logits

    def log_likelihood(self, features: Tensor, labels: Tensor) -> Tensor:
        return -self.loss(features, labels)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        if len(features) < 6:
            return (features - features.detach().round()).square().sum()
        return (features - self.goal).square().mean()

    def hash(self) -> str:
        return "wanted"

    def to(self, device: torch.device) -> Wanted:
        return self


TAU = {"w": torch.tensor([1.0, 0.5, 0.9, 2.0, 0.1, 0.0])}


def learned(**options: Any) -> Learned:
    return learn_mask(
        Line(), Rows(), Wanted(), TAU, MaskConfig(**{"density": 0.3, "strength": 0.0, "lr": 20.0, "steps": 20, **options})
    )


def test_it_keeps_what_helps_and_drops_what_hurts() -> None:
    found = learned()
    assert found.masks["w"].tolist() == [True, True, True, False, False, False]
    assert found.base == pytest.approx(0.5)
    assert found.whole == pytest.approx((0.25 + 0.01 + 4 + 0.01) / 6)
    assert found.start == pytest.approx((0 + 1 + 1 + 4) / 6), "the two largest"
    assert found.last == pytest.approx((0.25 + 0.01) / 6)
    assert found.losses[-1] < found.losses[0]
    assert len(found.losses) == 20


def test_the_first_step_by_hand() -> None:
    """S − lr · g⊙τ⊙σ'(S) − strength · σ'(S), or its polarised form."""
    s = torch.tensor([5.0, -5.0, -5.0, 5.0, -5.0, -5.0])
    share = s.sigmoid()
    g = 2 * (share * TAU["w"] - Wanted.goal) / 6
    steep = share * (1 - share)
    for name, pull in (("l1", steep), ("polarise", -steep * s.sign())):
        want = s - 300 * g * TAU["w"] * steep - 4000.0 * pull
        kept = (want > 0) & (TAU["w"] != 0)
        options: dict[str, Any] = {"regulariser": name, "lr": 300.0, "lr_absolute": True, "steps": 1, "strength": 4000.0}
        assert torch.equal(learned(**options).masks["w"], kept), name
    # The relative rate: the first gradient at σ' = 1/4 has root mean square 1 over the entries that τ changes.
    rms = float((g * TAU["w"])[:5].square().mean().sqrt())
    absolute = learned(lr=20.0 / (rms / 4), lr_absolute=True, steps=3)
    assert torch.equal(absolute.masks["w"], learned(steps=3).masks["w"])
    assert absolute.losses == pytest.approx(learned(steps=3).losses, rel=1e-5)


def test_l1_makes_the_mask_smaller_and_polarise_keeps_what_it_has() -> None:
    """Both push a low score further down; a high one is pulled down by l1 and pushed up by the published code's term."""
    options: dict[str, Any] = {"density": 1.0, "bias": 1.0, "lr": 1e-9, "strength": 2.0, "steps": 6}
    assert not learned(regulariser="l1", **options).masks["w"].any()
    assert learned(regulariser="polarise", **options).masks["w"].tolist() == [True] * 5 + [False]
    low = {**options, "density": 0.2}
    assert learned(regulariser="polarise", **low).masks["w"].sum() == 2


def test_scaling_the_loss_changes_nothing() -> None:
    class Louder(Wanted):
        def loss(self, features: Tensor, labels: Tensor) -> Tensor:
            return 1024 * super().loss(features, labels)

    config = MaskConfig(density=0.3, strength=0.5, lr=20.0, steps=6)
    one, other = (learn_mask(Line(), Rows(), head, TAU, config) for head in (Wanted(), Louder()))
    assert torch.equal(one.masks["w"], other.masks["w"])
    assert other.losses == pytest.approx([1024 * loss for loss in one.losses], rel=1e-5)


def test_the_module_is_left_as_it_was() -> None:
    module = Line().train()
    learn_mask(module, Rows(), Wanted(), TAU, MaskConfig(steps=2))
    assert module.training
    assert not module.w.any()
    assert module.w.requires_grad
    assert not module.other.requires_grad
    assert module.w.grad is None


def test_no_vector_and_no_number_are_refused() -> None:
    with pytest.raises(DataError, match="the task vector is all zero where a mask is learned"):
        learn_mask(Line(), Rows(), Wanted(), {"w": torch.zeros(6)}, MaskConfig())
    module = Line()
    with pytest.raises(DataError, match="the loss of the mask is not finite"):
        learn_mask(module, Rows(), Wanted(), {"w": torch.full((6,), 1e30)}, MaskConfig())
    assert not module.w.any()


# Masks


def test_the_largest_and_the_last() -> None:
    tau = {"a": torch.tensor([3.0, -1.0, 0.0]), "b": torch.tensor([[2.0, -4.0]])}
    assert {name: mask.tolist() for name, mask in largest(tau, 0.4).items()} == {"a": [True, False, False], "b": [[False, True]]}
    assert int(sum(mask.sum() for mask in largest(tau, 1.0).values())) == 4, "a zero is in no mask"
    scores = {"a": torch.tensor([-1.0, 2.0, 9.0]), "b": torch.tensor([[-1.0, -1.0]])}
    assert settled(scores, tau, None)["a"].tolist() == [False, True, False]
    kept = settled(scores, tau, 0.4)
    assert kept["a"].tolist() == [False, True, False]
    assert kept["b"].tolist() == [[False, True]], "of equal scores the largest entry"
    assert int(sum(mask.sum() for mask in settled(scores, tau, 1.0).values())) == 4


def test_so_many_of_each_class() -> None:
    class Some(Rows):
        labels = (0, 1, 0, 0, 2, 1, 0)

    chosen = few(Some(), MaskConfig(per_class=2), regression=False)
    assert sorted(Some.labels[i] for i in chosen) == [0, 0, 1, 1, 2]
    assert chosen == few(Some(), MaskConfig(per_class=2), regression=False)
    assert len(few(Some(), MaskConfig(per_class=2), regression=True)) == 2
    picks = {tuple(few(Some(), MaskConfig(per_class=2, seed=seed), regression=False)) for seed in range(9)}
    assert len(picks) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0.0}, "`MaskConfig(density=...)` must be in (0, 1]. Got 0.0."),
        ({"keep": 2.0}, "`MaskConfig(keep=...)` must be in (0, 1], or None to round. Got 2.0."),
        ({"regulariser": "l2"}, "`MaskConfig(regulariser=...)` must be one of l1, polarise. Got 'l2'."),
        ({"lr": 0.0}, "`MaskConfig(lr=...)` must be a positive number. Got 0.0."),
        ({"steps": -1}, "`MaskConfig(steps=...)` must be an integer of at least 0. Got -1."),
        ({"batch_size": 0}, "`MaskConfig(batch_size=...)` must be an integer of at least 1, or None. Got 0."),
        ({"lr_absolute": 1}, "`MaskConfig(lr_absolute=...)` must be true or false. Got 1."),
    ],
)
def test_fields_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(MaskConfig, values)


# On a model


def test_a_real_mask_lowers_the_loss_and_is_a_sparse_vector(tmp_path: Path, encoder: Encoder, task: Task, vector: Any) -> None:
    before = weights_hash(encoder.weights())
    steps: list[int] = []
    result = localize(encoder, task, vector, tmp_path / "m.safetensors", FAST, tick=lambda step, loss: steps.append(step))
    assert weights_hash(encoder.weights()) == before == encoder.base_hash
    assert steps == list(range(1, 9))
    assert result.examples == 32
    assert result.last < 0.6 * result.start < result.base
    assert result.losses[-1] < result.losses[0]
    source = thetau.open(tmp_path / "m.safetensors").terms[0][1]
    assert isinstance(source, CompressedSource)
    back, values = thetau.open(tmp_path / "m.safetensors").state_dict(), vector.state_dict()
    kept = sum(int(one.count_nonzero()) for one in back.values())
    assert result.density == pytest.approx(kept / sum(one.numel() for one in values.values()))
    assert 0.01 < result.density < 0.6
    for name, value in back.items():
        assert torch.equal(value, torch.where(value != 0, values[name], 0)), name
    told = json.loads(source.metadata["thetau.recipe"])
    assert (told["task"], told["config"]["steps"], told["config"]["regulariser"]) == ("animals", 8, "l1")
    assert told["loss"]["last"] == result.last
    assert source.metadata["thetau.base"] == vector.reference.fingerprint()
    json.dumps(result.to_json())


def test_the_two_regularisers_differ_on_a_model(tmp_path: Path, encoder: Encoder, task: Task, vector: Any) -> None:
    config = replace(FAST, density=0.3, bias=1.0, strength=1.0, lr=0.1)
    found = {}
    for name in ("l1", "polarise"):
        given = replace(config, regulariser=name)
        found[name] = localize(encoder, task, vector, tmp_path / f"{name}.safetensors", given)
    assert found["l1"].density < 0.5 * found["polarise"].density


def test_a_density_that_is_asked_for_is_kept(tmp_path: Path, encoder: Encoder, task: Task, vector: Any) -> None:
    result = localize(encoder, task, vector, tmp_path / "m.safetensors", replace(FAST, keep=0.1, batch_size=8), dtype="bfloat16")
    elements = sum(value.numel() for value in vector.state_dict().values())
    assert result.file.kept == -(-elements // 10)
    assert result.last < result.start


def test_only_some_tensors(tmp_path: Path, encoder: Encoder, task: Task, vector: Any) -> None:
    result = localize(encoder, task, vector, tmp_path / "m.safetensors", replace(FAST, tensors="linear"))
    changed = {name for name, value in thetau.open(tmp_path / "m.safetensors").state_dict().items() if value.any()}
    assert changed
    assert all(name.endswith("weight") and "embeddings" not in name for name in changed)
    assert "tensors of the vector were left out of the mask" in result.notes[0]
    with pytest.raises(AlignmentError, match=r"no tensor of the vector that fits `tensors: nothing` is a parameter of"):
        localize(encoder, task, vector, tmp_path / "n.safetensors", replace(FAST, tensors=("nothing",)))


def test_other_weights_and_the_tangent_space_are_refused(
    tmp_path: Path, place: Path, encoder: Encoder, task: Task, vector: Any
) -> None:
    from safetensors.torch import save_file

    said = {"thetau.kind": "task_vector", "thetau.space": "tangent"}
    save_file(vector.state_dict(), tmp_path / "tangent.safetensors", metadata=said)
    with pytest.raises(DataError, match="belongs to the tangent space"):
        localize(encoder, task, thetau.open(tmp_path / "tangent.safetensors"), tmp_path / "m.safetensors", FAST)
    encoder.load(load_encoder(place / "tuned").weights(), "tuned")
    with pytest.raises(DataError, match="but the encoder runs with other weights"):
        localize(encoder, task, vector, tmp_path / "m.safetensors", FAST)
    assert not (tmp_path / "m.safetensors").exists()


def test_localize_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    arguments = [str(place / "tuned"), "--base", str(place / "base"), "--data", str(place / "data")]
    code, text = run(
        capsys,
        "vector",
        "localize",
        *arguments,
        "--steps",
        "8",
        "--lr",
        "30",
        "--set",
        "batch_size=32",
        "-o",
        str(out),
        "--json",
        str(tmp_path / "m.json"),
    )
    assert code == 0, text
    told = json.loads((tmp_path / "m.json").read_text())
    assert told["task"] == "animals"
    assert f"this mask {told['last']:.3f}" in text
    assert f"{100 * told['density']:.2f} % of the entries" in text
    assert thetau.open(out).is_vector
    code, text = run(capsys, "vector", "info", str(out))
    assert code == 0
    assert "form sparse, format 1" in text
    code, text = run(capsys, "vector", "localize", *arguments, "--set", "stepz=3", "-o", str(tmp_path / "n.safetensors"))
    assert code != 0
    assert "unknown key 'stepz'. Did you mean 'steps'?" in text


def test_a_config_names_all_that_is_wrong() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'densty'. Did you mean 'density'?"):
        MaskConfig.of({"densty": 1, "tensors": ["a.*"]}, "here")
    assert MaskConfig.of({"tensors": ["a.*"]}, "here").tensors == ("a.*",)
