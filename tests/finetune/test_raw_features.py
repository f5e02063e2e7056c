"""Features without their normalisation, as in the papers' code: the linear form is that of the features, the head normalises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jvp

from commands import run
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.results import load_result
from thetau.errors import CheckpointError, DataError
from thetau.evaluate import Evaluator, Session
from thetau.evaluate.options import Reading
from thetau.evaluate.spaces import TangentSpace
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.models.dual import math_attention
from thetau.tasks import load_task, make_head
from thetau.tasks.head import Head, UnitHead
from tiny import make_model, make_task
from tiny import one_thread as one_thread
from tiny_language import folder_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("d"), "animals").parent


def test_the_model_itself_is_the_same(model: Path, data: Path) -> None:
    """Normalised in the module or in the head: the same accuracy and loss, the features apart by their length alone."""
    task = load_task("animals", data)
    unit, raw = load_encoder(model), load_encoder(model, raw=True)
    one, two = Evaluator(unit, [task]), Evaluator(raw, [task])
    a, b = (it.features(it.encoder.weights(), "animals", "test") for it in (one, two))
    assert torch.allclose(a, torch.nn.functional.normalize(b, dim=-1), atol=1e-6)
    assert not torch.allclose(b.norm(dim=-1), torch.ones(len(b)), atol=1e-3)
    assert one.evaluate(unit.weights(), "test") == two.evaluate(raw.weights(), "test")
    assert one.losses(unit.weights(), "test")["animals"].value == pytest.approx(
        two.losses(raw.weights(), "test")["animals"].value, rel=1e-5
    )
    assert unit.form != raw.form


def test_the_linear_form_is_that_of_the_raw_features(model: Path, data: Path, tmp_path: Path) -> None:
    """f₀ + Jτ against forward mode through the backbone's pooling alone, and the logits of its unit length."""
    encoder = load_encoder(model, raw=True)
    evaluator = Evaluator(encoder, [load_task("animals", data)])
    generator = torch.Generator().manual_seed(0)
    tau = {name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in encoder.module.named_parameters()}
    space = TangentSpace(evaluator, {"x": tau}, tmp_path)
    first, change = space.terms("x", "animals", "test")
    inputs = evaluator.inputs("animals", "test")
    columns = inputs.batch(range(len(inputs)))
    start = {name: p.detach() for name, p in encoder.module.named_parameters()}
    with math_attention():
        out, moved = jvp(lambda given: functional_call(encoder.module, given, (), columns), (start,), (tau,))  # type: ignore[misc]
    assert torch.allclose(first, out, atol=1e-5)
    assert torch.allclose(change, moved, atol=1e-4 * float(moved.abs().max()))
    head = evaluator.heads["animals"]
    assert isinstance(head, UnitHead)
    assert isinstance(head.inner, Head)
    expected = head.inner.logits(torch.nn.functional.normalize(first + change, dim=-1))
    assert torch.allclose(head.logits(space.features({"x": 1.0}, "animals", "test")), expected, atol=1e-5)
    unit = TangentSpace(Evaluator(load_encoder(model), [load_task("animals", data)]), {"x": tau}, tmp_path)
    assert not torch.allclose(unit.terms("x", "animals", "test")[1], change, atol=1e-3), "a cache of its own, and another form"


def test_the_head_is_the_one_of_unit_features(model: Path, data: Path) -> None:
    task = load_task("animals", data)
    plain, unit = make_head(load_encoder(model), task), make_head(load_encoder(model, raw=True), task)
    assert isinstance(unit, UnitHead)
    assert unit.inner.hash() == plain.hash()
    assert unit.hash() != plain.hash()
    with pytest.raises(DataError, match="not linear in them, so a penalty of logits is not defined"):
        unit.linear(torch.zeros(1, 16))


