"""The example reports of the docs: of the demo's run, of a merge of its models, of a bank of them, and of what the doctor says of them. After `make demo`.

The run is the one of the README's table, whose results are kept in experiments/demo (`make readme` puts another one there).

    python -m experiments.reports.run --run runs/demo

Writes docs/examples/*.html. What is made on the way stays in runs/reports; nothing is made twice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from experiments.common import DOCS, EXPERIMENTS
from thetau.cli import main as thetau
from thetau.models import load_encoder
from thetau.studies.suite_results import load_results

EXAMPLES = DOCS / "examples"
DEMO = EXPERIMENTS / "demo" / "results.json"


def call(*words: str) -> None:
    """A command as a user gives it; an error ends this."""
    sys.stdout.write(f"thetau {' '.join(words)}\n")
    try:
        thetau(list(words))
    except SystemExit as end:
        if end.code:
            raise


def main(run: Path, work: Path) -> None:
    """Make what is missing, then the pages."""
    results = load_results(run / "results.json")
    base = str(load_encoder(results.backbone).folder)
    tasks = [task.name for task in results.tasks]
    models = {task: str(next((run / "finetuned" / task).iterdir())) for task in tasks}
    merged, bank = work / "demo-wudi", work / "demo-bank"
    if not merged.exists():
        members = [word for task, path in models.items() for word in ("-m", f"{task}={path}")]
        call("merge", "-b", base, *members, "--method", "wudi", "--set", "solver=closed_form", "-o", str(merged))
    measured = work / "demo-wudi.json"
    if not measured.exists():
        named = [word for task in tasks for word in ("-t", task)]
        call("evaluate", "-m", str(merged), "--base", results.backbone, *named, "--json", str(measured))
    if not bank.exists():
        vectors = [f"{task}={path}" for task, path in models.items()]
        call("basis", "build", *vectors[:-1], "-b", base, "--max-bases", "3", "-o", str(bank))
        call("basis", "insert", str(bank), vectors[-1])
    seen = work / "doctor.json"
    if not seen.exists():
        vectors = [f"{task}={path}" for task, path in models.items()]
        named = [word for task in tasks for word in ("-t", task)]
        call("doctor", base, *vectors, *named, "--max-length", "40", "--json", str(seen))
    EXAMPLES.mkdir(exist_ok=True)
    for name, what in (("suite", DEMO), ("merged", merged), ("bank", bank), ("doctor", seen)):
        call("report", str(what), "-o", str(EXAMPLES / f"{name}.html"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/reports"))
    parser.add_argument("--again", action="store_true", help="make everything anew")
    given = parser.parse_args()
    if given.again:
        shutil.rmtree(given.work, ignore_errors=True)
    main(given.run, given.work)
