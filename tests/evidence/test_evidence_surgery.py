"""Representation Surgery against a plain module, its law at step 0, its files, and `thetau evaluate` with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thetau
from commands import run
from thetau.errors import DataError, OutputError
from thetau.evidence import SurgeryConfig, learn_surgery
from thetau.evidence.surgery import correct, read_correction, surgery_file
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.batches import training_batches
from thetau.models import load_encoder, read_weights, weights_hash
from thetau.tasks import load_task
from thetau.tasks.corrected import CorrectedHead, Correction
from thetau.tasks.head import Head
from tiny import make_model, make_task
from tiny import one_thread as one_thread


class Plain(nn.Module):
    """The authors' module, written down."""

    def __init__(self, width: int, rank: int, down: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(down)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x - self.up(torch.relu(self.down(x)))
        return out


def some(count: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=-1)


def test_the_updates_are_those_of_a_plain_module() -> None:
    given, wanted = some(40, 12, 0), some(40, 12, 1)
    config = SurgeryConfig(rank=3, updates=25, lr=1e-2, batch=8, seed=5)
    start = correct(given, wanted, replace(config, updates=0), unit=False)
    module = Plain(12, 3, start.down)
    adam = torch.optim.Adam(module.parameters(), lr=1e-2)
    picks = training_batches([1] * 40, 8, 5)
    for _ in range(25):
        batch = next(picks)
        adam.zero_grad()
        (module(given[batch]) - wanted[batch]).abs().mean().backward()
        adam.step()
    made = correct(given, wanted, config, unit=False)
    torch.testing.assert_close(made(given), module(given).detach(), rtol=1e-4, atol=1e-5)
    assert float((made(given) - wanted).abs().mean()) < float((given - wanted).abs().mean())
    unit = replace(made, unit=True)(given)
    torch.testing.assert_close(unit, nn.functional.normalize(made(given), dim=-1), rtol=1e-5, atol=1e-6)


def test_before_the_first_update_every_bit_is_the_merged_models() -> None:
    given = some(9, 12, 0)
    start = correct(given, some(9, 12, 1), SurgeryConfig(updates=0), unit=True)
    assert start.down.shape == (16, 12)
    assert bool(start.down.any())
    assert torch.equal(start(given), given)
    head = Head(classes=some(3, 12, 2))
    behind = CorrectedHead(head=head, correction=start)
    labels = torch.tensor([0, 1, 2] * 3)
    for of in (lambda one: one.logits(given), lambda one: one.predict(given), lambda one: one.loss(given, labels)):
        assert torch.equal(of(behind), of(head))  # type: ignore[no-untyped-call]
    assert torch.equal(behind.log_likelihood(given, labels), head.log_likelihood(given, labels))
    assert torch.equal(behind.to(torch.device("cpu")).outcomes(given)[1], head.outcomes(given)[1])
    other = CorrectedHead(head=head, correction=Correction(up=start.up + 1, down=start.down, unit=True))
    assert len({behind.hash(), other.hash(), head.hash()}) == 3
    with pytest.raises(DataError, match="not linear in the features"):
        behind.linear(given)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models, and their sum times 0.3."""
    folder = tmp_path_factory.mktemp("surgery")
    torch.set_num_threads(1)
    base = make_model(folder / "base")
    for name in ("animals", "weather"):
        task = load_task(make_task(folder / "data", name))
        finetune(load_encoder(base), task, folder / name, FinetuneConfig(steps=10, lr=1e-3, batch_size=16), base=str(base))
    opened: Any = thetau.open(base)
    vectors = [thetau.open(folder / name) - opened for name in ("animals", "weather")]
    (opened + thetau.merge(vectors, thetau.methods.TaskArithmetic())).save(folder / "merged")
    return folder


def test_the_file_and_what_is_refused(place: Path, tmp_path: Path) -> None:
    encoder, task = load_encoder(place / "base"), load_task(place / "data" / "animals")
    merged, own = read_weights(place / "merged"), read_weights(place / "animals")
    config = SurgeryConfig(rank=4, updates=30, lr=1e-2)
    made = learn_surgery(encoder, task, merged, own, tmp_path / "a.safetensors", config)
    assert weights_hash(encoder.weights()) == encoder.base_hash
    assert made.examples == 20
    assert made.after < made.before
    assert learn_surgery(encoder, task, merged, own, tmp_path / "a.safetensors", config) == replace(made, cached=True)
    with pytest.raises(OutputError, match=r"hold this very correction\. It holds one of the merged model on 'animals'"):
        learn_surgery(encoder, task, merged, own, tmp_path / "a.safetensors", replace(config, seed=1))
    with pytest.raises(DataError, match=r"was learned for another merged model, the merged model, than the one that is measured"):
        read_correction(tmp_path / "a.safetensors", own)
    with pytest.raises(DataError, match="the features of the merged model must be finite"):
        correct(torch.full((2, 3), float("nan")), torch.ones(2, 3), config, unit=True)
    encoder.load(own, "another")
    with pytest.raises(DataError, match="the encoder runs with other weights"):
        learn_surgery(encoder, task, merged, own, tmp_path / "b.safetensors", config)


def test_evaluate_uses_what_lies_beside_the_model(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--base", str(place / "base"), "--data", str(place / "data")]
    measure = ["evaluate", "--model", str(place / "merged"), "--task", "animals", "--task", "weather", *common, "--json"]
    code, text = run(capsys, *measure, str(tmp_path / "before.json"))
    assert code == 0, text
    models = [str(place / name) for name in ("animals", "weather")]
    learn = ["evidence", "surgery", *models, "--merged", str(place / "merged"), *common]
    code, text = run(
        capsys, *learn, "--updates", "200", "--rank", "4", "--set", "lr=0.01", "--json", str(tmp_path / "facts.json")
    )
    assert code == 0, text
    assert text.count("mean difference of features") == 2
    assert sorted(load_file(surgery_file(place / "merged", "weather"))) == ["down", "up"]
    assert json.loads((tmp_path / "facts.json").read_text())["tasks"]["animals"]["examples"] == 20
    code, text = run(capsys, *measure, str(tmp_path / "after.json"))
    assert code == 0, text
    assert "features corrected" in text
    code, text = run(capsys, *measure, str(tmp_path / "without.json"), "--no-surgery")
    assert code == 0, text
    before, after, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after", "without"))
    assert after["corrected"] == ["animals", "weather"]
    assert without["tasks"] == before["tasks"]
    thetau.open(place / "merged")  # still one model
    (place / "merged" / "model.safetensors").write_bytes((place / "animals" / "model.safetensors").read_bytes())
    code, text = run(capsys, *measure, str(tmp_path / "wrong.json"))
    assert code == 1
    assert "was learned for another merged model" in text
