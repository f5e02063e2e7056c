"""Bilateral merging against other data-free merges on two suites: accuracy, ablations, an oracle, and cost.

    python -m experiments.bilateral.run --data-text FOLDER --data-image FOLDER --backbone-vision MODEL [--quick]

Sections: `choice` (settings on the text suite's validation data, dated before anything is measured), `main`, `ablations`, `oracle`, `cost`.
Everything is kept in the run's folder by content, and what the result file has from earlier calls stays, so that sections, suites and seeds
can be run one after the other. Correctness of every test example is in the file: differences are paired over examples.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common import EXPERIMENTS
from thetau import methods
from thetau._version import __version__
from thetau.checkpoint import Kind, weighed_left
from thetau.checkpoint.disk import write_bytes
from thetau.evaluate.cache import Cache
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.merging import at_scale, merged_vector
from thetau.evidence.kronecker import Moments, collect_moments, load_moments, save_moments
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import Bilateral, Wudi
from thetau.methods.bilateral_solvers import with_factors
from thetau.methods.wudi_solvers import Interference
from thetau.models import load_encoder, read_weights, weights_hash
from thetau.parts import Site
from thetau.tasks import load_task

RESULTS = EXPERIMENTS / "bilateral" / "results.json"
SECTIONS = ("choice", "main", "ablations", "oracle", "cost")
SNAPSHOTS = (1, 2, 20, 60)  # part of the key of the first seed's models, which other experiments share and read
TASKS = {
    "text": ("clinc_domain", "sms_spam", "ag_news", "trec", "subj", "tweet_emotion", "sst2", "cr"),
    "vision": ("mnist", "rsscn7", "gtsrb", "cifar10", "fashion_mnist", "scene15", "dtd10", "usps"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {"steps": 200, "batch_size": 16, "max_length": 48},
    "vision": {"steps": 200, "batch_size": 32, "image_size": 56},
}
VECTORS: dict[str, dict[str, dict[str, Any]]] = {
    "text": {
        "standard": {"paradigm": "standard", "lr": 1e-4},
        "attention": {"paradigm": "attention", "lr": 2e-4},
        "lora": {"paradigm": "lora", "lr": 5e-4},
    },
    "vision": {
        "standard": {"paradigm": "standard", "lr": 5e-5},
        "attention": {"paradigm": "attention", "lr": 1e-4},
        "lora": {"paradigm": "lora", "lr": 5e-4},
    },
}


@dataclass(frozen=True, kw_only=True)
class Correct:
    """Whether each example of a split was told right, `1` or `0` each."""

    bits: str

    @property
    def value(self) -> float:
        return self.bits.count("1") / len(self.bits)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One merge: right or wrong on every test example, by task, and the scale that validation chose where there was a grid."""

    name: str
    method: str
    correct: dict[str, Correct]
    scale: float = 1.0
    trials: dict[str, float] | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table: a method, and λ's that validation chooses from (none: 1)."""

    name: str
    method: Any
    scales: tuple[float, ...] = ()


def entries() -> list[Entry]:
    """The methods that are compared."""
    lambdas = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3)
    flat = (0.09, 0.13, 0.18, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0, 1.3, 1.6, 2.0, 2.6, 3.3, 4.2)
    return [
        Entry(name="bilateral", method=Bilateral(rank=None)),
        Entry(name="bilateral, both sides at once", method=two_sided()),
        Entry(name="WUDI (adam)", method=Wudi()),
        Entry(name="WUDI (closed form)", method=Wudi(solver="closed_form")),
        Entry(name="WUDI (gradient flow)", method=Wudi(solver="gradient_flow")),
        Entry(name="TSV-M", method=methods.TsvM()),
        Entry(name="TSV-M, λ tuned", method=methods.TsvM(), scales=(0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)),
        Entry(name="Iso-C, λ tuned", method=methods.IsoC(), scales=flat),
        Entry(name="Iso-CTS, λ tuned", method=methods.IsoCts(), scales=flat),
        Entry(name="TIES, λ tuned", method=methods.Ties(), scales=(0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5)),
        Entry(name="AWD-TA, λ tuned", method=methods.Awd(then=methods.TaskArithmetic(scale=1.0)), scales=lambdas),
        Entry(name="task arithmetic, λ tuned", method=methods.TaskArithmetic(scale=1.0), scales=lambdas),
        Entry(name="averaging", method=methods.Average()),
    ]


