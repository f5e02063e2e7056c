"""The page of the paradigms is what its tool draws from the result file, and its words follow from the figures."""

from __future__ import annotations

from dataclasses import replace

from experiments.paradigms import page as drawing
from thetau.studies.paradigms import load_paradigm_results


def test_the_committed_page_is_drawn_from_the_committed_file() -> None:
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page(load_paradigm_results(drawing.RESULTS))


def test_the_verdicts_turn_with_the_figures() -> None:
    results = load_paradigm_results(drawing.RESULTS)
    claim = drawing.CLAIMS[0]
    names = {"τJp cyclic": "linear", "linear": "τJp cyclic"}
    turned = replace(results, rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in results.rows))
    assert drawing.verdict(claim, results)[0] == "holds"
    assert drawing.verdict(claim, turned)[0] == "does not hold"
    few = replace(results, rows=tuple(row for row in results.rows if row.name != "linear"))
    assert drawing.verdict(claim, few)[0] == "not measured"
    assert "not measured" in drawing.page(few)
    assert drawing.interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
