"""How well the doctor's advice predicts: pairs and subsets of fine-tuned models, merged and evaluated.

    make demo                                                   # the first set's models, in runs/demo
    python -m experiments.doctor.study --data DATA/text [--run runs/doctor] [--demo runs/demo]

Two sets of six models. The rules and thresholds were chosen while looking at the first one (the demo's tasks); nothing was chosen on the
second, whose models are fine-tuned here, as the demo's are. Of each set:

- **conflict**: every ordered pair (i, j): accuracy and loss of task i on its test examples with θ₀ + τ_i + τ_j, beside those of τ_i alone. The
  doctor says what τ_j does to the inputs of i (`a_on_b`); so do cosine, sign conflict and shared directions, in their own way, and with
  `--task` the root of τJp on validation examples over that of τ_i itself. A *hit*: of two others, the one that is told to do more to i costs it
  more loss.
- **scale**: subsets of 3 to 6 models: λ of task arithmetic by Eq. 21 beside the λ of a grid that validation prefers. A hit: its normalised
  test accuracy is no more than one point below.
- **method**: the same subsets by bilateral merging and WUDI. A hit: bilateral, which is advised, is above task arithmetic at the λ that
  validation prefers.

What is measured is kept in RUN and not measured again. Writes experiments/doctor/study.json and src/thetau/diagnostics/predictions.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thetau
from experiments.common import EXPERIMENTS, ROOT, machine, write_result
from experiments.fisher.run import tuned_models
from thetau.diagnostics.doctor import Doctor
from thetau.diagnostics.examine import TRIED, examine
from thetau.diagnostics.results import correlate
from thetau.evaluate import Evaluator
from thetau.evaluate.means import normalised
from thetau.evaluate.spaces import TangentSpace
from thetau.evaluate.tuned import make_space
from thetau.facade import as_vector
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import build
from thetau.models import Encoder, load_encoder, read_weights
from thetau.tasks import load_task
from thetau.tasks.suite import load_suite

OUT = EXPERIMENTS / "doctor" / "study.json"
SHIPPED = ROOT / "src" / "thetau" / "diagnostics" / "predictions.json"
HELD_OUT = ("ag_news", "subj", "trec", "tweet_emotion", "mr", "cr")
GRID = (0.3, 0.45, 0.6, 0.8, 1.0)
SIZES = {"held-out": (3, 3, 3, 4, 6), "demo": (3, 4)}
LIMITS = {"validation": 60, "test": 150}
POINT = 0.01
SIGNS = {
    "danger": 1,
    "cosine": -1,
    "sign conflict": 1,
    "inputs shared": 1,
    "outputs shared": 1,
    "overlap": 1,
    "examples": 1,
}  # more means more harm


class Bench:
    """One set: its models, an evaluator, and vectors in memory."""

    def __init__(self, name: str, models: Mapping[str, Path], encoder: Encoder, data: Path | None, run: Path) -> None:
        self.name, self.models = name, dict(models)
        self.evaluator = Evaluator(
            encoder, [load_task(task, data) for task in models], limits=LIMITS, max_length=40, cache=run / "cache"
        )
        self.base: dict[str, Tensor] = encoder.weights()
        self.root = thetau.open("all-MiniLM-L6-v2")
        self.opened = {task: thetau.open(path, name=task) for task, path in models.items()}
        self.vectors: dict[str, dict[str, Tensor]] = {}
        for task, path in models.items():
            weights = read_weights(path)
            self.vectors[task] = {
                key: weights[key].float() - value.float() for key, value in self.base.items() if value.is_floating_point()
            }

    def sum(self, scales: Mapping[str, float]) -> dict[str, Tensor]:
        """θ₀ + Σ λ_i τ_i."""
        found = {}
        for key, value in self.base.items():
            moved = [scale * self.vectors[task][key] for task, scale in scales.items() if key in self.vectors[task]]
            found[key] = value + torch.stack(moved).sum(0) if moved else value
        return found

    def merged(self, tasks: Sequence[str], method: str) -> dict[str, Tensor]:
        """What one of the doctor's methods makes of some."""
        name, fields = TRIED[method]
        vectors = [as_vector(self.opened[task], self.root) for task in tasks]
        vector = thetau.merge(vectors, build(name, dict(fields)), engine=thetau.Engine(workers=1)).state_dict()
        return {key: value + vector[key] if key in vector else value for key, value in self.base.items()}

    def examine(self, tasks: Sequence[str]) -> Doctor:
        """The doctor on some of them."""
        return examine(self.root, [self.opened[task] for task in tasks], engine=thetau.Engine(workers=1))

    def on_examples(self) -> dict[tuple[str, str], float]:
        """(j, i) → √ of τJp of τ_j on the validation examples of i, over that of τ_i: what `thetau doctor --task` tells."""
        linear = make_space(self.evaluator, self.base, self.vectors, tangent=True)
        assert isinstance(linear, TangentSpace)
        jp = {
            (j, i): float(linear.terms(j, i, "validation")[1].double().square().sum(-1).mean())
            for i in self.models
            for j in self.models
        }
        return {(j, i): (value / jp[i, i]) ** 0.5 for (j, i), value in jp.items()}

    def accuracy(self, weights: Mapping[str, Tensor], tasks: Sequence[str], split: str = "test") -> dict[str, Any]:
        """By task."""
        return dict(self.evaluator.evaluate(weights, split, tasks))