def two_sided(**changed: Any) -> Bilateral:
    """The product of both sides, by conjugate gradients, as the idea was first put."""
    return replace(Bilateral(rank=None), **{"sides": "both", "solver": "cg", "p": 0.5, "q": 1.0, "rank": 0.25, **changed})


def choices() -> list[Entry]:
    """The settings among which the default is chosen."""
    base = Bilateral(rank=None)
    grid = [base]
    grid += [replace(base, time=t) for t in (0.3, 3.0, 10.0)]
    grid += [replace(base, p=power, q=power, time=t) for power, t in ((0.5, 1.0), (2.0, 1.0), (2.0, 10.0))]
    grid += [replace(base, solver="cg", tolerance=t) for t in (0.03, 0.01)]
    grid += [replace(base, balance=b) for b in ("loss", "trace", "none")]
    grid += [replace(base, start="mean"), replace(base, scale=0.9), replace(base, scale=1.1)]
    grid += [replace(base, elsewhere=e) for e in ("mean", "sum")]
    grid += [replace(base, sides="both", p=p, q=q) for p, q in ((1.0, 0.0), (0.0, 1.0))]
    grid += [two_sided(p=p, q=q) for p, q in ((0.25, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0))]
    grid += [two_sided(p=1.0, tolerance=0.003), two_sided(p=1.0, rank=None)]
    return [Entry(name=_changes(one) or "the default", method=one) for one in dict.fromkeys(grid)]


def ablations() -> list[Entry]:
    """One field changed at a time."""
    base = Bilateral(rank=None)
    grid: list[Bilateral] = [base]
    grid += [replace(base, p=p, q=q) for p, q in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0))]
    grid += [replace(base, sides="both", p=p, q=q) for p, q in ((0.0, 1.0), (1.0, 0.0))]
    grid += [two_sided(p=p, q=q) for p, q in ((0.25, 0.75), (0.25, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0))]
    grid += [two_sided(p=1.0, rank=rank) for rank in (0.125, 0.0625)] + [two_sided(p=1.0, tail="drop")]
    grid += [two_sided(p=1.0, tolerance=0.0, iterations=n) for n in (3, 10, 30, 60)]
    grid += [replace(base, rank=rank) for rank in (0.5, 0.25, 0.125, 0.0625, 0.03125)]
    grid += [replace(base, rank=rank, tail="drop") for rank in (0.25, 0.0625)]
    grid += [replace(base, time=t) for t in (0.1, 0.3, 3.0, 10.0, 100.0)]
    grid += [replace(base, solver="cg", tolerance=t) for t in (0.1, 0.03, 0.01, 0.003)]
    grid += [replace(base, balance=b) for b in ("loss", "trace", "none")]
    grid += [replace(base, start="mean"), replace(base, reference="random")]
    grid += [replace(base, elsewhere=e) for e in ("mean", "sum")]
    grid += [replace(base, scale=s) for s in (0.9, 1.1, 1.2)]
    return [Entry(name=_changes(one) or "the default", method=one) for one in dict.fromkeys(grid)]


def _changes(method: Bilateral) -> str:
    """In what a setting differs from the one that was measured as the default, which has all directions."""
    default = Bilateral(rank=None)
    names = [field.name for field in fields(method) if getattr(method, field.name) != getattr(default, field.name)]
    return ", ".join(f"{name} = {getattr(method, name)}" for name in names)


