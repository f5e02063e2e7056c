"""Pages of results begin with sentences that are made of the result files, and a picture that can be read in the light and the dark."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import leads
from experiments.catalogue import page as catalogue
from experiments.common import DOCS, EXPERIMENTS, IMAGES
from thetau.diagnostics.predictions import wilson
from thetau.studies.paradigms import load_paradigm_results

PAGES = ("catalogue", "data", "paradigms", "bilateral", "sketches", "doctor", "llm", "bases")


def read(name: str) -> Any:
    return json.loads((EXPERIMENTS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_words_and_a_picture(name: str) -> None:
    title, _, words, _, picture, *_ = (DOCS / f"{name}.md").read_text(encoding="utf-8").split("\n")
    assert title.startswith("# ") and len(re.findall(r"[.!](?: |$)", words)) >= 3 and re.search(r"\d", words)
    alt, file = re.fullmatch(r"!\[(.+)\]\(images/(.+)\)", picture).groups()  # type: ignore[union-attr]
    assert len(alt) > 20 and (IMAGES / file).is_file()


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.png")), ids=lambda path: path.name)
def test_pictures_have_a_white_ground(path: Path) -> None:
    """Their ink is dark, so that a clear ground would leave nothing to read on a dark page."""
    image = pytest.importorskip("PIL.Image", reason="pictures are read by pillow: pip install pillow").open(path).convert("RGBA")
    width, height = image.size
    corners = [image.getpixel((x, y)) for x in (1, width - 2) for y in (1, height - 2)]
    assert corners == [(255, 255, 255, 255)] * 4


def test_the_catalogues_words_are_those_of_its_table() -> None:
    results = read("catalogue/results.json")
    order = catalogue.ranking(results, "one")
    told = leads.catalogue(results, order, catalogue.margin(results)).sentences
    best = results["rows"][order[0]]["default"]["average"]
    assert f"`{order[0]}`" in told[0] and f"{100 * best:.1f} of " in told[0]
    changed = copy.deepcopy(results)
    changed["rows"][order[-1]]["default"]["average"] = 0.99
    again = leads.catalogue(changed, catalogue.ranking(changed, "one"), catalogue.margin(changed)).sentences
    assert f"`{order[-1]}` comes nearest" in again[0] and "99.0" in again[0]


def test_bilaterals_comparisons_are_counted_by_their_intervals() -> None:
    results = read("bilateral/results.json")
    rows = [one["normalised"] for one in results["comparisons"] if not one["against"].startswith("bilateral")]
    above, below = sum(one["low"] > 0 for one in rows), sum(one["high"] < 0 for one in rows)
    words = leads.bilateral(results).sentences[0]
    assert f"in {len(rows)} comparisons" in words and f"above in {above}, below in {below}," in words
    assert f"not told apart in {len(rows) - above - below}" in words


def test_the_doctors_rates_are_called_by_their_intervals() -> None:
    study = copy.deepcopy(read("doctor/study.json"))
    study["hits"] = {"conflict": {"hits": 50, "n": 60}, "scale": {"hits": 5, "n": 5}}
    words = leads.doctor(study, {word: wilson(one["hits"], one["n"]) for word, one in study["hits"].items()}).sentences
    assert "50 of 60 for conflict and 5 of 5 for scale" in words[0]
    assert words[1] == "For conflict that is better than a coin, and scale were tried too few times to call."
    study["hits"]["conflict"]["hits"] = 33
    words = leads.doctor(study, {word: wilson(one["hits"], one["n"]) for word, one in study["hits"].items()}).sentences
    assert words[1].startswith("Nothing that was tried often is better than a coin")


def test_paradigms_name_the_best_and_its_seeds() -> None:
    results = load_paradigm_results(EXPERIMENTS / "paradigms" / "results.json")
    lead = leads.paradigms(results)
    assert lead is not None
    words = lead.sentences[0]
    values = {
        name: [row.addition.tuned.absolute for row in results.of(name) if row.addition is not None] for name in results.names()
    }
    best = max((name for name in values if values[name]), key=lambda name: sum(values[name]) / len(values[name]))
    assert (
        words.startswith(f"Vectors of *{best}* ({len(results.of(best))} seed")
        and f"{100 * sum(values[best]) / len(values[best]):.1f} %" in words
    )


def test_a_lead_stands_below_the_title_of_a_page_that_has_one() -> None:
    lead = leads.Lead(sentences=("One.", "Two."), picture="x.png", alt="what it shows")
    assert leads.led("# T\n\ntext\n", lead) == "# T\n\nOne. Two.\n\n![what it shows](images/x.png)\n\ntext\n"
    with pytest.raises(SystemExit, match="begins with its title"):
        leads.led("text\n", lead)
