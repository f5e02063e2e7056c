"""The everyday recipes with a tiny model: every one of them as it stands, gone on with without any work, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import thetau
from experiments.everyday import page as drawing
from experiments.everyday import run as driver
from tiny import one_thread as one_thread
from tiny_causal import talker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("everyday")
    arguments = ["--quick", "--plain", "--skills", str(folder / "skills"), "--run", str(folder / "run")]
    arguments += ["--out", str(folder / "out.json"), "--model", str(talker(folder / "base"))]
    driver.main(arguments)
    return folder, arguments


def test_every_recipe_is_run_and_means_what_it_says(made: tuple[Path, list[str]]) -> None:
    folder, _ = made
    results = json.loads((folder / "out.json").read_text())
    assert [row["alpha"] for row in results["forgetting"]["rows"]] == [0.0, *driver.ALPHAS]
    assert [row["name"] for row in results["chat_vector"]][:3] == ["base", "continued", "chat"]
    assert len(results["restoring"]) == 3 + len(driver.GAMMAS)
    base, run = thetau.open(folder / "base"), folder / "run"

    def moved(path: Path) -> dict[str, torch.Tensor]:
        return (thetau.open(path) - base).state_dict()

    want = moved(run / "models/unwanted")
    for name, tensor in moved(run / "recipes/forgetting-0.5/merged").items():
        torch.testing.assert_close(tensor, -0.5 * want[name], atol=1e-6, rtol=1e-5)
    aligned, tuned = moved(folder / "skills/models/sentiment"), moved(run / "models/finetuned")
    for name, tensor in moved(run / "recipes/restored-0.5/merged").items():
        torch.testing.assert_close(tensor, tuned[name] + 0.5 * aligned[name], atol=1e-6, rtol=1e-5)


def test_it_goes_on(made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was made before")

    folder, arguments = made
    before = json.loads((folder / "out.json").read_text())
    monkeypatch.setattr("thetau.finetune.run.train", never)
    monkeypatch.setattr("thetau.evaluate.evaluator.examine", never)
    monkeypatch.setattr(driver, "app", never)
    driver.main(arguments)
    later = json.loads((folder / "out.json").read_text())
    assert later == before


def test_the_page(made: tuple[Path, list[str]]) -> None:
    text = drawing.page(json.loads((made[0] / "out.json").read_text()))
    assert text.startswith("# Everyday arithmetic on language models")
    assert "| trained on spam |" in text
    assert "| finetuned + 0.5 · safety vector |" in text
    nothing: dict[str, Any] = json.loads((made[0] / "out.json").read_text())
    nothing["forgetting"]["alpha"] = 0.0
    assert "nothing could be forgotten at this price" in drawing.page(nothing)
