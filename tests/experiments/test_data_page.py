"""The page on merging with data: what it makes of seeds, of unfinished runs and of what looking costs; the driver's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.data_methods.page import cost, others
from experiments.data_methods.run import OUT, ROWS, Setting

TASKS = ("ape", "bee", "cat")


def results(suite: str, seed: int, lead: float, rows: int = len(ROWS)) -> dict[str, Any]:
    """Every row alike, but the last with unlabelled examples, which leads by so much on each task, and a little more on each next one."""
    using = [name for name, row in ROWS.items() if row.data == "unlabelled"][-1]
    made = {}
    for name, row in list(ROWS.items())[:rows]:
        gain = [lead + 0.001 * place if name == using else 0.0 for place in range(len(TASKS))]
        tasks = {task: 0.8 + more for task, more in zip(TASKS, gain, strict=True)}
        made[name] = {"data": row.data, "average": sum(tasks.values()) / len(TASKS), "tasks": tasks}
    return {"suite": suite, "seed": seed, "rows": made, "test": dict.fromkeys(TASKS, 200)}


def test_a_suite_is_judged_over_its_tasks_and_seeds() -> None:
    lines = others(
        [results("demo", 0, 0.03), results("demo", 1, 0.03), results("vision", 0, -0.05), results("text", 0, 0.1, rows=4)]
    )
    demo = next(line for line in lines if line.startswith("| demo"))
    assert "| 0, 1 |" in demo
    assert "holds (+3.1, " in demo
    assert "3 tasks, 2 seeds" in demo
    vision = next(line for line in lines if line.startswith("| vision"))
    assert "holds" not in vision
    assert f"Not finished yet: text, seed 0 (4 of {len(ROWS)} rows)." in lines


def test_what_takes_longer_than_it_may_is_said() -> None:
    row = {"beside": "a forward pass", "seconds": 3.0, "plain seconds": 2.0, "ratio": 1.5}
    speed = {"command": "it", "times": 3, "task": "ape", "backbone": "small", "memory": {"2": 797.7, "6": 808.4}}
    lines = cost({**speed, "rows": {"gram": {**row, "most": 2.0}, "adamerging": {**row, "most": 1.4}}})
    assert "| `evidence gram` | a forward pass | 1.50 | 2 | holds |" in lines
    assert "| `evidence adamerging`, a step | a forward pass | 1.50 | 1.4 | missed |" in lines
    assert any("798 MB with 2 tasks and 808 MB with 6" in line for line in lines)


def test_the_demo_keeps_its_place_and_others_have_their_own() -> None:
    assert Setting().demo and Setting().out == OUT
    other = Setting(suite="vision", seed=2, data=Path("images"), backbone="small")
    assert not other.demo and not Setting(seed=1).demo
    assert other.out.name == "results-vision-2.json"
    words = ["--run", "runs", "--suite", "vision", "--seeds", "2", "--data", "images", "--backbone", "small"]
    assert other.words(Path("runs")) == words
