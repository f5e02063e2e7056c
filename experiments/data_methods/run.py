"""Merging with and without data on the same fine-tuned models: accuracy, seconds, memory, examples seen.

    make demo                                             # the fine-tuned models, in runs/demo
    python -m experiments.data_methods.run [--run runs/demo] [--only ROW …]
    python -m experiments.data_methods.run --suite vision --data DATA/image --backbone FOLDER --seeds 0 1 2 --run runs/data

The demo's six models become one, by methods that look at no data, by methods that look at unlabelled examples of each task, and by λ chosen on
labelled ones. Every row is made in a process of its own: its seconds are those of the processor for collecting and merging together, its memory
the operating system's peak. Examples come from the training or the validation split, never from the test split, on which all rows are
measured. AdaMerging makes fewer and longer steps than its authors' (`STEPS`, `LR`): as far in all, so that this ends in minutes. WEMoE makes fewer of
the authors' length (`MIXTURE_STEPS`, `MIXTURE_LR`): with ten times longer ones its routers diverge here.

Another suite, another backbone than the suite's, or other seeds than 0 are fine-tuned first, as the suite says, in RUN/SUITE-SEED. Rows are kept as
they are made, and not made again; `--only` makes some anew. Writes experiments/data_methods/results.json after each, of others results-SUITE-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import thetau
from experiments.catalogue.run import resident
from experiments.common import ROOT, machine, write_result
from experiments.fisher.run import tuned_models
from thetau.compression import keep_parts, parts_beside
from thetau.evaluate import Evaluator
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import at_scale
from thetau.evaluate.search import choose_scale
from thetau.evidence import (
    CoefficientConfig,
    FisherConfig,
    MixtureConfig,
    MomentConfig,
    SurgeryConfig,
    TwinConfig,
    collect_fisher,
    collect_merged_grams,
    collect_second_moments,
    learn_coefficients,
    learn_mixture,
    learn_router,
    learn_surgery,
)
from thetau.evidence.surgery import corrected_heads, surgery_file
from thetau.evidence.twin import read_router, router_file
from thetau.evidence.wemoe import mixture_file, read_mixture
from thetau.finetune import FinetuneConfig, finetune
from thetau.methods import registry
from thetau.models import load_encoder, read_weights
from thetau.models.mixture import mixing
from thetau.recipes import Recipe
from thetau.recipes.schema import ModelEntry
from thetau.studies.routed import measure_routed
from thetau.tasks import load_task, make_head
from thetau.tasks.head import AnyHead
from thetau.tasks.suite import load_suite

OUT = Path(__file__).parent / "results.json"
LIMITS = {"validation": 60, "test": 200}
FACTORS = (0.5, 1.0, 1.5, 2.5, 4.0)
STEPS, LR, BATCH = 40, 1e-2, 8
MIXTURE_STEPS, MIXTURE_LR = 40, 1e-4
Data = Literal["none", "unlabelled", "labelled"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to one model: a method with its fields, and what it looks at.

    `examples` of each task; `tuned`: λ is chosen on that many labelled ones. `surgery`: its features are corrected on that many.
    `merged`: Gram matrices are those of the merged model's own activations. `mixture`: its MLPs are mixed by input, routers learned on that many.
    `router`: which task's part an input runs through is told by a router that learned on that many.
    """

    method: str
    fields: Mapping[str, Any]
    data: Data = "none"
    examples: int = 0
    tuned: bool = False
    surgery: bool = False
    merged: bool = False
    mixture: bool = False
    router: bool = False


def row(method: str, data: Data = "none", examples: int = 0, **fields: Any) -> Row:
    """A row without λ or surgery."""
    return Row(method=method, fields=fields, data=data, examples=examples)


