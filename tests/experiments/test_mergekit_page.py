"""The page beside mergekit is what its tool draws from the result files, and every recipe that lies there stands on it."""

from __future__ import annotations

import json

from experiments.mergekit import page as drawing
from experiments.mergekit.comparing import BOUND
from experiments.mergekit.run import BAD, HERE, REASONS, RECIPES

RESULT = json.loads((HERE / "parity.json").read_text(encoding="utf-8"))


def test_the_committed_page_is_drawn_from_the_committed_files() -> None:
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.drawn()


def test_the_result_has_every_recipe_and_what_differs_has_a_reason() -> None:
    assert [row["recipe"] for row in RESULT["recipes"]] == sorted((file.stem for file in RECIPES.glob("*.yml")), key=_by_file)
    assert [row["recipe"] for row in RESULT["bad"]] == sorted((file.stem for file in BAD.glob("*.yml")), key=_by_file)
    assert len(RESULT["recipes"]) >= 40
    for row in RESULT["recipes"]:
        if row["verdict"] == "agrees" and "ratios" not in row:
            assert row["largest"] <= BOUND
            assert not row["differences"]
        elif row["verdict"] != "agrees":
            assert row["verdict"] == "ours is right"
            assert row["recipe"] in REASONS


def _by_file(name: str) -> str:
    return f"{name}.yml"
