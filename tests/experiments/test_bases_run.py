"""The experiments on bases in their quick form, and the page that is drawn from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.bases import page as drawing
from experiments.common import ROOT

SECTIONS = "tasks,clusters,steps,partitions,sparse,sizes"  # the slow ones are for `make bases`


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run of several sections, and of the same run taken up again."""
    run = tmp_path_factory.mktemp("bases")
    words = [sys.executable, "-m", "experiments.bases.run", "text", "--quick", "--threads", "1", "--run", str(run)]
    out = run / "bases-text.json"
    done = subprocess.run(
        [*words, "--out", str(out), "--sections", SECTIONS], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = subprocess.run(
        [*words, "--out", str(run / "again.json"), "--sections", SECTIONS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(out.read_text()) == json.loads((run / "again.json").read_text()), "what was done is taken up again"
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_every_section_is_there(quick: dict[str, Any]) -> None:
    assert set(SECTIONS.split(",")) <= set(quick)
    assert len(quick["partitions"]["Mean"]["values"]) == 15
    assert quick["quick"] is True


def test_what_must_agree_agrees(quick: dict[str, Any]) -> None:
    """Partitions that are the same thing under two names give the same number."""
    every = {name: {v["partition"]: v for v in one["values"]} for name, one in quick["partitions"].items()}
    alone = next(label for label in every["Mean"] if label.count("|") == 3)
    assert len({json.dumps(found[alone]["accuracy"]) for found in every.values()}) == 1, "k = 4 uses no inner method"
    pairs = [label for label in every["Mean"] if sorted(len(part.split("+")) for part in label.split(" | ")) == [2, 2]]
    assert len(pairs) == 3
    found = [every["Mean"][label]["accuracy"] for label in pairs]
    assert all(one == pytest.approx(found[0], abs=1 / 8) for one in found), (
        "the sum of means of two pairs is half the sum of four"
    )
    rows = {row["k"]: row for row in quick["sizes"]["rows"]}
    assert rows[1]["random"] == []
    assert all(len(row["random"]) == 5 for k, row in rows.items() if 1 < k < len(quick["sizes"]["tasks"]))


def test_the_page_is_drawn(quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.json").write_text(json.dumps(quick))
    monkeypatch.setattr(drawing, "RESULTS", tmp_path)
    monkeypatch.setattr(drawing, "IMAGES", tmp_path)
    page = drawing.page()
    for key, title, _ in drawing.PARTS:
        assert (f"### {title}" in page) == (key in quick)
    assert "not measured" in page
    assert (tmp_path / "bases-text-clusters.png").stat().st_size > 5000
    assert (tmp_path / "bases-text-sizes.png").stat().st_size > 5000


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "IMAGES", tmp_path)
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page()