def held_out(encoder: Encoder, data: Path, run: Path) -> dict[str, Path]:
    """The second set's models, made where they are not there yet, as the demo makes its own."""
    settings = dict(load_suite("demo").finetune)
    found = {}
    for task in HELD_OUT:
        out = run / "finetuned" / task
        if not (out / "model.safetensors").exists():
            loaded = load_task(task, data)
            evaluator = Evaluator(encoder, [loaded], limits=LIMITS, max_length=40, cache=run / "cache")
            evaluator.load_base()
            finetune(encoder, loaded, out, FinetuneConfig.of(settings, task), base="all-MiniLM-L6-v2", heads=evaluator.heads)
            evaluator.load_base()
        found[task] = out
    return found


def conflicts(bench: Bench) -> dict[str, Any]:
    """Every ordered pair, the correlations of each predictor, and the hits."""
    tasks = list(bench.models)
    found = bench.examine(tasks)
    alone, rows = {}, []
    for task in tasks:
        weights = bench.sum({task: 1.0})
        alone[task] = (bench.accuracy(weights, [task])[task], bench.evaluator.losses(weights, "test", [task])[task].value)
    told = {frozenset((pair.a, pair.b)): pair for pair in found.pairs}
    on_examples = bench.on_examples()
    for i, j in permutations(tasks, 2):
        weights = bench.sum({i: 1.0, j: 1.0})
        accuracy = bench.accuracy(weights, [i])[i].value
        loss = bench.evaluator.losses(weights, "test", [i])[i].value
        pair = told[frozenset((i, j))]
        rows.append(
            {
                "task": i,
                "other": j,
                "danger": pair.b_on_a if pair.a == i else pair.a_on_b,
                "cosine": pair.cosine,
                "sign conflict": pair.conflict,
                "inputs shared": pair.inputs,
                "outputs shared": pair.outputs,
                "overlap": pair.overlap,
                "examples": on_examples[j, i],
                "accuracy": accuracy,
                "lost": alone[i][0].value - accuracy,
                "loss": loss,
                "rise": loss - alone[i][1],
            }
        )
        print(bench.name, i, j, round(rows[-1]["danger"], 3), round(rows[-1]["lost"], 3), round(rows[-1]["rise"], 4), flush=True)
    predictors = {}
    for word, sign in SIGNS.items():
        hits = n = 0
        for task in tasks:
            for one, other in combinations([row for row in rows if row["task"] == task], 2):
                told_more, costs_more = sign * (one[word] - other[word]), one["rise"] - other["rise"]
                if told_more and costs_more:
                    n += 1
                    hits += (told_more > 0) == (costs_more > 0)
        values = [sign * row[word] for row in rows]
        predictors[word] = {
            "hits": hits,
            "n": n,
            "spearman_loss": correlate(values, [row["rise"] for row in rows], (word, "rise")).spearman,
            "spearman_accuracy": correlate(values, [row["lost"] for row in rows], (word, "lost")).spearman,
        }
    return {
        "alone": {task: {"accuracy": one.value, "loss": loss} for task, (one, loss) in alone.items()},
        "pairs": rows,
        "predictors": predictors,
    }


