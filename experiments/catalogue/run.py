"""Every method on the same fine-tuned models: test accuracy at its defaults and with λ tuned, seconds and memory of the merge.

    make demo                               # the fine-tuned models, in runs/demo
    python -m experiments.catalogue.run [--run runs/demo] [--only NAME …] [--share]

A method of several models merges the demo's six. One that takes fewer gets the pair `PAIR`: the second model over the first where it
takes one model besides its base, or both over their base. A method that gives each task a vector of its own is measured on each task
with that. λ is tuned on validation where the method has one: the merged vector of the defaults times each of `FACTORS`; for a method
around another one (`then`) that is the whole merged vector. A merge runs in a process of its own with one worker; its time is that of
the processor, so that a busy machine does not count, and its memory the operating system's peak.

Rows are kept in RUN/catalogue as they are made, and not made again; `--only` makes some anew. Several processes with `--share` divide the
rows among themselves and write nothing else. Without it all is made that is missing, and experiments/catalogue/results.json written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thetau
from experiments.common import ROOT, write_result
from experiments.fisher.run import fisher_file, fisher_files, tuned_models
from thetau.evaluate import Evaluator
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import at_scale
from thetau.evaluate.search import choose_scale
from thetau.evidence import CoefficientConfig, MomentConfig, collect_second_moments, learn_coefficients
from thetau.methods import registry
from thetau.models import Encoder, load_encoder, read_weights
from thetau.parts import Method, Varying
from thetau.tasks import load_task
from thetau.tasks.suite import load_suite

OUT = Path(__file__).parent / "results.json"
PAIR = ("clinc_domain", "dbpedia_topic")
FACTORS = (0.5, 1.0, 1.5, 2.5, 4.0)
LIMITS = {"validation": 60, "test": 200}
EXAMPLES = 128  # of each task, where a method needs evidence
STEPS, LR, BATCH = 100, 5e-3, 16  # of AdaMerging: as far in all as the authors' 500 steps of 1e-3
WHOLE = "merged"  # the output of a method that has one


def coefficient(method: Method) -> Varying | None:
    """λ of a method, or of the one that it is around; None where it has none, or scales a model and not a vector."""
    values = [method.__dict__[field.name] for field in fields(method) if field.name == "scale"]  # type: ignore[arg-type]
    if values:
        return None if method.chain().models else values[0]
    inner = [method.__dict__[field.name] for field in registry.describe(registry.name_of(method)) if field.holds(Method)]
    return coefficient(inner[0]) if inner else None


def tasks_of(method: Method, tasks: Sequence[str]) -> tuple[str, ...]:
    """Whose models it merges."""
    return tuple(tasks) if method.takes[1] is None else PAIR


def merge(name: str, run: Path, out: Path) -> dict[str, float]:
    """Merge with a method's defaults and save the vectors; returns the processor's seconds, and megabytes before and at the peak.

    `run` names the folder of the demo's run. Meant for a process of its own.
    """
    suite = load_suite("demo")
    method = registry.build(name, {})
    tasks = tasks_of(method, suite.tasks)
    models = tuned_models(run, suite.tasks)
    base = thetau.open(suite.backbone)
    opened = {task: thetau.open(models[task]) for task in tasks}
    if method.takes[1] == 1:
        first, second = tasks
        base, opened = opened[first], {second: opened[second]}
    vectors = [(model - base).named(task) for task, model in opened.items()]
    evidence = {kind: {task: evidence_file(run, kind, task) for task in tasks} for kind in method.chain().needs}
    before, begun = resident("VmRSS"), time.process_time()
    engine = thetau.Engine(workers=1)
    if method.chain().emit is not None:
        made = thetau.outputs(vectors, method, engine=engine, evidence=evidence)
    else:
        made = {WHOLE: thetau.merge(vectors, method, engine=engine, evidence=evidence)}
    for output, vector in made.items():
        vector.save(out / f"{output}.safetensors", engine=engine)
    return {"seconds": time.process_time() - begun, "start_megabytes": before, "peak_megabytes": resident("VmHWM")}


def evidence_file(run: Path, kind: str, task: str) -> Path:
    """Where a task's evidence of a kind is kept."""
    if kind == "fisher":
        return fisher_file(run, task, EXAMPLES)
    return run / "evidence" / f"{kind}-{EXAMPLES}" / f"{task}.safetensors"


