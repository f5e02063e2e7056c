"""The LoRA table on a tiny model: every row, and taken up again without any work."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.adapters import lora
from tiny import make_model, make_task
from tiny import one_thread as one_thread


def test_a_quick_run_and_the_same_again(tmp_path: Path) -> None:
    for task in ("animals", "weather"):
        make_task(tmp_path / "data", task)
    words = ["--quick", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "lora.json"), "--threads", "1"]
    words += ["--backbone", str(make_model(tmp_path / "base")), "--data", str(tmp_path / "data"), "--tasks", "animals,weather"]
    lora.main(words)
    first = json.loads((tmp_path / "lora.json").read_text())
    part = first["seeds"]["0"]
    assert set(part["rows"]) == {entry.name for entry in lora.merges()}
    assert 0 <= part["why"]["columns of B"] <= 1 + 1e-9
    assert part["why"]["rows of A"] > 0.5, "adapters of one seed begin with one A, and it moves little"
    lora.main(words)
    assert json.loads((tmp_path / "lora.json").read_text()) == first
