"""LoRA vectors on the text suite: why methods of the inputs' side lose there, and which merge of adapters is best.

    python -m experiments.adapters.lora --data FOLDER [--seeds 0,1,2] [--sections rows,why,choice] [--run runs/adapters] [--quick]

`--data` is the folder of the text tasks. Models and caches are kept in the run's folder by content, and rows that the result file has
stay, so that a run that ends early goes on where it was. The fine-tunes are smaller than the text suite's (`SETTINGS`): they are said in
the file.

Two kinds of groups. *Shared*: the adapters of one seed, which began from one A, since PEFT draws A from the seed alone. *Own*: task i's
adapter is that of seed i + n, so that neighbours began from other A's, as adapters of different people do.

`why`: how far the adapters' row spaces (of A) and column spaces (of B) coincide between tasks, what share of measured inputs and output
gradients lies in them, and how near WUDI comes to a mere multiple of the sum. `choice`: candidates on validation data of the first seed.
`rows`: accuracy on test data, λ chosen on validation data of the first seed, and differences with intervals over tasks and groups.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.adapters.candidates import candidates
from experiments.bilateral.run import Entry, Run, packed, say
from experiments.common import EXPERIMENTS, machine, write_result
from thetau import methods
from thetau.adapters import Adapter, clear_merge, merge, open_adapter
from thetau.adapters.spaces import CorePlace, Space
from thetau.adapters.writing import Made
from thetau.evaluate.merging import at_scale
from thetau.models import read_weights
from thetau.tasks.encoding import features
from thetau.tasks.inputs import label_tensor

RESULTS = EXPERIMENTS / "adapters" / "lora.json"
SETTINGS = {"steps": 120, "batch_size": 8, "max_length": 32, "lr": 1e-3}
CHOICE = 80  # examples of validation for the choice of the default
SIZES = {"validation": 60, "test": 150, "oracle_examples": 64}
DEFAULT = "clear"
Vectors = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A row: how one adapter is made of several, and λ's that validation chooses from; none is the method as it is."""

    name: str
    make: Callable[[Sequence[Adapter], Sequence[str]], Made]
    method: str
    scales: tuple[float, ...] = ()


def by(name: str, method: Any, scales: tuple[float, ...] = (), space: Space = "product") -> Merge:
    """A row of a registered method in a space."""

    def make(adapters: Sequence[Adapter], names: Sequence[str]) -> Made:
        return merge(adapters, method, space=space, names=names)

    return Merge(name=name, make=make, method=f"{method!r}, {space}", scales=scales)


def default() -> Merge:
    """What `thetau adapter merge` does where no method is named."""
    return Merge(name=DEFAULT, make=lambda adapters, names: clear_merge(adapters), method="clear_merge()")


def merges() -> list[Merge]:
    """The default, tuned baselines, and what loses. TSV-M is the same in core space as in the products (a test has it)."""
    ties = methods.Ties()
    return [
        default(),
        by("TSV-M, λ tuned", methods.TsvM(), (0.4, 0.6, 0.8, 1.0), "core"),
        by("Core Space (Iso-C), λ tuned", methods.IsoC(), (1.0, 1.6, 2.2, 3.0), "core"),
        by("task arithmetic, λ tuned", methods.TaskArithmetic(scale=1.0), (0.3, 0.45, 0.6, 0.8), "core"),
        by("bilateral", methods.Bilateral()),
        by("WUDI (closed form)", methods.Wudi(solver="closed_form")),
        by("KnOTS (TIES), λ tuned", ties, (0.8, 1.2, 1.6, 2.2), "knots"),
        by("TIES, λ tuned", ties, (0.8, 1.2, 1.6, 2.2)),
    ]


def group(run: Run, start: str, seed: int, seeds: Sequence[int]) -> dict[str, Path]:
    """Adapters that began from one A (`shared`), or from several (`own`)."""
    begun = seeds_of(start, seed, seeds, len(run.names))
    made = {one: run.models("lora", one, run.names) for one in sorted(set(begun))}
    return {name: made[one][name] for name, one in zip(run.names, begun, strict=True)}


