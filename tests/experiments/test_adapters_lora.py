"""The LoRA table on a tiny model: every row, and taken up again without any work; and the page that is drawn from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.adapters import candidates, lora, page
from tiny import make_model, make_task
from tiny import one_thread as one_thread


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run on two tasks and two seeds, and its file."""
    folder = tmp_path_factory.mktemp("lora")
    for task in ("animals", "weather"):
        make_task(folder / "data", task)
    words = ["--quick", "--run", str(folder / "run"), "--out", str(folder / "lora.json"), "--threads", "1", "--seeds", "0,1"]
    words += ["--backbone", str(make_model(folder / "base")), "--data", str(folder / "data"), "--tasks", "animals,weather"]
    lora.main([*words, "--sections", "why,choice,rows"])
    return words, folder / "lora.json"


def test_a_quick_run_and_the_same_again(quick: tuple[list[str], Path]) -> None:
    words, file = quick
    first = json.loads(file.read_text())
    assert list(first["groups"]) == ["shared 0", "shared 1", "own 0", "own 1"]
    for group in first["groups"].values():
        assert set(group["rows"]) == {entry.name for entry in lora.merges()}
    lora.main([*words, "--sections", "why,choice,rows"])
    assert json.loads(file.read_text()) == first


def test_the_tuned_rows_of_other_seeds_have_the_first_ones_scale(quick: tuple[list[str], Path]) -> None:
    groups = json.loads(quick[1].read_text())["groups"]
    for entry in lora.merges():
        scales = {group["rows"][entry.name]["scale"] for name, group in groups.items() if name.startswith("shared")}
        assert len(scales) == 1
        assert scales <= set(entry.scales or (1.0,))
        assert groups["shared 1"]["rows"][entry.name]["trials"] is None


def test_adapters_of_one_seed_share_their_rows(quick: tuple[list[str], Path]) -> None:
    groups = json.loads(quick[1].read_text())["groups"]
    shared, own = groups["shared 0"]["why"], groups["own 0"]["why"]
    assert shared["overlaps"]["rows of A"] > 0.5, "they begin with one A, and it moves little"
    assert own["overlaps"]["rows of A"] < shared["overlaps"]["rows of A"]
    for side in ("inputs", "gradients"):
        found = shared["captured"]
        assert 0 <= found[f"{side}, own"] <= found[f"{side}, best"] * (1 + 1e-3), "no span holds more than the leading one"


def test_every_candidate_is_measured(quick: tuple[list[str], Path]) -> None:
    rows = json.loads(quick[1].read_text())["choice"]["rows"]
    wanted = {
        (", ".join(filter(None, (one.name, one.length))), f"{scale:g}") for one in candidates.candidates() for scale in one.scales
    }
    assert {(name, scale) for name, row in rows.items() for scale in row} == wanted


def test_the_section_of_a_run_and_of_parts_of_it(quick: tuple[list[str], Path]) -> None:
    content = json.loads(quick[1].read_text())
    text = page.drawn(content)
    for said in ("overlap of two tasks, adapters of one seed", "outputs dual", "**clear**", "`clear`, with nothing tuned, is"):
        assert said in text
    assert "On the other seeds (seeds: 3" in text
    for entry in lora.merges():
        assert f"| {entry.name} |" in text or f"| **{entry.name}** |" in text
    content["groups"] = {"shared 0": {key: {} for key in ("rows", "individual")}}
    del content["choice"]
    assert page.drawn(content).count("Not measured yet.") == 3


def test_an_interval_draws_tasks_and_groups() -> None:
    """Equal rows give 0 to 0; a constant difference gives that constant; one group alone is spread by its tasks."""
    rows = [{"accuracy": {"a": 0.5, "b": 0.7}}, {"accuracy": {"a": 0.6, "b": 0.9}}]
    ones = [{"a": 1.0, "b": 1.0}] * 2
    assert lora.difference(rows, rows, ones) == {"mean": 0, "low": 0, "high": 0, "groups": 2}
    more = [{"accuracy": {name: value + 0.05 for name, value in row["accuracy"].items()}} for row in rows]
    told = lora.difference(more, rows, ones)
    assert told["low"] == pytest.approx(told["high"]) == pytest.approx(5.0)
    told = lora.difference([{"accuracy": {"a": 0.5, "b": 0.9}}], [{"accuracy": {"a": 0.4, "b": 0.9}}], ones[:1])
    assert (told["low"], told["high"]) == (pytest.approx(0.0), pytest.approx(10.0))
    assert told["mean"] == pytest.approx(5.0)


def test_the_page_is_what_the_file_says() -> None:
    content = json.loads(lora.RESULTS.read_text(encoding="utf-8"))
    assert page.page(content) == page.PAGE.read_text(encoding="utf-8"), "run `python -m experiments.adapters.page`"


def test_the_leading_share_is_that_of_the_eigenvalues() -> None:
    import torch

    factors = torch.randn(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = (factors * 0.7 ** torch.arange(20)) @ factors.T / 60
    moment = moment @ moment.T
    want = float(torch.linalg.eigvalsh(moment)[-4:].sum())
    assert float(lora.leading(moment, 4)) == pytest.approx(want, rel=1e-6)