def subsets(bench: Bench) -> list[dict[str, Any]]:
    """λ and methods on a few subsets."""
    tasks = sorted(bench.models)
    drawn = random.Random(f"doctor/{bench.name}")
    rows, seen = [], set()
    for size in SIZES[bench.name]:
        while (chosen := tuple(sorted(drawn.sample(tasks, size)))) in seen:
            pass
        seen.add(chosen)
        scale = bench.examine(chosen).best_scale
        assert scale is not None
        own = {split: {task: bench.accuracy(bench.sum({task: 1.0}), [task], split)[task] for task in chosen} for split in LIMITS}

        def value(weights: Mapping[str, Tensor], split: str, chosen: tuple[str, ...] = chosen, own: Any = own) -> float:
            return normalised(bench.accuracy(weights, chosen, split), own[split])

        grid = {number: value(bench.sum(dict.fromkeys(chosen, number)), "validation") for number in GRID}
        best = max(grid, key=lambda number: grid[number])
        rows.append(
            {
                "tasks": list(chosen),
                "scale": scale,
                "validated": best,
                "grid": {f"{number:g}": one for number, one in grid.items()},
                "at_scale": value(bench.sum(dict.fromkeys(chosen, scale)), "test"),
                "at_validated": value(bench.sum(dict.fromkeys(chosen, best)), "test"),
                "at_one": value(bench.sum(dict.fromkeys(chosen, 1.0)), "test"),
                **{method: value(bench.merged(chosen, method), "test") for method in TRIED},
            }
        )
        print(bench.name, json.dumps(rows[-1]), flush=True)
    return rows


def hits_of(sets: Mapping[str, Any]) -> dict[str, Any]:
    """What ships: hits on the held-out set alone, where anything was chosen on the first; both sets are on the page."""
    held = sets["held-out"]
    danger, rows = held["conflict"]["predictors"]["danger"], held["subsets"]
    examples = held["conflict"]["predictors"]["examples"]
    return {
        "conflict": {
            "hits": danger["hits"],
            "n": danger["n"],
            "what": "of two other models, the one named as the greater danger raised a task's loss more (6 text tasks, one encoder of 22 million weights)",
        },
        "examples": {
            "hits": examples["hits"],
            "n": examples["n"],
            "what": "of two other models, the one with more τJp on a task's examples raised its loss more (6 text tasks, one encoder of 22 million weights)",
        },
        "scale": {
            "hits": sum(row["at_scale"] >= row["at_validated"] - POINT for row in rows),
            "n": len(rows),
            "what": "within one point of the λ that validation prefers, or better (subsets of 6 text tasks, the same encoder)",
        },
        "method": {
            "hits": sum(row["bilateral"] > row["at_validated"] for row in rows),
            "n": len(rows),
            "what": "bilateral above task arithmetic at the λ that validation prefers (subsets of 6 text tasks, the same encoder)",
        },
    }


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "doctor")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder = load_encoder("all-MiniLM-L6-v2")
    models = {
        "held-out": held_out(encoder, arguments.data, arguments.run),
        "demo": tuned_models(arguments.demo, load_suite("demo").tasks),
    }
    sets: dict[str, Any] = {}
    for name, given in models.items():
        kept = arguments.run / f"{name}.json"
        sets[name] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"tasks": list(given)}
        bench: Bench | None = None
        for part, measure in (("conflict", conflicts), ("subsets", subsets)):
            if part not in sets[name]:
                bench = bench or Bench(name, given, encoder, arguments.data if name == "held-out" else None, arguments.run)
                sets[name][part] = measure(bench)
                kept.write_text(json.dumps(sets[name]), encoding="utf-8")
        if bench is not None:
            bench.evaluator.load_base()
    command = "python -m experiments.doctor.study --data DATA/text"
    write_result(OUT, {"command": command, "machine": machine(), "limits": LIMITS, "sets": sets, "hits": hits_of(sets)})
    write_result(SHIPPED, {"command": command, "hits": hits_of(sets)})


if __name__ == "__main__":
    main()