def seeds_of(start: str, seed: int, seeds: Sequence[int], count: int) -> list[int]:
    """Each task's seed in a group."""
    at = list(seeds).index(seed)
    return [seed if start == "shared" else seeds[(at + number) % len(seeds)] for number in range(count)]


def vector_of(run: Run, models: Vectors, entry: Merge) -> dict[str, Tensor]:
    """The merged task vector at λ = 1, by the base's names."""
    made = entry.make([open_adapter(path) for path in models.values()], list(models))
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "merged")
        weights = read_weights(Path(folder) / "merged", base=run.encoder.folder)
    return {name: value.float() - run.base[name].float() for name, value in weights.items() if name in run.base}


def measured(run: Run, models: Vectors, entry: Merge, scale: float | None = None) -> dict[str, Any]:
    """A row of the file; `scale` is λ where it was chosen before."""
    begin = time.perf_counter()
    vector = vector_of(run, models, entry)
    seconds = time.perf_counter() - begin
    grid = entry.scales if scale is None else ()
    given = {name: (scale or 1.0) * value for name, value in vector.items()}
    row = run.measured(Entry(name=entry.name, method=entry.method, scales=grid), given, run.names, models, "test", seconds)
    return packed(row, run.individual(models, "test")) | {"method": entry.method, "scale": scale or row.scale}


# Why.


def overlaps(models: Vectors, begun: Sequence[int]) -> dict[str, float]:
    """How far A's rows and B's columns span the same space in two tasks, ‖QᵢᵀQⱼ‖² / r, beside what random spaces give.

    `begun`: each task's seed. Where there are several, pairs of tasks that began alike are left out.
    """
    several = len(set(begun)) > 1
    opened = [open_adapter(path) for path in models.values()]
    found: dict[str, list[float]] = {"rows of A": [], "chance, rows": [], "columns of B": [], "chance, columns": []}
    for path in opened[0].paths:
        factors = [adapter.module(path).factors for adapter in opened]
        bases = [(torch.linalg.qr(one.a[0].T).Q, torch.linalg.qr(one.b[0]).Q) for one in factors]
        for ((a, b), one), ((c, d), other) in combinations(zip(bases, begun, strict=True), 2):
            if several and one == other:
                continue
            found["rows of A"].append(float((a.T @ c).square().sum()) / a.shape[1])
            found["columns of B"].append(float((b.T @ d).square().sum()) / b.shape[1])
            found["chance, rows"].append(a.shape[1] / a.shape[0])
            found["chance, columns"].append(b.shape[1] / b.shape[0])
    return {name: statistics.mean(values) for name, values in found.items()}


def captured(run: Run, models: Vectors) -> dict[str, float]:
    """Which share of measured inputs lies in the span of A's rows, and of output gradients in that of B's columns.

    `own`: a task's moments in its own adapter's space; `other`: in another task's; `best`: in as many leading directions of the moment.
    A method that takes a side for a sample of a task's data needs `own` far above both `other` and `chance`.
    """
    moments = run.moments(models, SIZES["oracle_examples"])
    opened = {name: open_adapter(path) for name, path in models.items()}
    found: dict[str, list[float]] = {}
    for path in next(iter(opened.values())).paths:
        layers = {name: adapter.module(path).factors for name, adapter in opened.items()}
        for side in ("inputs", "gradients"):
            spans = {
                name: torch.linalg.qr(one.a[0].T if side == "inputs" else one.b[0]).Q.float() for name, one in layers.items()
            }
            facts = {name: getattr(moments[name][f"{path}.weight"], side) for name in models}
            for name, moment in facts.items():
                rank, trace = spans[name].shape[1], float(moment.trace())
                best = float(leading(moment.double(), rank))
                found.setdefault(f"{side}, own", []).append(_share(spans[name], moment))
                found.setdefault(f"{side}, best", []).append(best / trace)
                found.setdefault(f"{side}, chance", []).append(rank / len(moment))
            for one, other in permutations(models, 2):
                found.setdefault(f"{side}, other", []).append(_share(spans[other], facts[one]))
    return {name: statistics.mean(values) for name, values in found.items()}


