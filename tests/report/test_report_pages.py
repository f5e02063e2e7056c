"""Reports without a browser: what is said, that nothing runs or leaves the page, and that it stays small."""

from __future__ import annotations

import builtins
import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import folder as folder
from commands import run
from fixtures import random_weights, shifted, write_model
from reports import HOSTILE, changed, doctor_result, read_page, suite_results, words
from thetau.checkpoint.disk import write_json
from thetau.diagnostics.changes import changes
from thetau.errors import ThetauError
from thetau.facade import open as open_weights
from thetau.report import LIMIT, page_of, render
from thetau.report.blocks import Column, Heatmap, Page, Point, Scatter, Section, Table
from thetau.report.doctors import doctor_page
from thetau.report.drawing import LETTER, STEPS, arranged, draw, ink_on, shade
from thetau.report.render import _assets, _environment
from thetau.report.scales import axis, order_of, spread_of, ticks
from thetau.report.subject import kind_of
from thetau.report.suites import front, suite_page
from thetau.report.text import clean
from thetau.studies.suite import PLAN
from thetau.studies.suite_results import load_results

ROOT = Path(__file__).parents[2]


def one(*blocks: Any) -> Page:
    return Page(title="t", about="a", lead="l", sections=(Section(slug="s", title="s", blocks=blocks),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: suite_page(suite_results(methods=12, tasks=11, names=HOSTILE)),
        lambda: doctor_page(doctor_result(11, names=HOSTILE)),
    ],
    ids=["suite", "doctor"],
)
def test_nothing_in_a_name_runs(make: Callable[[], Page]) -> None:
    text = render(make())
    page = read_page(text)
    told = words(page)
    for name in HOSTILE[:6]:
        assert name in told or json.dumps(name)[1:-1] in told, f"{name!r} is shown as it is"
    assert "\u202e" not in text and "\x00" not in text and "\\u202e" in told
    text.encode("utf-8")


def test_markup_between_backticks_stays_text() -> None:
    page = read_page(
        render(
            one(
                Table(
                    title="`<b>`", columns=(Column(name="x", number=False),), rows=(("`<i>`",),), caption="`</code><b>` and `b`"
                )
            )
        )
    )
    assert [element.text for element in page.all("code")] == ["</code><b>", "b"]


def test_suite_says_every_value_and_which_can_be_told_apart(tmp_path: Path) -> None:
    results = suite_results(methods=3, tasks=4, memory=True)
    results.save(tmp_path / "results.json")
    assert kind_of(tmp_path) == ("suite", tmp_path / "results.json")
    page = read_page(render(page_of(tmp_path)))
    told = [element.text for element in page.elements if element.tag in ("td", "th")]
    for row in results.rows:
        for found in row.accuracy.values():
            assert f"{100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})" in told
    assert told.count("100") >= 5 * 4, "n of every cell"
    a, b = sorted((row for row in results.rows if row.role == "merged"), key=lambda row: -row.absolute)[:2]
    leads = torch.tensor([100 * (a.accuracy[task].value - b.accuracy[task].value) for task in a.accuracy], dtype=torch.float64)
    half = 3.182446 * float(leads.std()) / 2  # Student's t of 3 degrees of freedom
    mean = float(leads.mean())
    signed = [f"{value:+.1f}".replace("-", "−") for value in (mean, mean - half, mean + half)]
    assert f"{signed[0]} ({signed[1]} to {signed[2]})" in told
    assert sum(text in ("not told apart", "first is better", "second is better") for text in told) == 3


def test_the_front_is_what_no_other_beats() -> None:
    points = [(3.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 3.0), (2.0, 2.0)]
    assert front(points) == [True, True, False, True, True], "an equal is not beaten"


def test_a_run_that_is_not_finished_says_what_is_missing(tmp_path: Path) -> None:
    results = suite_results(methods=2, tasks=2)
    write_json(
        tmp_path / PLAN, {"suite": "demo", "tasks": ["task0", "task1", "task2"], "methods": ["method 2", "method 3", "ties"]}
    )
    tuned = tmp_path / "finetuned" / "task0" / "abc"
    tuned.mkdir(parents=True)
    (tuned / "thetau_finetune.json").write_text("{}")
    cache = tmp_path / "cache"
    cache.mkdir()
    results.save(tmp_path / "whole.json")
    rows = json.loads((tmp_path / "whole.json").read_text())["rows"]
    (cache / "row-1.json").write_text(json.dumps(rows[2]))
    (cache / "row-2.json").write_text("{damaged")
    made = page_of(tmp_path)
    told = words(read_page(render(made)))
    assert made.about == "unfinished suite run"
    assert "Missing: the fine-tuning on task1, task2 (2 of 3 tasks)" in told
    assert "Missing: the merges by method 3, ties (2 of 3)" in told and "Merges that are done" in told
    (tmp_path / PLAN).unlink()
    assert "what else is missing cannot be told" in words(read_page(render(page_of(tmp_path))))
    results.save(tmp_path / "results.json")
    write_json(tmp_path / PLAN, {"methods": ["method 2", "ties"]})
    assert "Not there yet: the merge by ties" in words(read_page(render(page_of(tmp_path))))