class Run:
    """One suite: its encoder, tasks and caches; `changed` are settings of fine-tuning that are not the suite's."""

    def __init__(self, name: str, options: argparse.Namespace, changed: Mapping[str, Any] | None = None) -> None:
        self.name, self.quick = name, options.quick
        self.backbone = options.backbone_text if name == "text" else options.backbone_vision
        data = options.data_text if name == "text" else options.data_image
        listed = options.tasks_text if name == "text" else options.tasks_vision
        self.names: list[str] = listed.split(",") if listed else list(TASKS[name])
        self.out: Path = options.run / name
        self.encoder = load_encoder(self.backbone)
        self.tasks = {one: load_task(one, data) for one in self.names}
        settings = {**SETTINGS[name], **(changed or {})}
        self.settings = {**settings, **({"steps": 6, "batch_size": 8} if self.quick else {})}
        sizes = {key: value for key, value in settings.items() if key in ("max_length", "image_size")}
        limits = {"train": options.oracle_examples, "validation": options.validation, "test": options.test}
        self.evaluator = Evaluator(self.encoder, self.tasks.values(), limits=limits, cache=self.out / "cache", **sizes)
        self.base = self.encoder.weights()
        self.cache = Cache(folder=self.out / "cache")
        self.last: tuple[list[Any], Mapping[str, Tensor]] | None = None

    def models(self, vectors: str, seed: int, names: Sequence[str]) -> dict[str, Path]:
        """Fine-tune, or find what was fine-tuned before."""
        found = {}
        for name in names:
            config = FinetuneConfig.of({**VECTORS[self.name][vectors], **self.settings, "seed": seed}, f"{self.name}, {vectors}")
            snapshots = SNAPSHOTS if vectors == "standard" and seed == 0 and not self.quick else ()
            key = Cache.key([config.content(), snapshots])[:8]
            out = self.out / "finetuned" / name / f"{config.paradigm}-{key}"
            self.evaluator.load_base()
            made = finetune(
                self.encoder,
                self.tasks[name],
                out,
                config,
                base=self.backbone,
                snapshots=snapshots,
                heads=self.evaluator.heads,
            )
            if not made.cached:
                say(f"  {self.name}, {vectors}, {name}, seed {seed}: loss {made.first_loss:.2f} → {made.last_loss:.2f}")
            found[name] = out
        return found

    def correct(self, weights: Mapping[str, Tensor], split: str, names: Sequence[str]) -> dict[str, Correct]:
        """By content, as the evaluator does it."""
        key = weights_hash(weights)
        result = {}
        for name in names:
            inputs, head = self.evaluator.inputs(name, split), self.evaluator.heads[name]
            parts = [key, self.encoder.form, inputs.hash, head.hash()]
            found = self.cache.get(Correct, parts)
            if found is None:
                told = head.predict(self.evaluator.features(weights, name, split))
                bits = "".join(str(int(a == b)) for a, b in zip(told.tolist(), inputs.labels, strict=True))
                found = Correct(bits=bits)
                self.cache.put(found, parts)
            result[name] = found
        return result

    def individual(self, models: Mapping[str, Path], split: str) -> dict[str, Correct]:
        """Each task's own model on its task."""
        found = {}
        for name, path in models.items():
            found |= self.correct(read_weights(path, base=self.encoder.folder), split, [name])
        return found

    def row(self, entry: Entry, models: Mapping[str, Path], split: str = "test") -> Row:
        """Merge once at λ = 1, choose λ on validation where there is a grid, evaluate."""
        names = list(models)
        parts = [__version__, entry.name, repr(entry.method), entry.scales, split, self.facts(models)]
        row = self.cache.get(Row, parts)
        if row is None:
            begin = time.perf_counter()
            key = [repr(entry.method), self.facts(models)]
            if self.last is None or self.last[0] != key:  # the same merge with and without a grid of λ is made once
                self.last = key, merged_vector(self.encoder.folder, list(models.values()), names, entry.method)
            row = self.measured(entry, self.last[1], names, models, split, time.perf_counter() - begin)
            self.cache.put(row, parts)
        return row

    def measured(
        self,
        entry: Entry,
        vector: Mapping[str, Tensor],
        names: Sequence[str],
        models: Mapping[str, Path],
        split: str,
        seconds: float,
    ) -> Row:
        trials, scale = None, 1.0
        if entry.scales:
            own = self.individual(models, "validation")
            trials = {}
            for value in entry.scales:
                found = self.correct(at_scale(self.base, vector, value), "validation", names)
                trials[f"{value:g}"] = statistics.mean(found[name].value / max(own[name].value, 1e-9) for name in names)
            scale = max(entry.scales, key=lambda value: (trials[f"{value:g}"], -value))
        correct = self.correct(at_scale(self.base, vector, scale), split, names)
        return Row(
            name=entry.name, method=repr(entry.method), correct=correct, scale=scale, trials=trials, seconds=round(seconds, 2)
        )

    def facts(self, models: Mapping[str, Path]) -> list[Any]:
        """All that a row depends on besides its method."""
        hashes = {name: json.loads((path / "thetau_finetune.json").read_text())["weights_hash"] for name, path in models.items()}
        splits = [self.evaluator.inputs(name, split).hash for name in models for split in ("validation", "test")]
        return [self.encoder.base_hash, hashes, splits, [self.evaluator.heads[name].hash() for name in models]]

    def moments(self, models: Mapping[str, Path], limit: int) -> dict[str, dict[str, Moments]]:
        """Of each task's own model on its training data."""
        found = {}
        for name, path in models.items():
            file = self.out / "moments" / name / f"{path.name}-{limit}.safetensors"
            if not file.is_file():
                self.encoder.load(read_weights(path, base=self.encoder.folder), str(path))
                inputs = self.evaluator.inputs(name, "train")
                save_moments(collect_moments(self.encoder, inputs, self.evaluator.heads[name], limit=limit), file)
                self.evaluator.load_base()
            found[name] = load_moments(file)
        return found


