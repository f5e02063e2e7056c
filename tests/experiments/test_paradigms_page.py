"""The page of the paradigms is what its tool draws from the result file, and its words follow from the figures."""

from __future__ import annotations

from dataclasses import replace

from experiments.paradigms import page as drawing
from thetau.studies.paradigms import load_paradigm_results


def test_the_committed_page_is_drawn_from_the_committed_file() -> None:
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page(load_paradigm_results(drawing.RESULTS))


def test_the_verdicts_turn_with_the_figures() -> None:
    results = load_paradigm_results(drawing.RESULTS)
    claim = next(one for one in drawing.CLAIMS if one.more == "τJp incremental")
    names = {"τJp incremental": "linear", "linear": "τJp incremental"}
    turned = replace(results, rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in results.rows))
    assert drawing.verdict(claim, results).word == "holds"
    assert drawing.verdict(claim, turned).word == "does not hold"
    few = replace(results, rows=tuple(row for row in results.rows if row.name != "linear"))
    assert str(drawing.verdict(claim, few)) == "no verdict: not measured"
    assert "not measured" in drawing.page(few)


def test_what_was_chosen_from_few_examples_carries_no_verdict() -> None:
    results = load_paradigm_results(drawing.RESULTS)
    claim = next(one for one in drawing.CLAIMS if one.words.startswith("tuned addition: τJp"))
    assert drawing.verdict(claim, results).word == "no verdict"
    many = replace(results, available=results.sizes)  # had the tasks no more examples than were used
    assert drawing.verdict(claim, many).word == "holds"


def test_no_paper_is_given_a_claim_that_it_does_not_make() -> None:
    assert not [claim for claim in drawing.CLAIMS if "Jin" in claim.paper and "negation" in claim.words]