def leading(moment: Tensor, rank: int, rounds: int = 12) -> Tensor:
    """The sum of the largest eigenvalues, by subspace iteration from the leading columns."""
    width = min(len(moment), 2 * rank)
    basis = torch.linalg.qr(moment[:, moment.diagonal().topk(width).indices]).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(moment @ basis).Q
    largest: Tensor = torch.linalg.eigvalsh(basis.T @ moment @ basis)[-rank:].sum()
    return largest


def _share(span: Tensor, moment: Tensor) -> float:
    return float(((moment @ span) * span).sum() / moment.trace())


def against_sum(models: Vectors) -> dict[str, float]:
    """WUDI's minimiser beside the sum of the vectors: the cosine, and the multiple that is nearest; by either side, over all layers."""
    opened = [open_adapter(path) for path in models.values()]
    inner = {name: [0.0, 0.0, 0.0] for name in ("inputs' side", "inputs' side, isotropic", "outputs' side")}
    for path in opened[0].paths:
        parts = [adapter.module(path).factors for adapter in opened]
        place = CorePlace.of(parts)
        cores = [place.project(part)[0] for part in parts]
        total = torch.stack(cores).sum(0)
        made = {
            "inputs' side": minimiser([core.T for core in cores]).T,
            "inputs' side, isotropic": minimiser([core.T for core in cores], power=0.0).T,
            "outputs' side": minimiser(cores),
        }
        for name, merged in made.items():
            for at, value in enumerate((merged * total, merged * merged, total * total)):
                inner[name][at] += float(value.sum())
    told = {}
    for name, (product, own, sums) in inner.items():
        told[f"{name}, cosine"] = product / (own * sums) ** 0.5
        told[f"{name}, multiple"] = product / sums
    return told


def minimiser(cores: Sequence[Tensor], power: float = 1.0) -> Tensor:
    """The M of least norm that minimises Σ ‖(MᵢMᵢᵀ)^(power/2) (M − Mᵢ)‖² / ‖Mᵢ‖^(2·power); at power 0 all seen directions weigh the same."""
    grams = []
    for core in cores:
        u, s, _ = torch.linalg.svd(core)
        seen = int((s > s[0] * 1e-6).sum())
        grams.append((u[:, :seen] * (s[:seen] / s.norm()) ** (2 * power)) @ u[:, :seen].T)
    target = torch.stack([gram @ core for gram, core in zip(grams, cores, strict=True)]).sum(0)
    found: Tensor = torch.linalg.pinv(torch.stack(grams).sum(0), rtol=1e-9, hermitian=True) @ target
    return found


# Choice.


def choose(run: Run, models: Vectors, kept: dict[str, dict[str, Any]], save: Callable[[], None]) -> None:
    """Every candidate that `kept` lacks, on validation data: normalised accuracy and the mean loss, by name and λ."""
    opened = [open_adapter(path) for path in models.values()]
    own = run.individual(models, "validation")
    layers = {}
    for path in opened[0].paths:
        parts = [adapter.module(path).factors for adapter in opened]
        place = CorePlace.of(parts)
        layers[path] = place, [place.project(part)[0] for part in parts]
    for candidate in candidates():
        row = kept.setdefault(", ".join(filter(None, (candidate.name, candidate.length))), {})
        if all(f"{scale:g}" in row for scale in candidate.scales):
            continue
        vector = {
            f"{path}.weight": (place.left[0] @ candidate.solve(cores) @ place.right[0].T).float()
            for path, (place, cores) in layers.items()
        }
        for scale in candidate.scales:
            if f"{scale:g}" in row:
                continue
            run.encoder.load(at_scale(run.base, vector, scale), candidate.name)
            accuracy, loss = [], []
            for name in run.names:
                inputs, head = run.evaluator.inputs(name, "validation"), run.evaluator.heads[name]
                found, labels = features(run.encoder, inputs), label_tensor(inputs.labels)
                accuracy.append(float((head.predict(found) == labels).double().mean()) / max(own[name].value, 1e-9))
                loss.append(float(head.loss(found.float(), labels)))
            row[f"{scale:g}"] = {"normalised": statistics.mean(accuracy), "loss": statistics.mean(loss)}
            say(f"  choice, {candidate.name} {candidate.length}, λ = {scale:g}: {100 * row[f'{scale:g}']['normalised']:.2f}")
            save()


