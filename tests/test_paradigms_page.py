"""The page of the paradigms is what its tool draws from the result file, and its words follow from the figures."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from thetau.studies.paradigms import load_paradigm_results

ROOT = Path(__file__).resolve().parent.parent


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("make_paradigms", ROOT / "tools" / "make_paradigms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_paradigms"] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_drawn_from_the_committed_file() -> None:
    made = tool()
    assert made.PAGE.read_text(encoding="utf-8") == made.page(load_paradigm_results(made.RESULTS))


def test_the_verdicts_turn_with_the_figures() -> None:
    made = tool()
    results = load_paradigm_results(made.RESULTS)
    claim = made.CLAIMS[0]
    names = {"τJp cyclic": "linear", "linear": "τJp cyclic"}
    turned = replace(results, rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in results.rows))
    assert made.verdict(claim, results)[0] == "holds"
    assert made.verdict(claim, turned)[0] == "does not hold"
    few = replace(results, rows=tuple(row for row in results.rows if row.name != "linear"))
    assert made.verdict(claim, few)[0] == "not measured"
    assert "not measured" in made.page(few)
    assert made.interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
