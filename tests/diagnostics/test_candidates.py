"""Which base the models were fine-tuned from: by hand, as a pure judgement, and as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import thetau
from fixtures import random_weights, shifted, write_model
from thetau.cli import main
from thetau.diagnostics import inspect
from thetau.diagnostics.candidates import Candidates, judge
from thetau.engine.executor import Engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bases as continued training leaves them, and models of both."""
    first = random_weights(0)
    second = shifted(first, 77, 0.05)
    write_model(tmp_path / "first", first)
    write_model(tmp_path / "second", second)
    for seed, (name, base) in enumerate((("a1", first), ("b1", first), ("a2", second), ("b2", second))):
        write_model(tmp_path / name, shifted(base, seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), printed.out + printed.err


def flat(name: str) -> Tensor:
    weights = load_file(f"{name}/model.safetensors")
    return torch.cat([weights[key].double().flatten() for key in sorted(weights) if weights[key].is_floating_point()])


def seen(path: str = "seen.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text())["candidates"]
    return found


def test_each_model_is_given_to_its_own_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["a1", "b1", "a2", "b2"]
    code, text = run(capsys, "inspect", "first", *models, "--candidate", "second", "-q", "--json", "seen.json")
    assert code == 0, text
    found = seen()
    assert found["compared"] == ["first", "second"]
    points = {name: flat(name) for name in (*models, "first", "second")}
    for judged in found["models"]:
        assert judged["verdict"] == "from"
        assert judged["nearest"] == ("first" if judged["model"].endswith("1") else "second")
        for base in ("first", "second"):
            far = float((points[judged["model"]] - points[base]).norm())
            assert judged["distance"][base] == pytest.approx(far, rel=1e-5)
            assert judged["ratio"][base] == pytest.approx(far / float(points[base].norm()), rel=1e-5)
        own, other = sorted(judged["distance"].values())
        assert judged["clear"] == pytest.approx(own / other)
        assert abs(judged["between"]) < 0.05, "fine-tuning does not move along the line between the bases"
    between = float((points["first"] - points["second"]).norm())
    assert found["apart"] == [[0.0, pytest.approx(between, rel=1e-5)], [pytest.approx(between, rel=1e-5), 0.0]]
    for one in found["candidates"]:
        taus = [points[name] - points[one["name"]] for name in models]
        pairs = [float(x @ y / x.norm() / y.norm()) for i, x in enumerate(taus) for y in taus[:i]]
        assert one["cosine"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
        assert one["norm"] == pytest.approx(float(points[one["name"]].norm()), rel=1e-6)
    assert "a1: fine-tuned from first (‖θ − θ₀‖ = " in text
    assert "the next, first, is 5." in text
    assert "looks like the base of all" not in text, "the candidates decide"


def test_the_order_in_which_bases_are_named_does_not_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = []
    for base, candidate in (("first", "second"), ("second", "first")):
        code, text = run(capsys, "inspect", base, "a1", "a2", "-c", candidate, "-q", "--json", "seen.json")
        assert code == 0, text
        verdicts.append([(one["nearest"], one["verdict"]) for one in seen()["models"]])
    assert verdicts[0] == verdicts[1] == [("first", "from"), ("second", "from")]


def test_without_candidates_nothing_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "inspect", "first", "a1", "b1", "-q", "--json", "seen.json")
    assert code == 0, text
    assert seen() is None
    assert "first looks like the base of all 2 models" in text


def test_candidates_that_cannot_be_compared_do_not_hide_the_rest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {name: value for name, value in random_weights(0).items() if "output.dense" not in name}
    write_model(folder / "short", short)
    damaged = random_weights(3)
    damaged["logit_scale"] = torch.tensor(float("nan"))
    write_model(folder / "damaged", damaged)
    write_model(folder / "copy", load_file("second/model.safetensors"))
    arguments = [word for name in ("short", "second", "damaged", "copy") for word in ("-c", name)]
    code, text = run(capsys, "inspect", "first", "a1", "a2", *arguments, "-q", "--json", "seen.json")
    assert code == 0, text
    assert "candidate short: short: lacks 4 tensors of first" in text
    assert "candidate damaged: damaged/model.safetensors: tensor 'logit_scale' holds 1 NaN" in text
    assert "copy: has the same weights as second, and counts once." in text
    found = seen()
    assert found["compared"] == ["first", "second", "copy"]
    assert [(one["nearest"], one["second"]) for one in found["models"]] == [("first", "second"), ("second", "first")]
    assert {one["name"]: one["same_as"] for one in found["candidates"]}["copy"] == "second"


def test_equal_far_and_identical_ones_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = load_file("second/model.safetensors")
    write_model(folder / "near", shifted(second, 5, 1e-4))
    write_model(folder / "stranger", random_weights(9))
    code, text = run(
        capsys, "inspect", "first", "a2", "stranger", "second", "-c", "second", "-c", "near", "-q", "--json", "seen.json"
    )
    assert code == 0, text
    assert [one["verdict"] for one in seen()["models"]] == ["ambiguous", "none", "itself"]
    assert "are equally near (‖θ − θ₀‖ = " in text
    assert "stranger: fine-tuned from none of the candidates. The nearest, " in text
    assert "second: has the weights of second." in text
    code, text = run(capsys, "inspect", "first", "a1", "-c", "first", "-q")
    assert code == 0, text
    assert "a1: may be fine-tuned from first (" in text
    assert "there is no other candidate to compare with." in text


def test_vectors_are_not_judged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (thetau.open("a1") - thetau.open("first")).save("v.safetensors")
    code, text = run(capsys, "inspect", "first", "v.safetensors", "a2", "-c", "second", "-q", "--json", "seen.json")
    assert code == 0, text
    assert [one["model"] for one in seen()["models"]] == ["a2"]
    assert "v.safetensors: is a task vector or an adapter over first, near it by construction, and is not judged." in text
    code, text = run(capsys, "inspect", "first", "a1", "-c", "v.safetensors", "-q")
    assert code == 1
    assert "is a task vector and cannot be the base" in text
    code, text = run(capsys, "inspect", "first", "-c", "second", "-q", "--json", "seen.json")
    assert code == 0, text
    assert seen()["models"] == []


def test_one_pass_reads_each_model_once(folder: Path) -> None:
    """Bytes that the engine says it reads: the same tensors once, whatever the number of candidates."""

    class Told:
        def __init__(self) -> None:
            self.passes: list[int] = []

        def begin(self, description: str, total: int) -> None:
            self.passes.append(total)

        def advance(self, done: int) -> None: ...

        def end(self) -> None: ...

    base = thetau.open("first")
    models = [thetau.open(name) for name in ("a1", "a2")]
    passes = []
    for candidates in ([], [thetau.open("second"), thetau.open("b2")]):
        told = Told()
        inspect(base, models, candidates=candidates, engine=Engine(workers=1, progress=told))
        passes.append(told.passes)
    assert [len(found) for found in passes] == [1, 1]


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 4), st.permutations(range(4)))
@settings(max_examples=40, deadline=None)
def test_the_judgement_is_that_of_the_points(seed: int, bases: int, models: int, order: list[int]) -> None:
    """Nearest by distance, whatever the order of the candidates."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(bases, 6, generator=generator, dtype=torch.float64) * 10
    own = torch.randint(0, bases, (models,), generator=generator)
    tuned = points[own] + 0.01 * torch.randn(models, 6, generator=generator, dtype=torch.float64)

    def judged(kept: list[int]) -> Candidates:
        every = torch.cat([points[kept], tuned])
        squared = torch.cdist(every, every).square()
        norms = [float(points[i].norm()) for i in kept]
        return judge([f"c{i}" for i in kept], [f"m{k}" for k in range(models)], squared, norms, problems={}, not_judged={})

    straight, mixed = judged(list(range(bases))), judged([i for i in order if i < bases])
    assert [one.nearest for one in straight.models] == [f"c{int(i)}" for i in own]
    for a, b in zip(straight.models, mixed.models, strict=True):
        assert (a.nearest, a.second, a.verdict) == (b.nearest, b.second, b.verdict)
        assert a.clear is not None and 0 <= a.clear <= 1
        assert a.between is not None and a.between <= 0.5 + 1e-9


def test_a_damaged_model_among_candidates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file("b1/model.safetensors")
    weights["logit_scale"] = torch.tensor(float("nan"))
    save_file(weights, "b1/model.safetensors")
    code, text = run(capsys, "inspect", "first", "a1", "b1", "-c", "second", "-q", "--json", "seen.json")
    assert code == 0, text
    assert "b1: b1/model.safetensors: tensor 'logit_scale' holds 1 NaN" in text
    assert [one["model"] for one in seen()["models"]] == ["a1"]


def test_points_that_rounding_cannot_tell_apart_are_ambiguous_or_the_same() -> None:
    squared = torch.tensor([[0.0, 1e-12, 0.0], [1e-12, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    (one,) = judge(["x", "y"], ["m"], squared, [1.0, 1.0], problems={}, not_judged={}).models
    assert (one.verdict, one.clear) == ("itself", 1.0)
