"""The page of four kinds of vectors says what its figures say, and both distances are of one run of the model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from experiments.disentanglement import page as drawing
from experiments.disentanglement.run import KINDS, TASKS, Remembered


def results(least: str, seed: int = 0) -> dict[str, Any]:
    """Made up: one kind keeps to its tasks, the others do not."""
    draw = random.Random(seed)
    grid = [-2.0, -1.0, 0.0, 1.0, 2.0]
    pairs = [f"{a} and {b}" for i, a in enumerate(TASKS) for b in TASKS[i + 1 :]]

    def error(kind: str) -> dict[str, Any]:
        top = 0.01 if kind == least else draw.uniform(0.3, 0.5)
        return {"inside": top, "all": 2 * top, "error": [[top * abs(a * b) for b in grid] for a in grid]}

    return {
        "base": "tiny",
        "tasks": list(TASKS),
        "batch": 16,
        "settings": {"steps": 3, "examples": 8, "points": len(grid)},
        "grid": grid,
        "kinds": {
            kind: {
                "accuracy": {task: {"base": 0.5, "own": 0.9, "sum": 0.81 if kind == least else 0.72} for task in TASKS},
                "pairs": {pair: {"disagreement": error(kind), "kl": error(kind)} for pair in pairs},
            }
            for kind in KINDS
        },
    }


def test_the_lead_follows_the_figures(tmp_path: Path) -> None:
    for least in ("τJp", "attention-only"):
        found = results(least)
        text = drawing.page(found)
        assert text.startswith("# Does a vector keep to its own task?\n\n")
        assert f"those of *{least}* keep most to their own task at the classifier" in text and "1.0 % of the labels" in text
        assert f"90.0 % of the models' own accuracies with *{least}*" in text and "with *standard* it keeps 80.0 %" in text
        rows = [line for line in text.splitlines() if line.startswith(f"| {least} |")]
        assert len(rows) == 4 and rows[0].endswith("| 0.010 |")
        assert "**3 pairs of 3 tasks and one seed" in text
        for distance in drawing.PLACES:
            drawing.draw(found, distance, tmp_path / f"{distance}.png")
            assert (tmp_path / f"{distance}.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_run_once_for_both_distances() -> None:
    asked: list[dict[str, float]] = []

    class Space:
        def features(self, coefficients: dict[str, float], task: str, split: str) -> torch.Tensor:
            asked.append(coefficients)
            return torch.tensor([sum(coefficients.values())])

    space = Remembered(Space())  # type: ignore[arg-type]
    first = space.features({"a": 1.0, "b": 0.0}, "a", "test")
    assert space.features({"a": 1.0}, "a", "test") is first and len(asked) == 1, "what counts 0 is not there"
    space.features({"a": 1.0}, "b", "test")
    space.features({"a": 0.5}, "a", "test")
    assert len(asked) == 3