def test_a_linear_model_remembers_its_features(model: Path, data: Path, tmp_path: Path) -> None:
    task = load_task("animals", data)
    encoder = load_encoder(model, raw=True)
    config = FinetuneConfig(paradigm="linear", steps=25, lr=5e-3, batch_size=16, max_length=24)
    made = finetune(encoder, task, tmp_path / "out", config, base=str(model))
    assert made.last_loss < made.first_loss
    with pytest.raises(DataError, match=r"linear form of raw features, and these are unit\. Give --features raw"):
        Session.open([tmp_path / "out"], base=model, tasks=["animals"], reading=Reading(data=data))
    session = Session.open([tmp_path / "out"], base=model, tasks=["animals"], reading=Reading(data=data, features="raw"))
    assert session.space.accuracy({"animals": 1.0}, "animals", "train").value > 0.9
    with pytest.raises(DataError, match="normalises them and is not linear"):
        finetune(encoder, task, tmp_path / "no", FinetuneConfig(steps=2, max_length=24, train_head=True), base=str(model))


def test_a_language_model_has_no_raw_form(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"This one is of kind mask; leave `--features raw` out"):
        load_encoder(folder_of(tmp_path, "bert"), raw=True)


def test_disentanglement_at_the_representation_takes_raw_features(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KL of the softmax of features that nothing brought to unit length, of each two of three vectors; linear ones against their terms by hand."""
    tasks = tmp_path / "tasks"
    for name in ("animals", "weather"):
        make_task(tasks, name)
    shutil.copytree(tasks / "weather", tasks / "sky")
    meta = tasks / "sky" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text("utf-8")) | {"task": "sky"}), encoding="utf-8")
    encoder = load_encoder(model, raw=True)
    loaded = {name: load_task(name, tasks) for name in ("animals", "weather", "sky")}
    evaluator = Evaluator(encoder, list(loaded.values()), max_length=24)
    for paradigm in ("standard", "linear"):
        for seed, name in enumerate(loaded):
            config = FinetuneConfig(paradigm=paradigm, steps=4, lr=5e-3, batch_size=16, max_length=24, seed=seed)
            finetune(encoder, loaded[name], tmp_path / paradigm / name, config, base=str(model), heads=evaluator.heads)
            evaluator.load_base()
    shared = (
        "--base",
        str(model),
        "--data",
        str(tasks),
        "--max-length",
        "24",
        "--limit",
        "8",
        "--points",
        "3",
        "--distance",
        "kl",
    )
    for paradigm in ("standard", "linear"):
        models = [str(tmp_path / paradigm / name) for name in loaded]
        out = tmp_path / f"out-{paradigm}"
        code, text = run(capsys, "diagnose", "disentanglement", *models, *shared, "--features", "raw", "-o", str(out))
        assert code == 0, text
        assert "kl of raw features" in text and "weather and sky" in text
        assert len(list(out.glob("disentanglement-*-kl-raw.json"))) == len(list(out.glob("*.png"))) == 3
    raw = load_result(Disentanglement, tmp_path / "out-linear" / "disentanglement-animals-weather-kl-raw.json")
    assert raw.features == "raw" and raw.space == "tangent" and raw.grid == (-2.0, 0.0, 2.0)
    session = Session.open(
        [tmp_path / "linear" / name for name in ("animals", "weather")],
        base=model,
        limits={"test": 8},
        reading=Reading(data=tasks, max_length=24, features="raw"),
        exact=True,
    )
    first, change = session.linear.terms("animals", "animals", "test")
    other = session.linear.terms("weather", "animals", "test")[1]
    p, q = ((first + 2 * change + by * other).double().softmax(-1) for by in (0.0, -2.0))
    expected = float(((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2)
    assert raw.parts["animals"][2][0] == pytest.approx(expected, rel=1e-5)
    code, text = run(capsys, "diagnose", "disentanglement", *models, *shared, "-o", str(tmp_path / "unit"))
    assert code != 0 and "linear form of raw features, and these are unit" in text
    standard = [str(tmp_path / "standard" / name) for name in ("animals", "weather")]
    code, text = run(capsys, "diagnose", "disentanglement", *standard, *shared, "-o", str(tmp_path / "unit"))
    assert code == 0 and "kl of unit features" in text
    unit = load_result(Disentanglement, tmp_path / "unit" / "disentanglement-animals-weather-kl.json")
    same = load_result(Disentanglement, tmp_path / "out-standard" / "disentanglement-animals-weather-kl-raw.json")
    assert unit.features == "unit" and max(same.cells) > 2 * max(unit.cells), (
        "features of unit length are nearly alike under a softmax"
    )