def test_nan_is_shown_as_such(tmp_path: Path) -> None:
    results = suite_results()
    results = replace(results, rows=(*results.rows[:-1], replace(results.rows[-1], absolute=math.nan, normalised=math.nan)))
    results.save(tmp_path / "results.json")
    assert math.isnan(load_results(tmp_path / "results.json").rows[-1].normalised)
    read = read_page(render(page_of(tmp_path)))
    assert "NaN" in [element.text for element in read.all("td")]
    values = ((math.nan, 1.0), (None, math.inf))
    drawn = read_page(render(one(Heatmap(title="h", rows=("a", "b"), columns=("c", "d"), values=values))))
    (cells,) = [json.loads(script.text) for script in drawn.all("script") if script.attributes.get("type")]
    assert cells["values"] == ["NaN 1", "– ∞"]
    assert any(element.attributes.get("class") == "nan" for element in drawn.all("path"))
    assert [shade(value, 1.0, True) for value in (math.nan, None, 0.0, -1.0, math.inf)] == ["nan", "nan", "p0", "m16", "p16"]


@pytest.mark.parametrize("what", ["suite", "doctor"])
def test_two_hundred_models_stay_below_the_limit(what: str) -> None:
    page = suite_page(suite_results(methods=200, tasks=12)) if what == "suite" else doctor_page(doctor_result(200, layers=4))
    text = render(page)
    assert len(text.encode()) <= LIMIT
    read = read_page(text)
    sizes = {
        (len(cells["rows"]), len(cells["columns"]) or len(cells["rows"]))
        for cells in (json.loads(s.text) for s in read.all("script") if s.attributes.get("type"))
    }
    assert (200, 200) in sizes, "no model is left out of the heatmap"


def test_what_is_too_long_is_cut_and_said() -> None:
    rows = tuple((f"a rather long name of a tensor, number {i}, in some layer", float(i)) for i in range(60_000))
    text = render(one(Table(title="long", columns=(Column(name="x", number=False), Column(name="y")), rows=rows)))
    assert len(text.encode()) <= LIMIT and "of 60,000 rows; the others would make the page too large" in text


def test_alike_rows_stand_together() -> None:
    values = ((1.0, 0.0), (0.0, 1.0), (0.9, 0.1), (math.nan, 1.0))
    order = order_of(values)
    places = {row: place for place, row in enumerate(order)}
    assert abs(places[0] - places[2]) == 1 and abs(places[1] - places[3]) == 1
    chart = Heatmap(
        title="h",
        rows=("a", "b", "c"),
        columns=("a", "b", "c"),
        values=((1, 2, 3), (4, 5, 6), (7, 8, 9)),
        groups={"x": ("c", "a"), "y": ("b",)},
    )
    drawn = arranged(chart)
    assert drawn.rows == drawn.columns == ("c", "a", "b") and drawn.values == ((9, 7, 8), (3, 1, 2), (6, 4, 5))


def test_scales() -> None:
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((3.2, 3.2), (-5e-9, 2e-9), (1e300, 1.0000001e300), (0.0, 0.0)):
        marks = ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high and len(set(marks)) == len(marks) < 20
    log = axis([0.02, 700.0, math.inf, -1.0], 0.0, 100.0, log=True)
    assert (log.low, log.high) == (0.01, 1000.0) and log.at(0.01) == 0.0 and log.at(1000.0) == 100.0 and log.at(3.1622776) == 50.0
    assert axis([], 0.0, 1.0).ticks
    thick = spread_of([0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0])
    assert max(thick) == thick[1] == 1.0 and thick[0] == pytest.approx(thick[2])
    assert spread_of([1.0, 1.0, 1.0, 1.0, 2.0], [1.0]) == []


# Ottosson's oklab, in which the style sheet mixes a cell's colour of the colour of 0 and that of the end.
TO_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)


