"""Fisher merging end to end on the demo's models: collect, merge, measure, beside the plain average.

    make demo                              # the fine-tuned models, in runs/demo
    python -m experiments.fisher.run [--run runs/demo] [--examples 256]

Each task's Fisher diagonal is collected on its training split and kept in RUN/fisher; it is merged as it is, and divided by its norm as the authors
do. λ is not tuned: all rows are averages. Writes experiments/fisher/results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import thetau
from thetau.evaluate import Evaluator
from thetau.evidence import FisherConfig, collect_fisher
from thetau.finetune.output import read_record
from thetau.models import load_encoder, read_weights
from thetau.tasks import load_task
from thetau.tasks.suite import load_suite

OUT = Path(__file__).parent / "results.json"


def tuned_models(run: Path, tasks: tuple[str, ...]) -> dict[str, Path]:
    """The newest fine-tuned model of each task, where `thetau suite run` puts it: RUN/finetuned/TASK/SETTINGS."""
    found = {}
    for task in tasks:
        folders = [folder for folder in (run / "finetuned" / task).glob("*") if read_record(folder) is not None]
        if not folders:
            raise SystemExit(f"{run}: has no fine-tuned model of {task}. Make them first: thetau suite run demo --out {run}")
        found[task] = max(folders, key=lambda folder: folder.stat().st_mtime)
    return found


def fisher_file(run: Path, task: str, examples: int) -> Path:
    """Where a task's Fisher diagonal is kept."""
    return run / "fisher" / f"{task}-{examples}.safetensors"


def fisher_files(run: Path, evaluator: Evaluator, models: Mapping[str, Path], examples: int) -> dict[str, dict[str, Any]]:
    """Collect each task's Fisher diagonal on its training split, or take the one that is kept; returns the facts of each."""
    collected: dict[str, dict[str, Any]] = {}
    config = FisherConfig(examples=examples, max_length=load_suite("demo").limits.max_length)
    for name, folder in models.items():
        begun = time.perf_counter()
        made = collect_fisher(
            evaluator.encoder,
            evaluator.tasks[name],
            read_weights(folder),
            fisher_file(run, name, examples),
            config,
            head=evaluator.heads[name],
            origin=str(folder),
        )
        facts = {key: value for key, value in made.to_json().items() if key not in ("path", "zero")}
        collected[name] = facts | {"seconds": round(time.perf_counter() - begun, 1)}
    return collected


def main(run: Path, examples: int) -> dict[str, Any]:
    """All of it; returns what is written."""
    suite = load_suite("demo")
    models = tuned_models(run, suite.tasks)
    tasks = {name: load_task(name) for name in suite.tasks}
    encoder = load_encoder(suite.backbone)
    limits = suite.limits
    evaluator = Evaluator(
        encoder,
        tasks.values(),
        limits={"validation": limits.validation, "test": limits.test},
        max_length=limits.max_length,
        image_size=limits.image_size,
        cache=run / "cache",
    )
    collected = fisher_files(run, evaluator, models, examples)
    files = {name: fisher_file(run, name, examples) for name in models}
    base = thetau.open(encoder.folder)
    vectors = [(thetau.open(folder) - base).named(name) for name, folder in models.items()]
    merges = {
        "average": thetau.merge(vectors, thetau.methods.Average()),
        "fisher, as collected": thetau.merge(vectors, thetau.methods.Fisher(normalise=False), evidence={"fisher": files}),
        "fisher": thetau.merge(vectors, thetau.methods.Fisher(), evidence={"fisher": files}),
    }
    rows: dict[str, Any] = {}
    for name, merged in merges.items():
        begun = time.perf_counter()
        weights = (base + merged).state_dict()
        seconds = round(time.perf_counter() - begun, 2)
        accuracy = evaluator.evaluate(weights, "test", origin=name)
        mean = sum(one.value for one in accuracy.values()) / len(accuracy)
        rows[name] = {
            "average": mean,
            "merge_seconds": seconds,
            "tasks": {task: asdict(one) for task, one in accuracy.items()},
        }
    return {
        "suite": suite.name,
        "backbone": suite.backbone,
        "examples": examples,
        "split": "test",
        "collected": collected,
        "rows": rows,
        "versions": {"thetau": thetau.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--examples", type=int, default=256)
    given = parser.parse_args()
    results = main(given.run, given.examples)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, row in results["rows"].items():
        print(f"{name}: {100 * row['average']:.1f}")