def say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


# What goes into the file.


def packed(row: Row, own: Mapping[str, Correct], **facts: Any) -> dict[str, Any]:
    """A row as the file has it; correctness as hexadecimal digits, most significant first, padded with zeros on the left."""
    values = {name: one.value for name, one in row.correct.items()}
    return {
        **facts,
        "name": row.name,
        "method": row.method,
        "scale": row.scale,
        "seconds": row.seconds,
        "trials": row.trials,
        "accuracy": values,
        "absolute": statistics.mean(values.values()),
        "normalised": statistics.mean(values[name] / max(own[name].value, 1e-9) for name in values),
        "n": {name: len(one.bits) for name, one in row.correct.items()},
        "correct": {name: f"{int(one.bits, 2):x}" for name, one in row.correct.items()},
    }


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, float]], draws: int = 2000
) -> dict[str, Any]:
    """a − b in points, absolute and normalised, means over tasks and runs (seeds), with bootstrap intervals of 95 %.

    Test examples are drawn with replacement within each task, the same for a and b and for every run; what training and the choice of
    tasks add is not in the interval. `own` are the individuals' accuracies, taken as they are.
    """
    generator = np.random.default_rng(0)
    parts: dict[str, list[tuple[np.ndarray, float]]] = {}
    for x, y, alone in zip(a, b, own, strict=True):
        for name, n in x["n"].items():
            parts.setdefault(name, []).append((unpacked(x["correct"][name], n) - unpacked(y["correct"][name], n), alone[name]))
    absolute, relative, drawn = [], [], np.zeros((2, draws))
    for pairs in parts.values():
        n = len(pairs[0][0])
        counts = generator.multinomial(n, np.full(n, 1 / n), size=draws) / n
        for which, (target, weights) in enumerate(
            ((absolute, [1.0] * len(pairs)), (relative, [1 / max(own, 1e-9) for _, own in pairs]))
        ):
            mean = sum(w * d for w, (d, _) in zip(weights, pairs, strict=True)) / len(pairs)
            target.append(mean.mean())
            drawn[which] += counts @ mean / len(parts)
    told = {}
    for which, (kind, values) in enumerate((("absolute", absolute), ("normalised", relative))):
        low, high = np.percentile(drawn[which], [2.5, 97.5])
        told[kind] = {"mean": 100 * float(np.mean(values)), "low": 100 * float(low), "high": 100 * float(high)}
    return {**told, "runs": len(a), "tasks": len(parts)}


def unpacked(digits: str, n: int) -> np.ndarray:
    """0 or 1 an example."""
    return np.frombuffer(f"{int(digits, 16):0{n}b}".encode(), dtype=np.uint8).astype(np.float64) - ord("0")