def resident(key: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith(key))


class Catalogue:
    """One run: the live encoder, the fine-tuned models, the rows that are made."""

    def __init__(self, run: Path) -> None:
        self.run, self.suite = run, load_suite("demo")
        self.models = tuned_models(run, self.suite.tasks)
        self.encoder: Encoder = load_encoder(self.suite.backbone)
        limits = self.suite.limits
        self.evaluator = Evaluator(
            self.encoder,
            [load_task(name) for name in self.suite.tasks],
            limits=LIMITS,
            max_length=limits.max_length,
            image_size=limits.image_size,
            cache=run / "cache",
        )
        self.base: dict[str, Tensor] = self.encoder.weights()
        self.individual = {
            split: {
                task: self.evaluator.evaluate(read_weights(folder), split, [task])[task] for task, folder in self.models.items()
            }
            for split in LIMITS
        }

    def row_file(self, name: str) -> Path:
        """Where a row is kept."""
        return self.run / "catalogue" / f"{name}.json"

    def folder(self, name: str) -> Path:
        """Where a row's merged vectors lie; it is there while the row is being made."""
        return self.row_file(name).with_suffix(".tmp")

    def row(self, name: str) -> dict[str, Any]:
        """A method's row, as it was made before or anew."""
        file = self.row_file(name)
        method = registry.build(name, {})
        if file.is_file():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if kept["method"] == registry.plain(method):
                return kept
        shutil.rmtree(self.folder(name), ignore_errors=True)
        self.folder(name).mkdir(parents=True)
        try:
            made = {"method": registry.plain(method), **self.made(name, method)}
            write_result(file, made)
        finally:
            shutil.rmtree(self.folder(name))
        return made

    def collect(self, kind: str) -> None:
        """Evidence of a kind for every task, or what is kept of it."""
        length = self.suite.limits.max_length
        self.evaluator.load_base()
        if kind == "fisher":
            fisher_files(self.run, self.evaluator, self.models, EXAMPLES)
        elif kind == "coefficients":
            base = thetau.open(self.encoder.folder)
            vectors = {task: (thetau.open(path) - base).named(task) for task, path in self.models.items()}
            config = CoefficientConfig(examples=EXAMPLES, steps=STEPS, lr=LR, batch=BATCH, max_length=length)
            folder = evidence_file(self.run, kind, PAIR[0]).parent
            learn_coefficients(self.encoder, self.evaluator.tasks, vectors, folder, config, heads=self.evaluator.heads)
        else:
            assert kind in ("gram", "gradients")
            moment: Any = kind
            config_ = MomentConfig(examples=EXAMPLES, max_length=length)
            for task, path in self.models.items():
                out, given = evidence_file(self.run, kind, task), read_weights(path)
                head = self.evaluator.heads[task]
                collect_second_moments(
                    self.encoder, self.evaluator.tasks[task], given, out, moment, config_, head=head, origin=str(path)
                )

    def made(self, name: str, method: Method) -> dict[str, Any]:
        """Merge, measure, tune, measure."""
        folder = self.folder(name)
        tasks = tasks_of(method, self.suite.tasks)
        for kind in method.chain().needs:
            self.collect(kind)
        command = [
            sys.executable,
            "-m",
            "experiments.catalogue.run",
            "--run",
            str(self.run),
            "--merge",
            name,
            "--out",
            str(folder),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"tasks": list(tasks)}
        if done.returncode:
            return {**row, "failed": done.stderr.strip().splitlines()[-1]}
        row |= {key: round(value, 2) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
        vectors = {file.stem: thetau.open(file).state_dict() for file in sorted(folder.glob("*.safetensors"))}
        base = read_weights(self.models[tasks[0]]) if method.takes[1] == 1 else self.base
        row["outputs"] = "each task's own" if WHOLE not in vectors else "one"

        def measured(split: str, factor: float) -> dict[str, Measure]:
            found: dict[str, Measure] = {}
            for output, vector in vectors.items():
                weights = at_scale(base, vector, factor)
                origin = f"{name}, {output}, times {factor:g}"
                found |= self.evaluator.evaluate(weights, split, tasks if output == WHOLE else [output], origin=origin)
            return found

        row["default"] = self.accuracy(measured("test", 1.0))
        scale = coefficient(method)
        if isinstance(scale, int | float):
            search = choose_scale(FACTORS, lambda factor: measured("validation", factor), self.individual["validation"])
            trials = {f"{trial.scale:g}": round(trial.normalised, 4) for trial in search.trials}
            row["tuned"] = self.accuracy(measured("test", search.scale)) | {"scale": scale * search.scale, "trials": trials}
            row["scale"] = scale
        return row

    def accuracy(self, measures: Mapping[str, Measure]) -> dict[str, Any]:
        """Each task's accuracy, their average, and that divided by what each task's own model has."""
        return {
            "accuracy": {task: round(measures[task].value, 4) for task in sorted(measures)},
            "average": round(average(measures), 4),
            "normalised": round(normalised(measures, self.individual["test"]), 4),
        }

    def references(self) -> dict[str, Any]:
        """The base, and each task's own model: on its own task, and the pair's on both."""
        pair = {task: self.evaluator.evaluate(read_weights(self.models[task]), "test", PAIR) for task in PAIR}
        return {
            "pre-trained": self.accuracy(self.evaluator.evaluate(self.base, "test")),
            "individual": self.accuracy(self.individual["test"]),
            "pre-trained, pair": self.accuracy(self.evaluator.evaluate(self.base, "test", PAIR)),
            "individual, pair": self.accuracy({task: self.individual["test"][task] for task in PAIR}),
            **{f"{task} alone, pair": self.accuracy(measures) for task, measures in pair.items()},
        }

    def results(self) -> dict[str, Any]:
        """Everything, from the rows."""
        rows = {name: self.row(name) for name in ours()}
        return {
            "command": "make catalogue",
            "suite": self.suite.name,
            "backbone": self.suite.backbone,
            "tasks": list(self.suite.tasks),
            "pair": list(PAIR),
            "test": {task: self.individual["test"][task].n for task in self.suite.tasks},
            "validation": {task: self.individual["validation"][task].n for task in self.suite.tasks},
            "factors": list(FACTORS),
            "references": self.references(),
            "rows": rows,
            "versions": {"thetau": thetau.__version__, "torch": torch.__version__},
        }


def ours() -> list[str]:
    """The registered methods, without those of other packages that happen to be installed."""
    return [name for name in registry.names() if registry.package_of(registry.get(name)) is None]


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--merge")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.merge:
        print(json.dumps(merge(given.merge, given.run, given.out)))
        return
    catalogue = Catalogue(given.run)
    names = given.only or ours()
    for name in names:
        if given.share and catalogue.folder(name).exists():
            continue
        if given.only:
            catalogue.row_file(name).unlink(missing_ok=True)
        row = catalogue.row(name)
        told = row.get("failed") or f"{100 * row['default']['average']:.1f}" + (
            f", tuned {100 * row['tuned']['average']:.1f} at λ = {row['tuned']['scale']:g}" if "tuned" in row else ""
        )
        print(f"{name}: {told}", flush=True)
    if not given.share:
        write_result(OUT, catalogue.results())


if __name__ == "__main__":
    main()