AWD = {"name": "awd", "then": "task_arithmetic"}
PLUS = {"name": "ties", "density": 0.2}
ROWS: Mapping[str, Row] = {
    "average": row("average"),
    "task arithmetic, λ = 0.3": row("task_arithmetic"),
    "RegMean, 32": row("regmean", "unlabelled", 32),
    "AdaMerging, 32": row("adamerging", "unlabelled", 32),
    "WUDI": row("wudi", solver="gradient_flow"),
    "RegMean, 128": row("regmean", "unlabelled", 128),
    "Fisher, 16": row("fisher", "unlabelled", 16),
    "RegMean++, 32": Row(method="regmean", fields={}, data="unlabelled", examples=32, merged=True),
    "task arithmetic, λ by labels": Row(
        method="task_arithmetic", fields={}, data="labelled", examples=LIMITS["validation"], tuned=True
    ),
    "task arithmetic and surgery, 32": Row(method="task_arithmetic", fields={}, data="unlabelled", examples=32, surgery=True),
    "K-FAC, 32": row("kfac", "unlabelled", 32, iterations=30),
    "RegMean, 8": row("regmean", "unlabelled", 8),
    "AWD-AdaMerging, 32": row("adamerging", "unlabelled", 32, then=AWD),
    "AdaMerging++, 32": row("adamerging", "unlabelled", 32, then=PLUS),
    "TIES": row("ties"),
    "TSV-M": row("tsv_m", rank="full"),  # the paper's
    "RegMean, 32, off-diagonal 0.1": row("regmean", "unlabelled", 32, off_diagonal=0.1),
    "RegMean, 32, off-diagonal 1": row("regmean", "unlabelled", 32, off_diagonal=1.0),
    "RegMean and surgery, 32": Row(method="regmean", fields={}, data="unlabelled", examples=32, surgery=True),
    "bilateral": row("bilateral"),
    "ESM, 32": row("esm", "unlabelled", 32),
    "ESM, 8": row("esm", "unlabelled", 8),
    "task arithmetic and WEMoE, 32": Row(method="task_arithmetic", fields={}, data="unlabelled", examples=32, mixture=True),
    "ESM, 32, without powers": row("esm", "unlabelled", 32, power=0.0, scale=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Whose models are merged: a suite's, of one seed of fine-tuning. `data`, `backbone`: of a suite that does not ship with them."""

    suite: str = "demo"
    seed: int = 0
    data: Path | None = None
    backbone: str | None = None

    @property
    def demo(self) -> bool:
        """Whether they are those of `make demo`."""
        return self == Setting()

    @property
    def out(self) -> Path:
        """The result file."""
        return OUT if self.demo else OUT.with_name(f"results-{self.suite}-{self.seed}.json")

    def words(self, run: Path) -> list[str]:
        """As a command line has them."""
        more = {"--data": self.data, "--backbone": self.backbone}
        given = [str(word) for flag, value in more.items() if value is not None for word in (flag, value)]
        return ["--run", str(run), "--suite", self.suite, "--seeds", str(self.seed), *given]


class Bench:
    """A suite's models of one seed, its encoder and its tasks."""

    def __init__(self, run: Path, setting: Setting) -> None:
        self.setting, self.where = setting, run
        self.run = run if setting.demo else run / f"{setting.suite}-{setting.seed}"
        self.suite = load_suite(setting.suite)
        self.backbone = setting.backbone or self.suite.backbone
        self.encoder = load_encoder(self.backbone)
        self.tasks = {name: load_task(name, setting.data) for name in self.suite.tasks}
        self.sizes: dict[str, Any] = {
            "max_length": self.suite.limits.max_length,
            "image_size": self.suite.limits.image_size,
        }
        self.models = tuned_models(run, self.suite.tasks) if setting.demo else {name: self.tuned(name) for name in self.tasks}
        self.base = thetau.open(self.encoder.folder)
        self.vectors = {name: (thetau.open(path) - self.base).named(name) for name, path in self.models.items()}

    def tuned(self, task: str) -> Path:
        """A task's model, fine-tuned as the suite says where it is not there yet."""
        fields = {**self.suite.finetune, **self.suite.finetune_of.get(task, {}), "seed": self.setting.seed}
        out, begun = self.run / "finetuned" / task / "model", time.monotonic()
        config = FinetuneConfig.of(fields, f"suite {self.suite.name}, task {task}")
        made = finetune(self.encoder, self.tasks[task], out, config, base=self.backbone, heads={task: self.head(task)})
        if not made.cached:
            sys.stderr.write(f"{task}, seed {self.setting.seed}: fine-tuned in {time.monotonic() - begun:.0f} s\n")
        return out

    def head(self, task: str) -> AnyHead:
        """A task's frozen head; the encoder holds the base. Probes are made once."""
        return make_head(self.encoder, self.tasks[task], **self.sizes, cache=self.run / "cache")

    def folder(self, name: str) -> Path:
        """Where a row lies."""
        return self.run / "data_methods" / "".join(letter if letter.isalnum() else "-" for letter in name)

    def evidence(self, chosen: Row, folder: Path, heads: Mapping[str, AnyHead]) -> dict[str, dict[str, Path]]:
        """What the row's method needs, collected anew; `heads` are given where it looks at outputs."""
        method = registry.build(chosen.method, chosen.fields)
        found: dict[str, dict[str, Path]] = {}
        if chosen.merged:
            assert isinstance(method, thetau.methods.RegMean)
            moments = MomentConfig(examples=chosen.examples, **self.sizes)
            return {
                "gram": collect_merged_grams(
                    self.encoder, self.tasks, self.vectors, folder / "gram", moments, method=method
                ).files
            }
        for kind in method.chain().needs:
            if kind == "coefficients":
                config = CoefficientConfig(
                    steps=STEPS, lr=LR, batch=min(BATCH, chosen.examples), examples=chosen.examples, **self.sizes
                )
                assert isinstance(method, thetau.methods.AdaMerging)
                origins = {name: str(path) for name, path in self.models.items()}
                made = learn_coefficients(
                    self.encoder, self.tasks, self.vectors, folder / kind, config, method=method, heads=heads, origins=origins
                )
                found[kind] = made.files
                continue
            found[kind] = {name: folder / f"{kind}-{name}.safetensors" for name in self.models}
            for name, path in self.models.items():
                weights, out = read_weights(path), found[kind][name]
                if kind == "fisher":
                    fisher = FisherConfig(examples=chosen.examples, **self.sizes)
                    collect_fisher(self.encoder, self.tasks[name], weights, out, fisher, head=heads[name], origin=str(path))
                else:
                    moments = MomentConfig(examples=chosen.examples, **self.sizes)
                    assert kind in ("gram", "gradients")
                    which: Any = kind
                    collect_second_moments(
                        self.encoder, self.tasks[name], weights, out, which, moments, head=heads.get(name), origin=str(path)
                    )
        return found

    def make(self, name: str) -> dict[str, float]:
        """Collect and merge; the model is written to the row's folder. Meant for a process of its own."""
        chosen, folder = ROWS[name], self.folder(name)
        asked = {"fisher", "gradients", "coefficients"} & set(registry.build(chosen.method, chosen.fields).chain().needs)
        heads = {task: self.head(task) for task in self.tasks} if asked or chosen.mixture else {}
        before, begun = resident("VmRSS"), time.process_time()
        engine = thetau.Engine(workers=1)
        evidence = self.evidence(chosen, folder, heads)
        collected = time.process_time()
        method = registry.build(chosen.method, chosen.fields)
        merged = thetau.merge(list(self.vectors.values()), method, engine=engine, evidence=evidence)
        (self.base + merged).save(folder / "merged", engine=engine)
        if chosen.surgery:
            corrections = SurgeryConfig(examples=chosen.examples, **self.sizes)
            weights = read_weights(folder / "merged")
            for task, path in self.models.items():
                out = surgery_file(folder / "merged", task)
                learn_surgery(self.encoder, self.tasks[task], weights, read_weights(path), out, corrections)
        if chosen.mixture:
            config = MixtureConfig(
                steps=MIXTURE_STEPS,
                lr=MIXTURE_LR,
                batch=min(BATCH, chosen.examples),
                examples=chosen.examples,
                **self.sizes,
            )
            out = mixture_file(folder / "merged")
            learn_mixture(self.encoder, self.tasks, self.vectors, read_weights(folder / "merged"), out, config, heads=heads)
        if chosen.router:
            models = [ModelEntry(path=str(path), name=task) for task, path in self.models.items()]
            recipe = Recipe(base=str(self.encoder.folder), models=list(models), method={"name": chosen.method, **chosen.fields})
            keep_parts(recipe, folder / "merged", engine=engine)
            telling = TwinConfig(examples=chosen.examples, **self.sizes)
            learn_router(self.encoder, self.tasks, read_weights(folder / "merged"), router_file(folder / "merged"), telling)
        return {
            "collect_seconds": round(collected - begun, 2),
            "seconds": round(time.process_time() - begun, 2),
            "start_megabytes": round(before, 1),
            "peak_megabytes": round(resident("VmHWM"), 1),
        }

    def results(self, only: list[str]) -> Iterator[dict[str, Any]]:
        """All rows so far, after each: as it was made before, or anew."""
        evaluator = Evaluator(self.encoder, self.tasks.values(), limits=LIMITS, **self.sizes, cache=self.run / "cache")
        individual = {
            split: {task: evaluator.evaluate(read_weights(path), split, [task])[task] for task, path in self.models.items()}
            for split in LIMITS
        }
        base = evaluator.evaluate(self.encoder_weights(evaluator), "test")

        def told(measures: Mapping[str, Measure]) -> dict[str, Any]:
            return {
                "average": round(average(measures), 4),
                "normalised": round(normalised(measures, individual["test"]), 4),
                "tasks": {task: round(one.value, 4) for task, one in measures.items()},
            }

        rows: dict[str, Any] = {}
        for name, chosen in ROWS.items():
            rows[name] = self.row(name, chosen, evaluator, individual["validation"], told, anew=name in only)
            sys.stdout.write(f"{name}: {100 * rows[name]['average']:.1f}, {rows[name]['seconds']:.1f} s\n")
            sys.stdout.flush()
            yield {
                "command": "make data",
                "machine": machine(),
                "suite": self.setting.suite,
                "seed": self.setting.seed,
                "backbone": Path(self.backbone).name,
                "test": {task: one.n for task, one in individual["test"].items()},
                "adamerging": {"steps": STEPS, "lr": LR, "batch": BATCH},
                "wemoe": {"steps": MIXTURE_STEPS, "lr": MIXTURE_LR, "batch": BATCH},
                "references": {"pre-trained": told(base), "individual": told(individual["test"])},
                "rows": rows,
                "versions": {"thetau": thetau.__version__, "torch": torch.__version__},
            }

    def encoder_weights(self, evaluator: Evaluator) -> dict[str, torch.Tensor]:
        """The base's."""
        evaluator.load_base()
        return self.encoder.weights()

    @contextmanager
    def running(self, name: str, chosen: Row, weights: Mapping[str, torch.Tensor], evaluator: Evaluator) -> Iterator[None]:
        """While it lasts, MLPs are mixed by input, where the row is so."""
        if not chosen.mixture:
            yield
            return
        mixture = read_mixture(mixture_file(self.folder(name) / "merged"), weights, self.encoder.base_hash)
        base = self.encoder_weights(evaluator)
        with mixing(self.encoder, mixture, base) as (encoder, _), evaluator.through(encoder):
            yield

    def row(
        self,
        name: str,
        chosen: Row,
        evaluator: Evaluator,
        individual: Mapping[str, Measure],
        told: Callable[[Mapping[str, Measure]], dict[str, Any]],
        *,
        anew: bool,
    ) -> dict[str, Any]:
        """One row: made in another process, measured in this one."""
        file = self.folder(name).with_suffix(".json")
        if file.is_file() and not anew:
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if Row(**kept["row"]) == chosen:
                return kept
        shutil.rmtree(self.folder(name), ignore_errors=True)
        self.folder(name).mkdir(parents=True)
        command = [sys.executable, "-m", "experiments.data_methods.run", *self.setting.words(self.where), "--make", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip()}")
        cost = json.loads(done.stdout.splitlines()[-1])
        weights = read_weights(self.folder(name) / "merged")
        heads = dict(evaluator.heads)
        if chosen.surgery:
            evaluator.heads.update(corrected_heads(self.folder(name) / "merged", weights, heads))
        if chosen.tuned:
            evaluator.load_base()
            base = self.encoder.weights()
            vector = {key: value.float() - base[key].float() for key, value in weights.items() if value.is_floating_point()}
            begun = time.process_time()
            search = choose_scale(
                FACTORS, lambda factor: evaluator.evaluate(at_scale(base, vector, factor), "validation"), individual
            )
            cost["seconds"] = round(cost["seconds"] + time.process_time() - begun, 2)
            cost["factor"] = search.scale
            weights = at_scale(base, vector, search.scale)
        if chosen.router:
            merged = self.folder(name) / "merged"
            router, beside = read_router(router_file(merged), weights), parts_beside(merged, self.base)
            measured, _ = measure_routed(evaluator, router, weights, beside, tuple(self.tasks), "test", origin=name)
        else:
            with self.running(name, chosen, weights, evaluator):
                measured = evaluator.evaluate(weights, "test", origin=name)
        evaluator.heads.update(heads)
        made = {"row": asdict(chosen), "data": chosen.data, "examples": chosen.examples, **told(measured), **cost}
        write_result(file, made)
        shutil.rmtree(self.folder(name))
        return made


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, help="folder of the suite's tasks, where they do not ship")
    parser.add_argument("--backbone", help="another model than the suite's")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--make")
    given = parser.parse_args()
    data = given.data and given.data.resolve()
    for seed in given.seeds:
        setting = Setting(suite=given.suite, seed=seed, data=data, backbone=given.backbone)
        bench = Bench(given.run.resolve(), setting)
        if given.make:
            sys.stdout.write(json.dumps(bench.make(given.make)) + "\n")
            return
        for results in bench.results(given.only):
            write_result(setting.out, results)


if __name__ == "__main__":
    main()