class File:
    """The result file; rows of the same facts replace earlier ones."""

    def __init__(self, path: Path, *, fresh: bool, quick: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        if path.is_file() and not fresh:
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if bool(self.content.get("quick")) != quick:
                raise SystemExit(f"{path}: holds a run {'without' if quick else 'with'} --quick. Give --fresh, or another --out.")
        machine = {"threads": torch.get_num_threads(), "processor": platform.machine(), "torch": torch.__version__}
        self.content |= {
            "command": "python -m experiments.bilateral.run",
            "thetau": __version__,
            "quick": quick,
            "machine": machine,
        }

    def put(self, section: str, row: Mapping[str, Any], facts: Sequence[str]) -> None:
        """Add a row to a section and write."""
        rows = self.content.setdefault(section, {}).setdefault("rows", [])
        key = [row.get(fact) for fact in facts]
        self.content[section]["rows"] = [one for one in rows if [one.get(fact) for fact in facts] != key] + [dict(row)]
        self.save()

    def note(self, section: str, **facts: Any) -> None:
        """Set what a section says about itself."""
        self.content.setdefault(section, {}).update(facts)
        self.save()

    def compare(self) -> None:
        """Bring the paired differences up to date and write."""
        self.content["comparisons"] = comparisons(self.content)
        self.save()

    def save(self) -> None:
        write_bytes(self.path, (json.dumps(self.content, indent=1, ensure_ascii=False) + "\n").encode())


def comparisons(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bilateral against each other method, by suite, kind of vectors and K, over the seeds that both have."""
    rows = content.get("main", {}).get("rows", [])
    groups: dict[tuple[str, str, int], dict[str, dict[int, Any]]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["vectors"], row["k"]), {}).setdefault(row["name"], {})[row["seed"]] = row
    found = []
    for (suite, vectors, k), by_name in groups.items():
        for name, other in by_name.items():
            seeds = sorted(set(other) & set(by_name.get("bilateral", {})) & set(by_name.get("individual", {})))
            if name in ("bilateral", "individual", "pre-trained") or not seeds:
                continue
            mine, theirs, own = ([by_name[one][seed] for seed in seeds] for one in ("bilateral", name, "individual"))
            told = difference(mine, theirs, [one["accuracy"] for one in own])
            found.append({"suite": suite, "vectors": vectors, "k": k, "against": name, "seeds": seeds, **told})
    return found


# The sections.


def choice(run: Run, file: File, options: argparse.Namespace) -> None:
    """On the text suite's validation data, the first seed's standard vectors of all tasks; the date and the grid come first."""
    known = file.content.get("choice", {})
    grid = choices()[:3] if run.quick else choices()
    file.note(
        "choice",
        date=known.get("date") or f"{datetime.date.today():%Y-%m-%d}",
        rule="the highest normalised accuracy on validation; among settings that cannot be told apart, the cheaper one",
        default=repr(Bilateral(rank=None)),
        grid=[entry.name for entry in grid],
        suite=run.name,
        tasks=run.names,
    )
    seed = options.seeds[0]
    models = run.models("standard", seed, run.names)
    own = run.individual(models, "validation")
    for entry in grid:
        row = run.row(entry, models, split="validation")
        file.put("choice", packed(row, own), ("name",))
        say(line("choice", file.content["choice"]["rows"][-1]))
    rows = file.content["choice"]["rows"]
    default = next(row for row in rows if row["name"] == "the default")
    alone = {name: one.value for name, one in own.items()}
    told = {row["name"]: difference([row], [default], [alone]) for row in rows}
    file.note("choice", best=max(rows, key=lambda row: row["normalised"])["name"], against_default=told)


def main_section(run: Run, file: File, options: argparse.Namespace) -> None:
    """Every method on every kind of vectors, seed and number of tasks."""
    for seed in options.seeds:
        for vectors in options.vectors:
            models = run.models(vectors, seed, run.names)
            own = run.individual(models, "test")
            base = run.correct(run.base, "test", run.names)
            for k in sorted({min(k, len(run.names)) for k in options.ks}):
                names = run.names[:k]
                facts = {"suite": run.name, "vectors": vectors, "seed": seed, "k": k}
                keys = (*facts, "name")
                for name, found in (("pre-trained", base), ("individual", own)):
                    row = Row(name=name, method="", correct={one: found[one] for one in names})
                    file.put("main", packed(row, own, **facts), keys)
                for entry in entries():
                    if options.methods and entry.name not in options.methods:
                        continue
                    row = run.row(entry, {name: models[name] for name in names})
                    file.put("main", packed(row, own, **facts), keys)
                    say(line(f"{run.name}, {vectors}, seed {seed}, K = {k}", file.content["main"]["rows"][-1]))
                file.compare()


def ablation_section(run: Run, file: File, options: argparse.Namespace) -> None:
    """One field changed at a time, all tasks, standard vectors of the first seed, on test; nothing is chosen from it."""
    models = run.models("standard", options.seeds[0], run.names)
    own = run.individual(models, "test")
    alone = {name: one.value for name, one in own.items()}
    default = None
    for entry in ablations()[:: 6 if run.quick else 1]:
        row = packed(run.row(entry, models), own, suite=run.name)
        default = default or row
        row["against_default"] = difference([row], [default], [alone])
        file.put("ablations", row, ("suite", "name"))
        say(line(f"ablation, {run.name}", row))


# H and G of each row; "role" is a factor only where the matrix faces that side, and the identity elsewhere.
ORACLE = (("role, estimated", "role, estimated"), ("role, true", "role, true"), ("estimated", "estimated"))
ORACLE += (("identity", "estimated"), ("identity", "true"), ("true", "identity"), ("true", "true"))


def oracle_section(run: Run, file: File, options: argparse.Namespace) -> None:
    """The same descent with second moments from each task's training data in the place of one estimate, or of both."""
    models = run.models("standard", options.seeds[0], run.names)
    limit = 16 if run.quick else options.oracle_examples
    own = run.individual(models, "test")
    part = two_sided(p=1.0, tolerance=0.03).reduction()  # one rule for where to stop, whatever the factors are
    file.note("oracle", examples=limit, labels="model", solver=repr(part))
    tau: dict[str, dict[str, Tensor]] = {}
    for name, path in models.items():
        weights = read_weights(path, base=run.encoder.folder)
        tau[name] = {key: weights[key].float() - run.base[key].float() for key in weights if weights[key].is_floating_point()}
    measured = run.moments(models, limit)
    taken = Bilateral(rank=None).chain().selection
    layers = [
        key for key in next(iter(measured.values())) if taken.takes(key, tuple(run.base[key].shape), kind(key, run.base[key]))
    ]
    default = None
    for left, right in ORACLE:
        entry = Entry(name=f"H {left}, G {right}", method=part)
        parts = [__version__, entry.name, repr(part), limit, run.facts(models)]
        row = run.cache.get(Row, parts)
        if row is None:
            begin = time.perf_counter()
            vector = {}
            for key in layers:
                vectors = [tau[name][key] for name in models]
                faces_out = weighed_left(key, (vectors[0].shape[0], vectors[0].shape[1]))
                h = left.removeprefix("role, ") if faces_out or "role" not in left else "identity"
                g = right.removeprefix("role, ") if not faces_out or "role" not in right else "identity"
                sides = [
                    (
                        side(h, vectors[i], measured[name][key].gradients, part.p, True),
                        side(g, vectors[i], measured[name][key].inputs, part.q, False),
                    )
                    for i, name in enumerate(models)
                ]
                vector[key] = with_factors(vectors, sides, part)
            row = run.measured(entry, vector, list(models), models, "test", time.perf_counter() - begin)
            run.cache.put(row, parts)
        told = packed(row, own, suite=run.name)
        file.put("oracle", told, ("suite", "name"))
        say(line(f"oracle, {run.name}", told))
    rows = [row for row in file.content["oracle"]["rows"] if row["suite"] == run.name]
    default = rows[0]
    for row in rows:
        row["against_estimated"] = difference([row], [default], [{name: one.value for name, one in own.items()}])
        file.put("oracle", row, ("suite", "name"))


def kind(name: str, tensor: Tensor) -> Kind:
    from thetau.checkpoint import kind_of

    return kind_of(name, tuple(tensor.shape))


def side(what: str, vector: Tensor, moment: Tensor, power: float, left: bool) -> Tensor | None:
    """One factor: None, from data, or read off the vector."""
    if what == "identity":
        return None
    if what == "true":
        return moment
    u, s, vt = torch.linalg.svd(vector, full_matrices=False)
    basis = u if left else vt.T
    return (basis * (s / s.norm()) ** (2 * power)) @ basis.T


def cost_section(file: File, options: argparse.Namespace) -> None:
    """Seconds of one matrix from the first vector to the result, in turns; vectors with a spectrum that decays as fine-tuning's does."""
    shapes = [(48, 32)] if options.quick else [(384, 384), (768, 768), (3072, 768)]
    tasks = 3 if options.quick else 8
    runs = 1 if options.quick else 3
    contenders: dict[str, Any] = {
        "WUDI (adam)": Interference(),
        "WUDI (gradient flow)": Interference(solver="gradient_flow"),
        "bilateral": Bilateral(rank=None).reduction(),
        **{f"both sides at once, rank = {rank}": two_sided(rank=rank).reduction() for rank in (None, 0.25, 0.125, 0.0625)},
    }
    for shape in shapes:
        vectors = [spectral(shape, task) for task in range(tasks)]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(runs):
            for name, part in contenders.items():
                begin = time.perf_counter()
                total = part.init(*shape, tasks)
                for task, vector in enumerate(vectors):
                    total = part.add(total, vector, place(shape, [f"t{task}"]))
                part.result(total, place(shape, [f"t{task}" for task in range(tasks)]))
                seconds[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(found) for name, found in seconds.items()}
        for name, part in contenders.items():
            told = part.cost(shape, tasks)
            row = {
                "shape": f"{shape[0]}x{shape[1]}",
                "tasks": tasks,
                "name": name,
                "seconds": median[name],
                "ratio_to_adam": median[name] / median["WUDI (adam)"],
                "ratio_to_gradient_flow": median[name] / median["WUDI (gradient flow)"],
                "operations_at_most": told.flops,
                "memory_mb": told.memory / 1e6,
            }
            file.put("cost", row, ("shape", "name"))
            say(f"cost, {row['shape']}, {name}: {row['seconds']:.3f} s, {row['ratio_to_adam']:.2f} of adam")
    large = {"q, k, v, o": (4096, 4096, 4 * 32), "gate, up": (11008, 4096, 2 * 32), "down": (4096, 11008, 32)}
    for name, part in contenders.items():
        costs = [(part.cost((out, inner), tasks), count) for out, inner, count in large.values()]
        row = {
            "shape": "7B",
            "tasks": tasks,
            "name": name,
            "operations_at_most": sum(one.flops * count for one, count in costs),
            "memory_mb": max(one.memory for one, _ in costs) / 1e6,
        }
        file.put("cost", row, ("shape", "name"))


def spectral(shape: tuple[int, int], task: int) -> Tensor:
    """A vector of CLIP's scale whose singular values fall as 1/√rank, with a part that all tasks share."""
    generator = torch.Generator().manual_seed(task)
    side = min(shape)
    decay = torch.arange(1, side + 1).float() ** -0.5
    own = (torch.randn(shape[0], side, generator=generator) * decay) @ torch.randn(side, shape[1], generator=generator)
    shared = torch.randn(shape, generator=torch.Generator().manual_seed(999))
    whole = own / own.square().mean().sqrt() + 0.3 * shared
    return 2.4e-4 * whole


def place(shape: tuple[int, int], tasks: Sequence[str]) -> Site:
    return Site(name="w", shape=shape, kind=Kind.MLP, layer=0, tasks=tuple(tasks), row_elements=shape[1])


def line(where: str, row: Mapping[str, Any]) -> str:
    return f"{where}: {row['name']}: {100 * row['absolute']:.2f}, normalised {100 * row['normalised']:.2f} (λ = {row['scale']:g}, {row['seconds'] or 0:.1f} s)"


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(one) for one in text.split(",") if one]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/bilateral"), help="where models and caches are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sections", type=listed(str), default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--suites", type=listed(str), default=["text", "vision"])
    parser.add_argument("--seeds", type=listed(int), default=[0])
    parser.add_argument("--ks", type=listed(int), default=[4, 8])
    parser.add_argument("--vectors", type=listed(str), default=["standard"], help="of standard,attention,lora")
    parser.add_argument(
        "--methods", type=lambda text: text.split(";"), default=None, help="rows of the main table, separated by ;"
    )
    parser.add_argument("--backbone-text", default="all-MiniLM-L6-v2")
    parser.add_argument("--backbone-vision", default="facebook/dinov2-small")
    parser.add_argument("--data-text", type=Path, default=None)
    parser.add_argument("--data-image", type=Path, default=None)
    parser.add_argument("--tasks-text", default=None)
    parser.add_argument("--tasks-vision", default=None)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--oracle-examples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what the result file has")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, a few examples, two tasks: to see that all of it works"
    )
    options = parser.parse_args(arguments)
    for name, known in (("sections", SECTIONS), ("suites", tuple(TASKS)), ("vectors", tuple(VECTORS["text"]))):
        unknown = [one for one in getattr(options, name) if one not in known]
        if unknown:
            parser.error(f"--{name}: unknown {unknown[0]!r}. Known: {', '.join(known)}.")
    if options.quick:
        options.validation, options.test, options.ks = min(24, options.validation), min(40, options.test), [2]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    file = File(options.out, fresh=options.fresh, quick=options.quick)
    if "cost" in options.sections:
        cost_section(file, options)
    if set(options.sections) == {"cost"}:
        return
    for name in options.suites:
        run = Run(name, options)
        if "choice" in options.sections and name == "text":
            choice(run, file, options)
        if "main" in options.sections:
            main_section(run, file, options)
        if "ablations" in options.sections and name == options.suites[0]:
            ablation_section(run, file, options)
        if "oracle" in options.sections:
            oracle_section(run, file, options)


if __name__ == "__main__":
    main()
