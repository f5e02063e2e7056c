"""Whether few directions cost accuracy on tasks and seeds that had no part in choosing how few.

    python -m experiments.sketches.confirm --data DATA/text [--run runs/sketches] [--seeds 0,1]

The tolerance of `directions: auto` and `rank: auto` was chosen on the demo's six models. Here six other tasks are learnt as the demo learns its own,
with every seed; each method merges them with all directions and with as many as `auto` keeps, nothing tuned. The lead of `auto` is judged by the
rules of docs/verdicts.md: tasks and seeds are resampled. Models and rows are kept in the run's folder; writes experiments/sketches/confirm.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import thetau
from experiments.common import machine, write_result
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.merging import at_scale
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import registry
from thetau.models import load_encoder, read_weights
from thetau.studies.verdicts import judge
from thetau.tasks import load_task

OUT = Path(__file__).parent / "confirm.json"
BACKBONE = "all-MiniLM-L6-v2"
TASKS = ("ag_news", "cr", "sst2", "subj", "trec", "tweet_emotion")
CONFIG: dict[str, Any] = {"steps": 110, "batch_size": 16, "lr": 5e-5, "max_length": 40}  # the demo's
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # method, its fields with all directions, and with few
    "bilateral": ("bilateral", {"rank": "full"}, {"rank": "auto"}),
    "wudi gradient flow": (
        "wudi",
        {"solver": "gradient_flow", "directions": "full"},
        {"solver": "gradient_flow", "directions": "auto"},
    ),
    "tsv_m": ("tsv_m", {"rank": "full"}, {"rank": "auto"}),
}


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/sketches"))
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1])
    given = parser.parse_args()
    encoder = load_encoder(BACKBONE)
    tasks = [load_task(name, given.data) for name in TASKS]
    evaluator = Evaluator(encoder, tasks, max_length=CONFIG["max_length"], cache=given.run / "cache")
    base, weights = thetau.open(encoder.folder), encoder.weights()
    found: dict[str, Any] = {}
    for seed in given.seeds:
        models = {}
        for task in tasks:
            models[task.name] = given.run / "finetuned" / task.name / str(seed)
            evaluator.load_base()
            made = FinetuneConfig.of({**CONFIG, "seed": seed}, task.name)
            finetune(encoder, task, models[task.name], made, base=BACKBONE, heads=evaluator.heads)
            print(task.name, seed, flush=True)
        own = {name: evaluator.evaluate(read_weights(folder), "test", [name])[name].value for name, folder in models.items()}
        vectors = [(thetau.open(folder) - base).named(name) for name, folder in models.items()]
        rows: dict[str, Any] = {"individual": {name: round(100 * value, 2) for name, value in own.items()}}
        for label, (method, full, auto) in PAIRS.items():
            for kind, fields in (("full", full), ("auto", auto)):
                begun = time.process_time()
                vector = thetau.merge(vectors, registry.build(method, fields), engine=thetau.Engine(workers=1)).state_dict()
                seconds = time.process_time() - begun
                measures = evaluator.evaluate(at_scale(weights, vector, 1.0), "test", origin=f"{label}, {kind}, {seed}")
                rows[f"{label}, {kind}"] = {
                    "seconds": round(seconds, 2),
                    "normalised": {name: round(100 * one.value / own[name], 2) for name, one in measures.items()},
                }
                print(seed, label, kind, rows[f"{label}, {kind}"], flush=True)
        found[str(seed)] = rows
        write_result(OUT, _document(found, {task.name: len(task.split("test")) for task in tasks}))


def _document(found: dict[str, Any], examples: dict[str, int]) -> dict[str, Any]:
    """Everything, with the lead of few directions over all by method."""
    verdicts = {}
    for label in PAIRS:
        leads = {
            name: [
                seed[f"{label}, auto"]["normalised"][name] - seed[f"{label}, full"]["normalised"][name] for seed in found.values()
            ]
            for name in TASKS
        }
        verdicts[label] = str(judge(leads))
    return {
        "command": "python -m experiments.sketches.confirm --data DATA/text",
        "backbone": BACKBONE,
        "settings": CONFIG,
        "test": examples,
        "seeds": found,
        "lead of auto over full, points normalised": verdicts,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
