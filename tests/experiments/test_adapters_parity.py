"""The table of parity with PEFT, made again."""

from __future__ import annotations

from experiments.adapters.parity import RESULTS, run


def test_the_table_holds() -> None:
    found = run()
    for name, row in found["forms"].items():
        assert row["weights"] < 1e-6, name
        assert row["outputs"] < 1e-5, name
        assert row["moved"] > 1e-3, name
    rows = found["combinations"]
    for name, row in rows.items():
        assert row.get("ours", 0.0) < 1e-5, name
    assert rows["cat"]["theirs from the dense sum"] < 1e-5
    for name in ("linear", "dare_linear, no drops"):  # A and B summed apart
        assert rows[name]["theirs from the dense sum"] > 0.5
    assert RESULTS.exists()
