"""The benchmark driver on a tiny model: all sections, resumed without any work, and what its page says of a part of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.bilateral import page as drawing
from experiments.bilateral import run as driver
from tiny import make_model, make_task
from tiny import one_thread as one_thread


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A quick run of everything, in the text suite of two tiny tasks."""
    folder = tmp_path_factory.mktemp("bilateral")
    for task in ("animals", "weather"):
        make_task(folder / "data", task)
    arguments = [
        "--quick",
        "--run",
        str(folder / "run"),
        "--out",
        str(folder / "bilateral.json"),
        "--suites",
        "text",
        "--threads",
        "1",
    ]
    arguments += ["--backbone-text", str(make_model(folder / "base")), "--data-text", str(folder / "data")]
    arguments += ["--tasks-text", "animals,weather"]
    driver.main(arguments)
    driver.main([*arguments, "--sections", "main", "--vectors", "attention,lora", "--methods", "bilateral;averaging"])
    return folder / "bilateral.json", arguments


def test_every_section_is_there(made: tuple[Path, list[str]]) -> None:
    content = json.loads(made[0].read_text())
    assert set(driver.SECTIONS) <= set(content)
    rows = content["main"]["rows"]
    names = {entry.name for entry in driver.entries()} | {"pre-trained", "individual"}
    for vectors, listed in (
        ("standard", names),
        *((one, {"bilateral", "averaging", "pre-trained", "individual"}) for one in ("attention", "lora")),
    ):
        assert {row["name"] for row in rows if row["vectors"] == vectors} == listed
    for row in rows:
        for task, n in row["n"].items():
            assert driver.unpacked(row["correct"][task], n).mean() == pytest.approx(row["accuracy"][task])
    own = {tuple(row["accuracy"].values()) for row in rows if row["name"] == "individual"}
    assert own
    assert all(row["normalised"] == pytest.approx(1.0) for row in rows if row["name"] == "individual")
    assert len(content["comparisons"]) == len(names) - 3 + 2
    adapters = {row["name"]: row for row in rows if row["vectors"] == "lora"}
    assert set(adapters["bilateral"]["n"]) == {"animals", "weather"}
    assert {row["name"] for row in content["oracle"]["rows"]} == {f"H {a}, G {b}" for a, b in driver.ORACLE}
    assert content["choice"]["date"] < "2100"
    assert content["choice"]["best"] in content["choice"]["grid"]
    assert {row["shape"] for row in content["cost"]["rows"]} == {"48x32", "7B"}


def test_a_second_run_computes_nothing(made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(made[0].read_text())

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(driver, "merged_vector", fail)
    monkeypatch.setattr(driver.Evaluator, "features", fail)
    monkeypatch.setattr(driver, "collect_moments", fail)
    driver.main([*made[1], "--sections", "choice,main,ablations,oracle"])
    driver.main([*made[1], "--sections", "main", "--vectors", "attention,lora", "--methods", "bilateral;averaging"])
    assert json.loads(made[0].read_text()) == before


def test_a_file_of_another_kind_is_left_alone(made: tuple[Path, list[str]]) -> None:
    without = [argument for argument in made[1] if argument != "--quick"]
    with pytest.raises(SystemExit, match="holds a run with --quick"):
        driver.main(without)
    with pytest.raises(SystemExit):
        driver.main([*made[1], "--sections", "mian"])


def test_differences_are_paired() -> None:
    """Two models that err on the same examples differ by their accuracies' difference with hardly any spread."""

    def row(bits: str) -> dict[str, Any]:
        return {"n": {"t": len(bits)}, "correct": {"t": f"{int(bits, 2):x}"}}

    half = "01" * 100
    better = "1" + half[1:]
    own = [{"t": 0.8}]
    told = driver.difference([row(better)], [row(half)], own)
    assert told["absolute"]["mean"] == pytest.approx(0.5)
    assert told["normalised"]["mean"] == pytest.approx(0.5 / 0.8)
    assert told["absolute"]["low"] >= 0
    assert told["absolute"]["high"] < 2.1  # unpaired, 200 examples have an interval of ± 10 points
    same = driver.difference([row(half)] * 2, [row(half)] * 2, own * 2)
    assert same["absolute"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["runs"] == 2
    opposite = driver.difference([row(half)], [row("10" * 100)], own)
    assert opposite["absolute"]["low"] < -5 < 5 < opposite["absolute"]["high"]
    assert driver.unpacked("5", 4).tolist() == [0, 1, 0, 1]


# The page.


def test_the_committed_page_is_drawn_from_the_committed_file() -> None:
    content = json.loads(drawing.RESULTS.read_text()) if drawing.RESULTS.is_file() else {}
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page(content)


def test_the_page_says_what_is_missing(made: tuple[Path, list[str]]) -> None:
    content = json.loads(made[0].read_text())
    whole = drawing.page(content)
    assert "Not measured yet" not in whole
    assert "the numbers mean nothing" in whole
    for section, title in (
        ("choice", "## The default"),
        ("main", "## Against other"),
        ("ablations", "## Ablations"),
        ("oracle", "## How much is"),
        ("cost", "## Cost"),
    ):
        assert title in whole
        part = drawing.page({key: value for key, value in content.items() if key != section})
        assert title not in part
        assert f"*Not measured yet: {section}" in part
    assert drawing.page({}).count("Not measured yet") == 5


def test_verdicts_follow_the_intervals(made: tuple[Path, list[str]]) -> None:
    assert drawing.verdict({"mean": 1.0, "low": 0.2, "high": 2.0}) == "better"
    assert drawing.verdict({"mean": 1.0, "low": -0.2, "high": 2.0}) == "not told apart"
    assert drawing.verdict({"mean": -1.0, "low": -2.0, "high": -0.2}) == "worse"
    one = {"suite": "text", "vectors": "standard", "k": 2, "against": "averaging", "seeds": [0]}
    worse = {"mean": -1.0, "low": -2.0, "high": -0.2}
    said = "\n".join(drawing.summary({"comparisons": [{**one, "normalised": worse}]}))
    assert "Where it does not help: text, standard, K = 2: averaging (-1.0 (-2.0 to -0.2))." in said
    assert "On average over the tables it is below averaging." in said
    turned = "\n".join(drawing.summary({"comparisons": [{**one, "normalised": {"mean": 1.0, "low": 0.2, "high": 2.0}}]}))
    assert "In no table is it worse" in turned
    assert "below" not in turned
