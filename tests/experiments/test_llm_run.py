"""The experiment on language models with a tiny one: all of it, gone on with without any work, and its page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.llm import page as drawing
from experiments.llm import run as driver
from experiments.llm.skills import NOUNS, SKILLS, rows
from thetau.tasks.causal.answers import extracted
from tiny import one_thread as one_thread
from tiny_causal import talker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("llm")
    arguments = ["--quick", "--plain", "--run", str(folder / "run"), "--out", str(folder / "out.json")]
    arguments += ["--model", str(talker(folder / "base")), "--only", "task_arithmetic", "karcher", "--longest", "120"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "MERGED", "karcher")
        driver.main(arguments)
    return folder / "out.json", arguments


def test_a_quick_run(made: tuple[Path, list[str]]) -> None:
    results = json.loads(made[0].read_text())
    assert list(results["rows"]) == ["task_arithmetic", "karcher"]
    assert all(set(row["skills"]) == set(SKILLS) for row in results["rows"].values()), results["rows"]
    assert list(results["tuned"]) == ["task_arithmetic"], "a mean on the sphere has no λ"
    assert list(results["references"]) == ["base", "own"]
    assert list(results["transfer"]) == list(SKILLS)
    for skill in SKILLS:
        assert results["transfer"][skill]["skills"][skill] == results["references"]["own"]["skills"][skill]
    assert [row["alpha"] for row in results["negation"]["rows"]] == [0.0, *driver.ALPHAS]
    assert results["negation"]["rows"][0]["kept"], "nothing taken out changes nothing"
    taken = results["forgotten"]
    assert [row["alpha"] for row in taken["rows"]] == list(driver.SHARES)
    assert taken["rows"][0]["skills"] == results["rows"]["karcher"]["skills"]
    assert taken["alpha"] == max(row["alpha"] for row in taken["rows"] if row["kept"])
    for row in taken["rows"]:
        first = taken["rows"][0]["validation"]
        assert row["kept"] == all(row["validation"][name] >= driver.KEEP * first[name] for name in first)


def test_it_goes_on(made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was made before")

    before = json.loads(made[0].read_text())
    monkeypatch.setattr("thetau.finetune.run.train", never)
    monkeypatch.setattr("thetau.evaluate.evaluator.examine", never)
    monkeypatch.setattr(driver.subprocess, "run", never)
    driver.main([*made[1], "--minutes", "0"])
    assert json.loads(made[0].read_text()) == before
    driver.main([*made[1][:-4], "karcher", "ties", "--minutes", "0"])
    later = json.loads(made[0].read_text())
    assert (list(later["rows"]), later["missing"]) == (["karcher"], ["ties"])
    made[0].write_text(json.dumps(before))


def test_a_merge_that_takes_too_long_is_said(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = driver.Run(Path(made[1][3]), Path(made[1][7]), driver.QUICK, chat=False)
    assert driver.merged(run, "breadcrumbs", 0.01) == {"stopped": 0.01}
    (run.folder / "rows" / "breadcrumbs.json").unlink()


def test_the_page(made: tuple[Path, list[str]]) -> None:
    results = json.loads(made[0].read_text())
    text = drawing.page(results)
    assert "| [`karcher`](methods/karcher.md) |" in text
    assert "Too few methods were measured in this run" in text
    assert "## Taken out of a model that has it: `karcher` − α τ" in text
    assert f"| **{results['forgotten']['alpha']:g}** |" in text
    low, high = (
        {"alpha": alpha, "average": value, "skills": {"a": {"correct": 100 * value, "n": 100, "value": value}}}
        for alpha, value in ((0.0, 0.2), (0.5, 0.9))
    )
    assert "`a` goes from 20.0 to 90.0 %." in drawing.steps({"rows": [low, high]})[0]
    assert drawing.steps({"rows": [low, low | {"alpha": 0.5}]}) == []
    assert "Taken out of a model" not in drawing.page(results | {"forgotten": None})
    assert "**These figures are from a small run**, not from the whole `make llm`: train 16 in place of 960, " in text
    whole = results | {"settings": asdict(driver.Sizes()), "remarks": ["Of an older rule."]}
    assert "small run" not in drawing.page(whole)
    assert "\nOf an older rule.\n" in drawing.page(whole)
    assert "Not measured in the time of this run." in drawing.page(results | {"negation": None, "transfer": None})
    many = dict.fromkeys(("task_arithmetic", "ties", "average", "sce", "ram"), results["rows"]["karcher"])
    assert "0 of 6 methods help: none. Behind task arithmetic: none. Ahead of it: none." in drawing.page(
        results | {"rows": results["rows"] | many, "missing": ["ties"]}
    )


def test_differences_that_a_sample_can_make_are_no_verdict() -> None:
    def row(correct: int) -> dict[str, Any]:
        return {"skills": {"a": {"correct": correct, "n": 100, "value": correct / 100}}, "average": correct / 100}

    assert drawing.lower(row(60), row(50)) < 0 < drawing.lower(row(90), row(50))


def test_what_is_methods_of_four() -> None:
    names = driver.methods(4)
    assert {"task_arithmetic", "ties", "wudi", "tsv_m", "karcher"} <= set(names)
    assert not {"fisher", "regmean", "slerp", "emr", "tall_masks"} & set(names)


@pytest.mark.parametrize("skill", list(SKILLS))
def test_skills(skill: str) -> None:
    listed = list(rows(skill, 200))
    assert max(Counter(row["question"] for row in listed).values()) == 1
    assert listed == list(rows(skill, 200))
    assert listed[:50] == list(rows(skill, 50))


def test_answers_are_right() -> None:
    for row in rows("arithmetic", 200):
        step, marked = row["answer"].split(" = ")
        assert eval(step) == int(extracted(row["answer"], "gsm8k") or "") == int(marked.split()[0]) >= 1
    for row in rows("extraction", 100):
        told = json.loads(row["answer"])
        assert all(str(value) in row["question"] for value in told.values())
    for row in rows("language", 100):
        words = row["answer"].split()
        assert ("not" in row["question"].split()) == (words[0] == "zo")
        assert words[-2] in NOUNS.values()
    assert Counter(row["answer"] for row in rows("sentiment", 200)).keys() == {"positive", "negative"}