# Intervals.


def difference(
    mine: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, float]], draws: int = 4000
) -> dict[str, Any]:
    """Normalised accuracy, mine − other, in points: the mean over tasks and groups, and an interval of 95 % that draws both anew."""
    names = list(mine[0]["accuracy"])
    pairs = np.array(
        [
            [(x["accuracy"][name] - y["accuracy"][name]) / alone[name] for name in names]
            for x, y, alone in zip(mine, other, own, strict=True)
        ]
    )
    generator = np.random.default_rng(0)
    groups = generator.integers(0, pairs.shape[0], (draws, pairs.shape[0]))
    tasks = generator.integers(0, pairs.shape[1], (draws, pairs.shape[1]))
    drawn = np.array([pairs[np.ix_(one, two)].mean() for one, two in zip(groups, tasks, strict=True)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": 100 * float(pairs.mean()), "low": 100 * float(low), "high": 100 * float(high), "groups": len(mine)}


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune what is missing, measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the text tasks")
    parser.add_argument("--backbone", default="all-MiniLM-L6-v2")
    parser.add_argument("--tasks", default=None, help="by default the eight of the text suite")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--starts", type=lambda text: text.split(","), default=["shared", "own"])
    parser.add_argument("--sections", type=lambda text: text.split(","), default=["why", "rows"])
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=None, help="names of rows, separated by ;")
    parser.add_argument("--run", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    options = argparse.Namespace(
        quick=given.quick, backbone_text=given.backbone, data_text=given.data, tasks_text=given.tasks, run=given.run, **SIZES
    )
    run = Run("text", options, SETTINGS)
    content: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    content |= {
        "command": "make adapters DATA=FOLDER",
        "settings": {**SETTINGS, **SIZES, "tasks": run.names, "backbone": given.backbone},
        "machine": machine(),
        "quick": given.quick,
    }
    groups = content.setdefault("groups", {})
    for start in given.starts:
        for seed in given.seeds:
            models = group(run, start, seed, given.seeds)
            begun = seeds_of(start, seed, given.seeds, len(run.names))
            part = groups.setdefault(f"{start} {seed}", {"start": start, "seed": seed, "rows": {}})
            part["individual"] = {name: one.value for name, one in run.individual(models, "test").items()}
            if "why" in given.sections and "why" not in part and seed == given.seeds[0]:
                part["why"] = {"overlaps": overlaps(models, begun), "sum": against_sum(models)}
                if start == "shared":
                    part["why"]["captured"] = captured(run, models)
                write_result(given.out, content)
            if "choice" in given.sections and start == "shared" and seed == given.seeds[0]:
                chosen = content.setdefault("choice", {"group": f"{start} {seed}", "validation": CHOICE, "rows": {}})
                wider = Run("text", argparse.Namespace(**{**vars(options), "validation": CHOICE}), SETTINGS)
                choose(wider, models, chosen["rows"], lambda: write_result(given.out, content))
            for entry in merges() if "rows" in given.sections else ():
                if entry.name in part["rows"] or (given.rows is not None and entry.name not in given.rows):
                    continue
                first = groups[f"{start} {given.seeds[0]}"]["rows"].get(entry.name, {})
                scale = first.get("scale") if entry.scales else None
                part["rows"][entry.name] = row = measured(run, models, entry, scale)
                say(f"  {start} {seed}, {entry.name}: {100 * row['normalised']:.1f} at λ = {row['scale']:g}")
                write_result(given.out, content)
    write_result(given.out, content)


if __name__ == "__main__":
    main()
