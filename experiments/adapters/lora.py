"""LoRA vectors on the text suite: why methods of the inputs' side lose there, and which merge of adapters is best.

    python -m experiments.adapters.lora --data FOLDER [--seeds 0,1,2] [--run runs/bilateral] [--quick]

Models and caches are kept in the run's folder by content (those of `experiments.bilateral.run` are found there), and rows that the result
file has stay, so that a run that ends early goes on where it was.

`why`: how far the adapters' row spaces (of A) and column spaces (of B) coincide between tasks, as ‖Q_iᵀQ_j‖²/r, beside r/d, what random
spaces give. A method that takes the rows of τ for a sample of a task's inputs (WUDI, the right side of `bilateral`) needs them to differ
by task: rows of A are those of a random start, the same for all adapters of one seed. `rows`: accuracy of merges, λ on validation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bilateral.run import Entry, Run, packed, say
from experiments.common import EXPERIMENTS, machine, write_result
from thetau import methods
from thetau.adapters import merge, open_adapter
from thetau.adapters.spaces import Space
from thetau.models import read_weights

RESULTS = EXPERIMENTS / "adapters" / "lora.json"
WIDE = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A row: a method, where it acts, and λ's that validation chooses from."""

    name: str
    method: Any
    space: Space = "product"
    scales: tuple[float, ...] = WIDE


def merges() -> list[Merge]:
    """What is compared: the defaults at λ = 1 that lose, the tuned baselines, and the same in the spaces of the adapters."""
    bilateral, ties = methods.Bilateral(), methods.Ties()
    found = [
        Merge(name="bilateral", method=bilateral, scales=()),
        Merge(name="WUDI (closed form)", method=methods.Wudi(solver="closed_form"), scales=()),
        Merge(name="TSV-M", method=methods.TsvM(), scales=()),
        Merge(name="bilateral, λ tuned", method=bilateral),
        Merge(name="bilateral, outputs' side everywhere", method=replace(bilateral, sides="both", p=1.0, q=0.0)),
        Merge(name="bilateral, inputs' side everywhere", method=replace(bilateral, sides="both", p=0.0, q=1.0)),
        Merge(name="WUDI (closed form), λ tuned", method=methods.Wudi(solver="closed_form")),
        Merge(name="TSV-M, λ tuned", method=methods.TsvM()),
        Merge(name="TIES, λ tuned", method=ties),
        Merge(name="task arithmetic, λ tuned", method=methods.TaskArithmetic(scale=1.0)),
    ]
    found += [
        Merge(name=f"KnOTS, {name}", method=method, space="knots") for name, method in (("TIES", ties), ("TSV-M", methods.TsvM()))
    ]
    spaced = (("TSV-M", methods.TsvM()), ("Iso-C", methods.IsoC()), ("TIES", ties), ("WUDI", methods.Wudi(solver="closed_form")))
    return found + [Merge(name=f"Core Space, {name}", method=method, space="core") for name, method in spaced]


def overlaps(models: Mapping[str, Path]) -> dict[str, float]:
    """How far A's rows and B's columns span the same space in two tasks, as a mean over layers and pairs, beside chance."""
    opened = [open_adapter(path) for path in models.values()]
    rows: list[float] = []
    columns: list[float] = []
    chance: list[float] = []
    for path in opened[0].paths:
        factors = [adapter.module(path).factors for adapter in opened]
        bases = [(torch.linalg.qr(one.a[0].T).Q, torch.linalg.qr(one.b[0]).Q) for one in factors]
        for (a, b), (c, d) in combinations(bases, 2):
            rows.append(float((a.T @ c).square().sum()) / a.shape[1])
            columns.append(float((b.T @ d).square().sum()) / b.shape[1])
            chance.append(a.shape[1] / a.shape[0])
    return {"rows of A": statistics.mean(rows), "columns of B": statistics.mean(columns), "chance": statistics.mean(chance)}


def vector_of(run: Run, models: Mapping[str, Path], entry: Merge) -> dict[str, Tensor]:
    """The merged task vector at λ = 1, by the base's names."""
    made = merge([open_adapter(path) for path in models.values()], entry.method, space=entry.space, names=list(models))
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "merged")
        weights = read_weights(Path(folder) / "merged", base=run.encoder.folder)
    return {name: value.float() - run.base[name].float() for name, value in weights.items() if name in run.base}


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune what is missing, measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the text tasks")
    parser.add_argument("--backbone", default="all-MiniLM-L6-v2")
    parser.add_argument("--tasks", default=None, help="by default the eight of the text suite")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    parser.add_argument("--run", type=Path, default=Path("runs/bilateral"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    options = argparse.Namespace(
        quick=given.quick, backbone_text=given.backbone, data_text=given.data, tasks_text=given.tasks, run=given.run,
        oracle_examples=256, validation=100, test=300,
    )  # fmt: skip
    run = Run("text", options)
    content: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"seeds": {}}
    for seed in given.seeds:
        part = content["seeds"].setdefault(str(seed), {"rows": {}})
        models = run.models("lora", seed, run.names)
        own = run.individual(models, "test")
        part["why"] = overlaps(models)
        for entry in merges():
            if entry.name in part["rows"]:
                continue
            begin = time.perf_counter()
            vector = vector_of(run, models, entry)
            measured = Entry(name=entry.name, method=entry.method, scales=entry.scales)
            row = run.measured(measured, vector, run.names, models, "test", time.perf_counter() - begin)
            part["rows"][entry.name] = packed(row, own, space=entry.space)
            say(f"  seed {seed}, {entry.name}: {100 * part['rows'][entry.name]['normalised']:.1f} at λ = {row.scale:g}")
            write_result(given.out, content | {"machine": machine(), "quick": given.quick})
    write_result(given.out, content | {"machine": machine(), "quick": given.quick})


if __name__ == "__main__":
    main()