def oklab(colour: str) -> torch.Tensor:
    parts = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return TO_LAB @ (TO_CONES @ linear) ** (1 / 3)


def brightness(lab: torch.Tensor) -> float:
    linear = torch.linalg.solve(TO_CONES, torch.linalg.solve(TO_LAB, lab) ** 3).clamp(0, 1)
    return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_can_be_read_on_every_colour(theme: str) -> None:
    sheet = (ROOT / "src" / "thetau" / "report" / "templates" / "report.css").read_text(encoding="utf-8")
    pairs = {name: colours for name, *colours in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", sheet)}
    (night,) = re.findall(r"--night: (#\w{6})", sheet)
    colour = {name: oklab(one[theme == "dark"]) for name, one in pairs.items()}
    inks = {"off": colour["ink"], "mid": oklab(night), "on": colour["ground"]}
    for sign, end in (("p", "high"), ("m", "low")):
        for step in range(STEPS + 1):
            cell = torch.lerp(colour["zero"], colour[end], step / STEPS)
            low, high = sorted((brightness(cell), brightness(inks[ink_on(f"{sign}{step}")])))
            assert (high + 0.05) / (low + 0.05) >= 3.9, (sign, step)


def test_names_in_a_chart_of_points_do_not_cover_each_other() -> None:
    draw_ = random.Random(3)
    points = tuple(
        Point(name=f"a method {i}", x=draw_.uniform(1, 2), y=draw_.uniform(50, 51), size=1.0, front=True) for i in range(60)
    )
    drawn = draw(Scatter(title="t", x="x", y="y", points=points))
    boxes = []
    for mark in drawn.marks:
        if "over" in str(mark.at.get("class")):
            long = LETTER * len(mark.text)
            left = mark.at["x"] - (long if mark.at.get("text-anchor") == "end" else 0)
            boxes.append((left, left + long, mark.at["y"]))
    assert len(boxes) > 3
    for i, (left, right, line) in enumerate(boxes):
        assert not any(abs(line - y) < 13 and left < b and a < right for a, b, y in boxes[:i])
    (path,) = [mark.at["d"] for mark in drawn.marks if mark.at.get("class") == "front"]
    heights = [float(step.split()[1]) for step in path[1:].split("L")]
    assert heights == sorted(heights, reverse=True), "the line only rises: what another beats in both is beside it"


@pytest.mark.parametrize("name", ["suite", "merged", "bank", "doctor"])
def test_the_examples_in_the_docs_are_of_this_code(name: str) -> None:
    text = (ROOT / "docs" / "examples" / f"{name}.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= LIMIT
    assert _assets()["style"] in text and _assets()["script"] in text, "draw them anew: make reports"
    if name == "suite":
        assert text == render(page_of(ROOT / "experiments" / "demo" / "results.json"))


def test_hidden_characters_are_spelled_out() -> None:
    assert clean("plain – “text” τ") == "plain – “text” τ"
    assert clean("a\u202eb\ud800\x07") == "a\\u202eb\\ud800\\u0007"
    assert len(clean("x" * 10_000)) == 400


# Merged models.


def merge(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    code, printed = run(
        capsys,
        "merge",
        "-b",
        "base",
        "-m",
        "a",
        "-m",
        "b",
        "--method",
        "task_arithmetic",
        "--set",
        "scale=0.5",
        "-o",
        "merged",
        *more,
    )
    assert code == 0, printed
    return printed


def test_changes_are_those_of_the_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(capsys, "--quiet")
    loaded = {name: load_file(folder / name / "model.safetensors") for name in ("base", "a", "b", "merged")}
    base = open_weights("base")
    found = changes(base, open_weights("merged"), [open_weights("a"), open_weights("b")])
    floats = [name for name, value in loaded["base"].items() if value.dtype.is_floating_point]
    assert {tensor.name for tensor in found.tensors} == set(floats)

    def flat(model: str, names: list[str]) -> torch.Tensor:
        return torch.cat([(loaded[model][name].double() - loaded["base"][name].double()).flatten() for name in names])

    for layer, group in found.together(lambda tensor: tensor.layer).items():
        names = [tensor.name for tensor in found.tensors if tensor.layer == layer]
        ours, others = flat("merged", names), [flat(model, names) for model in "ab"]
        assert group.norm == pytest.approx(float(ours.norm()), rel=1e-6)
        cosines = [float(ours @ other / ours.norm() / other.norm()) for other in others]
        assert group.cosines == pytest.approx(cosines, abs=1e-6)
        theta = torch.cat([loaded["base"][name].double().flatten() for name in names])
        assert group.shift == pytest.approx(float(ours.norm() / theta.norm()), rel=1e-6)


def test_a_merged_model_with_its_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (folder / "merged.json").write_text(
        json.dumps({"tasks": {"<b>": {"metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 90}}, "model": "m"})
    )
    printed = merge(capsys, "--report")
    assert "merged/report.html" in printed
    told = words(read_page((folder / "merged" / "report.html").read_text("utf-8")))
    assert "a is under cc-by-nc-4.0, so the model may not be used commercially." in told
    assert "good against thetau.json" in told and "<b>: 0.5 (0.4 to 0.6), n = 90" in told
    assert "name: task_arithmetic" in told and "thetau verify merged --again" in told
    assert str(folder) not in told
    assert "block 1" in told and "Every tensor" in told
    code, printed = run(capsys, "export", "card", "merged")
    assert code == 0 and "[report.html](report.html)" in (folder / "merged" / "README.md").read_text("utf-8")
    assert run(capsys, "verify", "merged")[0] == 0, "the report is no part of what is verified"


def test_other_ways_to_make_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "theirs.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 0.5}}\n  - {model: b, parameters: {weight: 0.5}}\n"
    )
    for out, arguments in {
        "theirs": ("merge", "theirs.yml", "--report"),
        "vector": ("merge", "-b", "base", "-m", "a", "-m", "b", "--method", "average", "--output", "vector", "--report"),
        "codes": ("merge", "-b", "base", "-m", "a", "--method", "average", "--quantise", "fp8-row", "--report"),
        "negated": ("vector", "negate", "-b", "base", "-m", "a", "-s", "0.5"),
    }.items():
        code, printed = run(capsys, *arguments, "-o", out, "-q")
        assert code == 0, printed
    told = {out: words(read_page(render(page_of(folder / out)))) for out in ("theirs", "vector", "codes", "negated")}
    assert "2 models merged by linear" in told["theirs"] and "The recipe has no base" in told["theirs"]
    assert "merged task vector" in told["vector"] and "This is a task vector" in told["vector"]
    assert "good against thetau.json" in told["codes"] and "Every tensor" in told["codes"]
    assert "not by a recipe" in told["negated"] and "thetau merge recipe.yaml" not in told["negated"]


def test_hostile_names_of_models_and_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name in HOSTILE if "\x00" not in name]
    base = {f"layers.{i}.{name}.weight": torch.ones(2, 2) * (i + 1) for i, name in enumerate(names)}
    write_model(tmp_path / "base", base)
    (tmp_path / "base" / "README.md").write_text(f"---\nlicense: {json.dumps(names[3])}\n---\n")
    write_model(tmp_path / "x", shifted(base, 1))
    for name in ("base", "x"):
        (tmp_path / name / "config.json").unlink()  # its module tree would be asked about these names
    write_json(tmp_path / "recipe.json", {"base": "base", "models": [{"path": "x", "name": names[0]}], "method": "average"})
    code, printed = run(capsys, "merge", "recipe.json", "-o", "merged", "--report", "--quiet")
    assert code == 0, printed
    told = words(read_page((tmp_path / "merged" / "report.html").read_text("utf-8")))
    assert names[0] in told and names[3] in told and f"layers.1.{names[1]}.weight" in told


def test_what_is_gone_or_broken_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(capsys, "--quiet")
    (folder / "b").rename(folder / "elsewhere")
    write_model(folder / "a", random_weights(7))
    path = folder / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    told = words(read_page(render(page_of(folder / "merged"))))
    assert "its bytes are not those that were written" in told
    assert "b is not where it was" in told and "a has changed since the merge." in told
    quick = words(read_page(render(page_of(folder / "merged", weights=False))))
    assert "The weights were not read" in quick and "not made" in quick
    weights["logit_scale"] = torch.tensor(math.nan)
    save_file(weights, path, metadata={"format": "pt"})
    told = words(read_page(render(page_of(folder / "merged"))))
    assert "values are not finite" in told
    (folder / "base").rename(folder / "gone")
    assert "base is not where it was" in words(read_page(render(page_of(folder / "merged"))))


def test_a_bank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="banks need scikit-learn: pip install 'thetau[bases]'")
    write_model(folder / "c", shifted(random_weights(0), 5))
    vectors = [part for name in "abc" for part in (f"<{name}>={name}",)]
    code, printed = run(capsys, "basis", "build", *vectors, "--base", "base", "-o", "bank", "-k", "2")
    assert code == 0, printed
    told = words(read_page(render(page_of(folder / "bank"))))
    assert "All 2 files hold what was written." in told and "<a>" in told and "History" in told
    code, printed = run(capsys, "basis", "forget", "bank", "<c>", "--json", "state.json")
    assert code == 0, printed
    assert sorted(json.loads((folder / "state.json").read_text())["members"]) == ["<a>", "<b>"]
    next(iter(sorted((folder / "bank").glob("*.safetensors")))).write_bytes(b"no")
    assert "cannot be read" in words(read_page(render(page_of(folder / "bank"))))


# The verb.


def test_the_verb_writes_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    suite_results().save(folder / "run" / "results.json")
    code, printed = run(capsys, "report", "run", "-o", "pages/suite.html")
    assert code == 0 and "pages/suite.html: suite run, 8 sections" in printed
    read_page((folder / "pages" / "suite.html").read_text("utf-8"))
    doctor_result().save(folder / "doctor.json")
    code, printed = run(capsys, "report", "doctor.json")
    assert code == 0 and "report.html: before merging" in printed
    code, printed = run(capsys, "doctor", "base", "a", "b", "-o", "doctor.html", "--json", "doctor.json")
    assert code == 0, printed
    told = (folder / "doctor.html").read_text("utf-8")
    read_page(told)
    assert run(capsys, "report", "doctor.json", "-o", "again.html")[0] == 0
    assert (folder / "again.html").read_text("utf-8") == told, "the page of a result is that of its JSON"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere: is not there. Give an output of `thetau merge`, a run of"),
        (("base",), "base: holds none of thetau.json, bank.json, results.json, doctor.json"),
        (("base/config.json",), "is JSON of a kind of which there is no report"),
        (("base/model.safetensors",), "cannot be read as JSON"),
        (("bad",), "cannot be read as the results of a suite"),
        (("half.json",), "half.json: cannot be read as Doctor"),
        (("run", "--evaluation", "x.json"), "`--evaluation` belongs to a merged model"),
        (("run", "-o", "base/config.json/page.html"), "config.json"),
    ],
)
def test_what_cannot_be_reported_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    for name, content in (("bad", '{"suite": 1, "rows": []}'), ("run", "")):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(content)
    suite_results().save(folder / "run" / "results.json")
    (folder / "half.json").write_text('{"compared": [], "advice": []}')
    code, printed = run(capsys, "report", *arguments)
    assert code == 1 and said in " ".join(printed.split()) and "Traceback" not in printed


def test_a_report_needs_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(
        capsys, "merge", "-b", "base", "-m", "a", "--method", "average", "--output", "vector", "-o", "v.safetensors", "--report"
    )
    assert code == 1 and "`--report` is written into the output's folder" in printed and not (folder / "v.safetensors").exists()


def test_jinja_is_named_where_it_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *arguments, **more)

    _environment.cache_clear()
    monkeypatch.delitem(sys.modules, "jinja2", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    code, printed = run(capsys, "merge", "-b", "base", "-m", "a", "--method", "average", "-o", "merged", "--report")
    monkeypatch.undo()
    assert code == 1 and "pip install 'thetau[report]'" in printed and not (folder / "merged").exists(), "said before the merge"
    _environment.cache_clear()


def test_any_thetau_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "thetau.json").write_text("{}")
    with pytest.raises(ThetauError, match=r"thetau\.json: damaged"):
        page_of(tmp_path)


# Files that somebody changed.


@pytest.mark.parametrize("kind", ["suite", "doctor", "model", "bank"])
def test_a_changed_file_gives_a_page_or_an_error_in_words(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    if kind == "suite":
        suite_results().save(path := folder / "results.json")
    elif kind == "doctor":
        doctor_result().save(path := folder / "doctor.json")
    elif kind == "model":
        merge(capsys, "--quiet")
        path = folder / "merged" / "thetau.json"
    else:
        pytest.importorskip("sklearn", reason="banks need scikit-learn: pip install 'thetau[bases]'")
        write_model(folder / "c", shifted(random_weights(0), 5))
        assert run(capsys, "basis", "build", "a", "b", "c", "--base", "base", "-o", "bank", "-k", "2")[0] == 0
        path = folder / "bank" / "bank.json"
    whole = json.loads(path.read_text())
    pages = 0
    for seed in range(40):
        path.write_text(json.dumps(changed(whole, random.Random(seed))))
        try:
            text = render(page_of(path, weights=False))
        except ThetauError:
            continue
        pages += 1
        assert text.startswith("<!doctype html>")
    assert 0 < pages < 40, "some changes do no harm, and some are refused"
