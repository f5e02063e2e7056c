"""Pages of what `compare`, `diagnose` and comparisons of paradigms wrote: figures where they belong, names that cannot run, files that were changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import thetau
from commands import folder as folder
from commands import run
from reports import HOSTILE, changed, read_page, words
from thetau.diagnostics import compare
from thetau.diagnostics.cosines import CosineGroup, Cosines
from thetau.diagnostics.disentanglement import Disentanglement
from thetau.diagnostics.interference import Interference, Pair
from thetau.diagnostics.landscape import Landscape, Line, Mark
from thetau.diagnostics.layers import FEATURES, LayerRow, Layers
from thetau.errors import DataError, ThetauError
from thetau.evaluate.accuracy import Accuracy
from thetau.report import page_of, render
from thetau.report.subject import kind_of
from thetau.studies.paradigms import ParadigmResults

ROOT = Path(__file__).resolve().parents[2]
PARADIGMS = ROOT / "experiments" / "paradigms" / "results.json"


def layers(*tasks: str, merged: tuple[str, ...] = ("sum", "wudi")) -> Layers:
    def row(task: str, layer: str, kind: str, block: int | None, k: int) -> LayerRow:
        last = kind == FEATURES
        return LayerRow(
            task=task,
            layer=layer,
            kind=kind,
            block=block,
            rows=7,
            direction=None if last else 0.01 * k,
            magnitude=None if last else -0.02 * k,
            moved=0.1 * k,
            missed=() if last else (0.9, 0.8, 0.7, 0.6),
            missed_by_others=None if last or len(tasks) == 1 else (0.95, 0.9, 0.85, 0.8),
            error=dict.fromkeys(merged, 0.125 * k),
            drift=dict.fromkeys(merged, 0.25 * k),
        )

    rows = [
        row(task, *place, k)
        for task in tasks
        for k, place in enumerate(
            (
                ("e", "other", None),
                ("l.0.q", "attention", 0),
                ("l.0.k", "attention", 0),
                ("l.1.m", "mlp", 1),
                (FEATURES, FEATURES, None),
            )
        )
    ]
    return Layers(
        tasks=tasks,
        merged=merged,
        split="test",
        n=dict.fromkeys(tasks, 5),
        shares=(1 / 32, 1 / 16, 1 / 8, 1 / 4),
        rows=tuple(rows),
    )


def landscape(*tasks: str) -> Landscape:
    plane = tuple(tuple(1 + x + 2 * y for y in range(3)) for x in range(3))
    names = ("base", *tasks) if len(tasks) == 2 else tasks
    lines = [
        Line(
            start=a,
            end=b,
            steps=(0.0, 0.5, 1.0),
            loss=dict.fromkeys(tasks, (1.0, 2.0, 1.5)),
            barrier=dict.fromkeys(tasks, 0.75),
            joint=1.5,
        )
        for a, b in ((names[0], names[1]), (names[0], names[2]), (names[1], names[2]))
    ]
    mark = Mark(
        name="merged",
        at=(0.25, 0.75),
        outside=0.37,
        distance=1.25,
        loss=dict.fromkeys(tasks, 0.5),
        accuracy=dict.fromkeys(tasks, 0.875),
    )
    return Landscape(
        tasks=tasks,
        space="weights",
        split="test",
        n=dict.fromkeys(tasks, 9),
        grid=(0.0, 0.5, 1.0),
        loss=dict.fromkeys(tasks, plane),
        accuracy=dict.fromkeys(tasks, tuple(tuple(0.1 for _ in range(3)) for _ in range(3))),
        lines=tuple(lines),
        marks=(mark,),
        through="base" if len(tasks) == 2 else "models",
        frame=((2.0, 0.0), (1.0, 1.5)),
    )


def interference(*tasks: str) -> Interference:
    count = len(tasks)
    square = tuple(tuple(float(i + j) for j in range(count)) for i in range(count))
    found = Accuracy.of(3, 4)
    pairs = tuple(
        Pair(a=a, b=b, tau_jp=1.5, cosine=0.1, normalised=0.875, accuracy={a: found, b: found})
        for i, a in enumerate(tasks)
        for b in tasks[:i]
    )
    return Interference(
        tasks=tasks,
        space="weights",
        split="test",
        n=dict.fromkeys(tasks, 4),
        products=square,
        unit=dict.fromkeys(tasks, 1.0),
        cosine=square,
        pairs=pairs,
        correlations=(),
    )


def disentanglement(*tasks: str) -> Disentanglement:
    a, b = tasks[:2]
    error = ((0.0, 0.5), (0.25, 1.0))
    return Disentanglement(
        tasks=(a, b),
        space="weights",
        split="test",
        grid=(0.0, 1.0),
        distance="kl",
        symmetric=True,
        n={a: 3, b: 4},
        parts={a: error, b: error},
        error=error,
        features="raw",
    )


def cosines(*tasks: str) -> Cosines:
    count = len(tasks)
    square = tuple(tuple(1.0 if i == j else 0.25 for j in range(count)) for i in range(count))
    return Cosines(groups=(CosineGroup(name=tasks[0], tasks=tasks, cosine=square, mean_absolute=0.25),))


MAKERS: dict[str, Callable[..., Any]] = {
    "layers": layers,
    "landscape": landscape,
    "interference": interference,
    "disentanglement": disentanglement,
    "cosines": cosines,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_kind_is_told_by_the_fields_and_names_are_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "anything.json"
    for names in (HOSTILE[:2], HOSTILE[3:6]):
        MAKERS[kind](*(names[:2] if kind == "disentanglement" else names)).save(path)
        assert kind_of(path) == (kind, path)
        told = words(read_page(render(page_of(path))))
        assert all(json.dumps(name)[1:-1] in told or name in told for name in names[:2])


def test_a_landscape_shows_every_point_mark_and_line(tmp_path: Path) -> None:
    landscape("a", "b", "c").save(path := tmp_path / "plane.json")
    told = words(read_page(render(page_of(path))))
    assert "The plane of a, b, c" in told and "θ(a) + α (θ(b) − θ(a)) + β (θ(c) − θ(a))" in told
    assert "0.750" in told and "1.25" in told and "0.370" in told and "0.7500" in told, "place, distance, share and barrier"
    assert "least at (0.00, 0.00)" in told
    landscape("a", "b").save(path)
    assert "θ₀ + α τ(a) + β τ(b)" in words(read_page(render(page_of(path))))


def test_layers_are_means_over_the_layers_of_a_block(tmp_path: Path) -> None:
    found = layers("a", "b")
    found.save(path := tmp_path / "layers.json")
    page = page_of(path)
    (outputs,) = [section for section in page.sections if section.slug == "outputs"]
    heat: Any = outputs.blocks[0]
    assert heat.columns == ("outside", "0", "1", FEATURES)
    assert heat.values[0] == pytest.approx((0.0, 0.125 * 1.5, 0.125 * 3, 0.125 * 4))
    layers("a", merged=()).save(path)
    told = words(read_page(render(page_of(path))))
    assert "no merge" in told and "Relative error" not in told


def test_two_models_have_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "compare", "a", "b", "--base", "base", "--json", "ab.json", "-q")[0] == 0
    code, printed = run(capsys, "report", "ab.json", "-o", "ab.html")
    assert code == 0 and "comparison of two models" in printed
    told = words(read_page((folder / "ab.html").read_text("utf-8")))
    found = compare(thetau.open("a"), thetau.open("b"), base=thetau.open("base"))
    for one in found.tensors:
        assert one.name in told
    for sentence in found.verdict():
        assert sentence in told


def test_paradigms_have_a_page_with_the_figures_of_their_table(tmp_path: Path) -> None:
    assert kind_of(PARADIGMS) == ("paradigms", PARADIGMS)
    results = TypeAdapter(ParadigmResults).validate_json(PARADIGMS.read_bytes())
    told = words(read_page(render(page_of(PARADIGMS))))
    for name in results.names():
        assert name in told
        values = [100 * row.addition.tuned.normalised for row in results.of(name) if row.addition is not None]
        if values:
            assert f"{sum(values) / len(values):.1f}" in told
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "paradigms.json").write_bytes(PARADIGMS.read_bytes())
    assert kind_of(tmp_path / "run") == ("paradigms", tmp_path / "run" / "paradigms.json")


def test_names_in_a_comparison_of_paradigms_are_text(tmp_path: Path) -> None:
    text = PARADIGMS.read_text("utf-8")
    for old, new in (('"standard"', HOSTILE[0]), ('"qnli"', HOSTILE[1]), ('"arithmetic"', HOSTILE[3])):
        assert old in text
        text = text.replace(old, json.dumps(new))
    (path := tmp_path / "p.json").write_text(text, encoding="utf-8")
    told = words(read_page(render(page_of(path))))
    assert HOSTILE[0] in told and HOSTILE[3] in told


def test_a_comparison_that_is_not_finished_says_what_is_missing(tmp_path: Path) -> None:
    content = json.loads(PARADIGMS.read_text("utf-8"))
    gone = content["rows"].pop()
    (path := tmp_path / "p.json").write_text(json.dumps(content), encoding="utf-8")
    assert f"{gone['name']}: seed {gone['seed']}" in words(read_page(render(page_of(path))))


@pytest.mark.parametrize("kind", [*MAKERS, "paradigms", "comparison"])
def test_a_changed_file_gives_a_page_or_an_error_in_words(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = folder / "made.json"
    if kind == "paradigms":
        content = json.loads(PARADIGMS.read_text("utf-8"))
        content["rows"] = content["rows"][:2]
        path.write_text(json.dumps(content), encoding="utf-8")
    elif kind == "comparison":
        assert run(capsys, "compare", "a", "b", "--json", str(path), "-q")[0] == 0
    else:
        MAKERS[kind](*(("a", "b") if kind == "disentanglement" else ("a", "b", "c"))).save(path)
    whole = json.loads(path.read_text("utf-8"))
    pages = refused = 0
    for seed in range(40):
        path.write_text(json.dumps(changed(whole, random.Random(seed))), encoding="utf-8")
        try:
            text = render(page_of(path))
        except ThetauError:
            refused += 1
            continue
        pages += 1
        assert text.startswith("<!doctype html>")
    assert pages and refused, "some changes do no harm, and some are refused"


def test_figures_that_are_missing_are_refused_by_name(tmp_path: Path) -> None:
    for made, cut, said in (
        (landscape("a", "b"), lambda told: told["loss"]["a"].pop(), "one figure a task and point"),
        (layers("a", "b"), lambda told: told["rows"][0]["error"].pop("sum"), "one figure a merge"),
        (interference("a", "b"), lambda told: told["products"].pop(), "one figure a pair"),
        (disentanglement("a", "b"), lambda told: told["error"].pop(), "one figure a point"),
        (cosines("a", "b"), lambda told: told["groups"][0]["cosine"].pop(), "one figure a pair"),
    ):
        made.save(path := tmp_path / "made.json")
        told = json.loads(path.read_text("utf-8"))
        cut(told)
        path.write_text(json.dumps(told), encoding="utf-8")
        with pytest.raises(DataError, match=said):
            page_of(path)


def test_what_has_no_page_is_said_with_what_has_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("kernel.json").write_text('{"split": "test", "rows": []}')
    Path("list.json").write_text("[1, 2]")
    for name in ("kernel.json", "list.json"):
        code, printed = run(capsys, "report", name)
        told = " ".join(printed.split())
        assert code == 1 and "JSON of a kind of which there is no report" in told and "Traceback" not in told
        assert "`thetau diagnose` layers, landscape, tau-jp, disentanglement or cosine" in told
