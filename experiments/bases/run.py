"""Task vector bases on real vectors: the experiments of the paper, at the scale of small encoders.

    python -m experiments.bases.run text --data DATA/text --run runs/bases [--quick]
    python -m experiments.bases.run vision --data DATA/image --backbone FOLDER --run runs/bases

Every section is kept in the run's folder when it is done, and fine-tuned models, merges and evaluations by their content, so that an
interrupted run goes on where it was. After each section the results go to experiments/bases/SUITE.json; docs/bases.md is drawn
from them by experiments/bases/page.py. DATA holds the suites' tasks (docs/finetuning.md has the format); the vision backbone is a folder of
DINOv2-S, or its hub id.

Sections: tasks (each task's own model, the base, the majority), clusters (cosines, spectrum, k; Fig. 7), steps (how clusters form; Fig. 9),
partitions (all 15 of four tasks under every inner method; Tables 4, 10 and 15), outer (Table 11), savings (Table 5), sizes (bases against random
partitions for each k; Fig. 8), negation (Table 6), ood (Tables 7, 13, 14), sparse (Table 8), mixed (Table 2), online (one by one under budgets).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file

import thetau
from experiments.common import EXPERIMENTS
from thetau import methods
from thetau.bases import (
    all_partitions,
    build,
    cluster,
    drift_of,
    given_groups,
    insert,
    random_partition,
    similarities,
)
from thetau.bases.cluster import Clustering, Similarity, agreement
from thetau.checkpoint.disk import write_bytes
from thetau.evaluate.cache import Cache
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.means import average
from thetau.evaluate.measures import Measure
from thetau.evaluate.similarity import TargetSimilarity
from thetau.evidence import CoefficientConfig, FisherConfig, MomentConfig
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.parts import PerTask
from thetau.studies.arithmetic import negation
from thetau.studies.bases import BasesAddition, bases_addition, basis_ood, outer_space
from thetau.studies.inner import Collector
from thetau.studies.partitions import (
    Bench,
    PartitionStudy,
    compare_savings,
    partition_label,
    study_partitions,
    value_of_partition,
)
from thetau.studies.verdicts import CONTROL, VALIDATION
from thetau.tasks import load_task

RESULTS = EXPERIMENTS / "bases"
SNAPSHOTS = (1, 2, 20, 60)
MARGIN = 0.05
LAMBDAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # and further, until the best is inside
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0)
OOD_ALPHAS = tuple(0.25 * i for i in range(5))


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How a cluster becomes a basis: by a method, what it needs of the tasks' data being collected; with `joint` by training one model on all the
    cluster's tasks, as many steps as they have together; with `tangent` by the method, of vectors that were learnt in the tangent space.
    """

    method: Any
    joint: bool = False
    tangent: bool = False

    @property
    def outside(self) -> bool:
        """Whether bases can be merged by it too: it needs nothing but them."""
        return not (self.joint or self.tangent or self.method.chain().needs)


INNER: dict[str, Inner] = {
    "Mean": Inner(method=methods.Average()),
    "TIES": Inner(method=methods.Ties(scale=0.4)),
    "TopK": Inner(method=methods.TopK()),
    "WUDI": Inner(method=methods.Wudi(solver="gradient_flow")),
    "Consensus": Inner(method=methods.ConsensusTa()),
    "Fisher": Inner(method=methods.Fisher()),
    "RegMean": Inner(method=methods.RegMean()),
    "AdaMerging": Inner(method=methods.AdaMerging()),
    "MTL": Inner(method=methods.Average(), joint=True),
    "tangent": Inner(method=methods.Average(), tangent=True),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A suite's tasks and settings. `four`: two natural pairs; `targets`: tasks outside them and the pair each is close to, if any.

    `validation`, `test`: examples a task, `control_size` of the control's splits; all of a task that has fewer.
    `examples`: those of each task that evidence is collected from; AdaMerging makes `coefficient_steps`.
    `many`: those of test where many models of many tasks are compared.
    """

    backbone: str
    tasks: tuple[str, ...]
    config: dict[str, Any]
    size: dict[str, int]
    four: tuple[tuple[str, str], tuple[str, str]]
    targets: dict[str, tuple[str, ...]]
    control: str
    mixed: tuple[str, ...]
    second: tuple[str, ...]
    validation: int = VALIDATION
    test: int = 200
    control_size: int = CONTROL
    many: int = 100
    margin: float = MARGIN
    lambdas: tuple[float, ...] = LAMBDAS
    alphas: tuple[float, ...] = ALPHAS
    inner: tuple[str, ...] = tuple(INNER)
    examples: int = 64
    coefficient_steps: int = 100
    snapshots: tuple[int, ...] = SNAPSHOTS


SETTINGS = {
    "text": Setting(
        backbone="all-MiniLM-L6-v2",
        tasks=(
            *("ag_news", "clinc_domain", "cr", "mr", "mrpc", "qnli", "rte", "sms_spam", "sst2", "subj", "trec"),
            *("tweet_emotion", "banking77", "dbpedia_topic", "hwu64_scenario"),
        ),
        config={"paradigm": "standard", "steps": 200, "batch_size": 16, "lr": 1e-4, "max_length": 48},
        size={"max_length": 48},
        four=(("mr", "sst2"), ("clinc_domain", "hwu64_scenario")),
        targets={"cr": ("mr", "sst2"), "trec": ()},
        control="dbpedia_topic",
        mixed=("mr", "clinc_domain", "sms_spam", "trec"),
        second=("ag_news", "subj", "hwu64_scenario"),
    ),
    "vision": Setting(
        backbone="facebook/dinov2-small",
        tasks=("mnist", "usps", "rsscn7", "scene15", "gtsrb", "dtd10", "cifar10", "fashion_mnist"),
        config={"paradigm": "standard", "steps": 200, "batch_size": 32, "lr": 5e-5, "image_size": 56},
        size={"image_size": 56},
        four=(("mnist", "usps"), ("rsscn7", "scene15")),
        targets={"gtsrb": ("mnist", "usps"), "dtd10": ()},
        control="cifar10",
        mixed=("mnist", "rsscn7", "gtsrb", "fashion_mnist"),
        second=("cifar10", "scene15"),
    ),
}
QUICK = ("sms_spam", "clinc_domain", "hwu64_scenario", "banking77", "dbpedia_topic")


def quick(setting: Setting) -> Setting:
    """A few steps and examples of the shipped tasks, to see that every section works."""
    return replace(
        setting,
        tasks=QUICK,
        config={**setting.config, "steps": 4, "batch_size": 4, "max_length": 16},
        size={"max_length": 16},
        four=(("sms_spam", "banking77"), ("clinc_domain", "hwu64_scenario")),
        targets={"dbpedia_topic": ()},
        mixed=("sms_spam", "clinc_domain"),
        second=("hwu64_scenario",),
        validation=8,
        test=16,
        control_size=16,
        many=12,
        margin=-1.0,
        lambdas=(1.0,),
        alphas=(0.0, 1.0),
        inner=("Mean", "TIES"),
        examples=4,
        coefficient_steps=2,
        snapshots=(1, 2),
    )


class Study:
    """A run: the live encoder, the tasks' vectors, and the sections that are done."""

    def __init__(self, setting: Setting, run: Path, data: Path | None, out: Path, name: str, *, is_quick: bool) -> None:
        self.setting, self.run, self.out, self.name, self.is_quick = setting, run, out, name, is_quick
        self.encoder = load_encoder(setting.backbone)
        self.loaded = {task: load_task(task, data) for task in setting.tasks}
        limits = {"validation": setting.validation, "test": setting.test}
        control = {"validation": setting.control_size, "test": setting.control_size}
        self.evaluator = Evaluator(
            self.encoder,
            list(self.loaded.values()),
            limits=limits,
            limits_of={setting.control: control},
            cache=run / "cache",
            **setting.size,
        )
        self.weights = self.encoder.weights()
        self.base = thetau.open(self.encoder.folder, name=setting.backbone)
        self.models: dict[str, Path] = {}
        for task in self.loaded.values():
            began = time.perf_counter()
            self.models[task.name] = self.tuned(task.name)
            self.say(f"model of {task.name} ({time.perf_counter() - began:.0f} s)")
        self.vectors = {name: (thetau.open(path, name=name) - self.base).named(name) for name, path in self.models.items()}
        self.done: dict[str, Any] = {}
        self._learnt: list[str] | None = None

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def tuned(self, task: str, **more: Any) -> Path:
        """A task's fine-tuned model."""
        config = FinetuneConfig.of({**self.setting.config, **more}, task)
        snapshots = self.setting.snapshots if config.paradigm == "standard" else ()
        key = Cache.key([config.content(), snapshots])[:8]
        out = self.run / "finetuned" / task / f"{config.paradigm}-{key}"
        self.evaluator.load_base()
        finetune(
            self.encoder,
            self.loaded[task],
            out,
            config,
            base=self.setting.backbone,
            snapshots=snapshots,
            heads=self.evaluator.heads,
        )
        return out

    def together(self, cluster: Sequence[str]) -> Any:
        """The vector of one model that is trained on a cluster's tasks, as many steps as they have one by one."""
        steps = len(cluster) * int(self.setting.config["steps"])
        config = FinetuneConfig.of({**self.setting.config, "paradigm": "mtl", "steps": steps}, "+".join(cluster))
        out = self.run / "finetuned" / "together" / "+".join(cluster) / Cache.key([config.content()])[:8]
        self.evaluator.load_base()
        tasks = [self.loaded[task] for task in cluster]
        finetune(self.encoder, tasks, out, config, base=self.setting.backbone, heads=self.evaluator.heads)
        return (thetau.open(out) - self.base).named("+".join(cluster))

    def vectors_of(self, inner: Inner, tasks: Sequence[str]) -> dict[str, Any]:
        """The tasks' vectors where the inner merge wants them: in the model, or learnt in its tangent space."""
        if not inner.tangent:
            return {task: self.vectors[task] for task in tasks}
        models = {task: self.tuned(task, paradigm="linear") for task in tasks}
        return {task: (thetau.open(path, name=task) - self.base).named(task) for task, path in models.items()}

    def section(self, name: str, work: Callable[[], Any], again: Sequence[str]) -> None:
        """Do a section, or take it from an earlier run, and write all that there is."""
        file = self.run / "sections" / f"{name}.json"
        if name not in again and file.is_file():
            self.done[name] = json.loads(file.read_text(encoding="utf-8"))
        else:
            began = time.perf_counter()
            self.done[name] = _plain(work())
            write_bytes(file, json.dumps(self.done[name], indent=1).encode())
            self.say(f"section {name} done in {time.perf_counter() - began:.0f} s")
        content = {
            "suite": self.name,
            "quick": self.is_quick,
            "base_hash": self.encoder.base_hash,
            "setting": _plain(replace(self.setting, backbone=Path(self.setting.backbone).name)),
            "margin": self.setting.margin,
            "available": {
                name: {split: len(task.split(split)) for split in ("validation", "test")} for name, task in self.loaded.items()
            },
            "negation_control": {
                "n": len(self.evaluator.inputs(self.setting.control, "validation")),
                "available": len(self.loaded[self.setting.control].split("validation")),
            },
            **self.done,
        }
        write_bytes(self.out, json.dumps(content, indent=1).encode() + b"\n")

    # What several sections use

    def bench(
        self,
        tasks: Sequence[str],
        inner: Inner,
        outer: Any = None,
        grid: Sequence[float] | None = None,
        evaluator: Evaluator | None = None,
    ) -> Bench:
        vectors = self.vectors_of(inner, tasks)
        needed = bool(inner.method.chain().needs)
        return Bench(
            evaluator or self.evaluator,
            self.weights,
            vectors,
            inner=inner.method,
            outer=outer,
            given=self.together if inner.joint else None,
            evidence=self.collector(inner.method, vectors) if needed else None,
            tangent=inner.tangent,
            grid=grid or self.setting.lambdas,
            run=self.run / "bench",
        )

    def collector(self, method: Any, vectors: Mapping[str, Any]) -> Collector:
        """What collects the evidence that an inner method needs."""
        few: dict[str, Any] = {"examples": self.setting.examples, **self.setting.size}
        return Collector(
            method=method,
            evaluator=self.evaluator,
            models=self.models,
            vectors=vectors,
            folder=self.run / "evidence",
            fisher=FisherConfig(**few),
            moments=MomentConfig(**few),
            coefficients=CoefficientConfig(steps=self.setting.coefficient_steps, lr=1e-2, batch=8, **few),
        )

    @property
    def inner(self) -> dict[str, Inner]:
        """The inner methods."""
        return {name: INNER[name] for name in self.setting.inner}

    @property
    def four(self) -> list[str]:
        return [task for pair in self.setting.four for task in pair]

    def natural(self) -> Clustering:
        return given_groups(self.setting.four, self.four)

    def learnt(self) -> list[str]:
        """Tasks whose own model is above the majority by the margin, on validation."""
        if self._learnt is None:
            rows = self.done["tasks"]["rows"]
            self._learnt = [row["task"] for row in rows if row["learnt"]]
        return self._learnt

    def similarity(self, tasks: Sequence[str]) -> Similarity:
        return similarities({task: self.vectors[task] for task in tasks})

    # Sections

    def tasks(self) -> Any:
        """Each task's own model, the base and the majority class."""
        rows = []
        for name, path in self.models.items():
            weights = read_weights(path)
            labels = self.evaluator.inputs(name, "validation").labels
            majority = max(Counter(labels).values()) / len(labels)
            found = {split: self.evaluator.evaluate(weights, split, [name])[name] for split in ("validation", "test")}
            before = self.evaluator.evaluate(self.weights, "test", [name])[name]
            rows.append(
                {
                    "task": name,
                    "majority": majority,
                    "pretrained": before,
                    "own": found["test"],
                    "own_validation": found["validation"],
                    "learnt": found["validation"].value >= majority + self.setting.margin,
                }
            )
        norms = self.similarity(list(self.models)).norms
        base = thetau.gram([self.base])[0, 0].sqrt()
        return {"rows": rows, "norms": norms, "ratios": {name: norm / float(base) for name, norm in norms.items()}}

    def clusters(self) -> Any:
        """The whole library, and the four tasks."""
        listed = self.learnt()
        whole = self.similarity(listed)
        found = cluster(whole)
        finer = {k: cluster(whole, k).groups for k in range(2, min(len(listed), 9))}
        four = cluster(self.similarity(self.four))
        return {
            "tasks": listed,
            "cosine": whole.cosine.tolist(),
            "found": asdict(found),
            "by_k": finer,
            "four": asdict(four),
            "four_is_natural": set(four.groups.values()) == {tuple(sorted(pair)) for pair in self.setting.four},
        }

    def steps(self) -> Any:
        """How the similarity matrix and its clusters form while the models are trained."""
        listed = self.learnt()
        whole = self.similarity(listed)
        final = cluster(whole)
        rows = []
        for step in (*self.setting.snapshots, self.setting.config["steps"]):
            vectors = {}
            for task in listed:
                path = self.models[task]
                file = path / "snapshots" / f"{step:06d}.safetensors"
                kept = (
                    {**self.weights, **load_file(file)} if step in self.setting.snapshots else None
                )  # what is not trained is not in it
                opened = thetau.open(path if kept is None else kept, name=task)
                vectors[task] = (opened - self.base).named(task)
            one = similarities(vectors)
            auto = cluster(one)
            by_k = {k: agreement(cluster(one, k).label(), cluster(whole, k).label()) for k in range(2, min(len(listed), 9))}
            rows.append(
                {
                    "step": step,
                    "cosine": one.cosine.tolist(),
                    "groups": auto.groups,
                    "agreement": agreement(auto.label(), final.label()),
                    "agreement_by_k": by_k,
                    "mean_norm": sum(one.norms.values()) / len(listed),
                }
            )
        return {"tasks": listed, "rows": rows}

    def partitions(self) -> Any:
        """All 15 partitions of four tasks; outer: the sum, λ tuned."""
        return {
            name: _study(study_partitions(self.bench(self.four, inner), all_partitions(self.four), natural=self.natural().groups))
            for name, inner in self.inner.items()
        }

    def outer(self) -> Any:
        """The same with the mean inside and other methods outside, λ tuned."""
        made = {}
        for name, inner in self.inner.items():
            if not inner.outside:
                continue
            bench = self.bench(self.four, INNER["Mean"], _at_one(inner.method))
            made[name] = _study(study_partitions(bench, all_partitions(self.four), natural=self.natural().groups))
        return made

    def savings(self) -> Any:
        """Save-One, bases and Save-All, the same method inside and outside."""
        made = {}
        for name, inner in self.inner.items():
            if not inner.outside:
                continue
            found = compare_savings(self.bench(self.four, inner, _at_one(inner.method)), self.natural().groups)
            made[name] = {
                one.name: {
                    "vectors": one.vectors,
                    "bytes": one.nbytes,
                    "absolute": one.absolute,
                    "normalised": one.normalised,
                    "coefficients": one.coefficients,
                    "accuracy": _by_task([value.addition.best.accuracy for value in one.partitions]),
                    "scales": [[value.addition.scale, _tried(value.addition)] for value in one.partitions],
                }
                for one in (found.one, found.bases, found.all)
            }
        return made

    def sizes(self) -> Any:
        """Bases against random partitions for each number of bases; the mean inside and outside, nothing tuned."""
        listed = self.learnt()
        whole = self.similarity(listed)
        few = Evaluator(
            self.encoder,
            [self.loaded[task] for task in listed],
            limits={"validation": 20, "test": self.setting.many},  # nothing is tuned here
            heads=self.evaluator.heads,
            cache=self.run / "cache",
            **self.setting.size,
        )
        bench = self.bench(listed, INNER["Mean"], methods.Average(), grid=(1.0,), evaluator=few)
        rows = []
        every = range(1, len(listed) + 1)
        auto = cluster(whole).k
        for k in [k for k in every if k <= 8 or k % 2 == 0 or k in (auto, len(listed))]:
            chosen = cluster(whole, k).groups
            drawn = [] if k in (1, len(listed)) else [random_partition(listed, k, seed).groups for seed in range(5)]
            values = [value_of_partition(bench, groups) for groups in (chosen, *drawn)]
            rows.append(
                {
                    "k": k,
                    "groups": chosen,
                    "bases": values[0].absolute,
                    "bases_normalised": values[0].normalised,
                    "random": [value.absolute for value in values[1:]],
                    "accuracy": _by_task([values[0].addition.best.accuracy]),
                    "random_accuracy": [_by_task([value.addition.best.accuracy]) for value in values[1:]],
                }
            )
            self.say(
                f"  k = {k}: bases {100 * values[0].absolute:.1f}, random {[round(100 * v.absolute, 1) for v in values[1:]]}"
            )
        return {
            "tasks": listed,
            "rows": rows,
            "eigengap": auto,
            "n": self.setting.many,
            "pretrained": average(few.evaluate(self.weights, "test", listed)),
            "individual": average(bench.individual()["test"]),
        }

    def own(self, tasks: Sequence[str]) -> dict[str, dict[str, Measure]]:
        """Split → task → accuracy of its own model."""
        weights = {task: read_weights(self.models[task]) for task in tasks}
        return {
            split: {task: self.evaluator.evaluate(weights[task], split, [task])[task] for task in tasks}
            for split in ("validation", "test")
        }

    def negation(self) -> Any:
        """Forget a task by its basis, by everything merged, and by its own vector."""
        made = {}
        for name, inner in self.inner.items():
            bench = self.bench(self.four, inner)
            rows = []
            for pair in self.setting.four:
                shared = {"basis": bench.basis(pair), "merged": bench.basis(tuple(self.four))}
                for task in pair:
                    vectors = {**shared, "own": bench.vectors[task]}
                    space, _ = outer_space(self.evaluator, self.weights, vectors, None, tangent=inner.tangent)
                    found = {
                        how: negation(space, task, self.setting.control, vector=how, grid=self.setting.alphas) for how in vectors
                    }
                    rows.append(
                        {"task": task, "control": self.setting.control} | {how: _negated(one) for how, one in found.items()}
                    )
            made[name] = rows
        return made

    def ood(self) -> Any:
        """Tasks outside the four: the most similar basis of every partition, at α = 1 and tuned."""
        made: dict[str, Any] = {}
        subsets = sorted({members for groups in all_partitions(self.four) for members in groups.values()})
        for target, near in self.setting.targets.items():
            made[target] = {"near": near, "pretrained": self.evaluator.evaluate(self.weights, "test", [target])[target]}
            for name, inner in self.inner.items():
                bench = self.bench(self.four, inner)
                bases = {"+".join(members): bench.basis(members) for members in subsets}
                cosine = _cosines(self.vectors_of(inner, [target])[target], bases)
                values = {}
                rows = []
                for groups in all_partitions(self.four):
                    among = {"+".join(members): cosine["+".join(members)] for members in groups.values()}
                    similar = TargetSimilarity(task=target, how="vector", cosines=among)
                    best = similar.ranked()[0]
                    if best not in values:
                        space, parts = outer_space(self.evaluator, self.weights, {best: bases[best]}, None, tangent=inner.tangent)
                        values[best] = basis_ood(space, similar, (best,), parts, grid=OOD_ALPHAS)
                    found = values[best]
                    rows.append(
                        {
                            "partition": partition_label(groups),
                            "basis": best,
                            "cosine": cosine[best],
                            "right": bool(set(best.split("+")) & set(near)) if near else None,
                            "one_shot": found.one_shot,
                            "alpha": found.alpha,
                            "grid": [trial.alpha for trial in found.trials],
                            "tuned": found.tuned,
                        }
                    )
                made[target][name] = rows
        return made

    def sparse(self) -> Any:
        """Localize-and-Stitch, Mask Sharing and Stitch Twice against dense task arithmetic: accuracy and storage."""
        return sparse_section(self)

    def mixed(self) -> Any:
        """Vectors of two bases, the second one trained on from the first."""
        return mixed_section(self)

    def online(self) -> Any:
        """Vectors come one by one, under budgets; how far from the offline build, and what it costs in accuracy."""
        listed = self.learnt()
        whole = self.similarity(listed)
        rows = []
        for budget in sorted({max(2, cluster(whole).k), max(2, len(listed) // 2)}):
            path = self.run / "banks" / f"online-{budget}"
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            first = listed[:budget]
            bank = build(
                path,
                [self.vectors[task] for task in first],
                self.base,
                names=first,
                clusters=given_groups([], first),
                max_bases=budget,
            )
            for task in listed[budget:]:
                bank = insert(bank, self.vectors[task], task)
            drift, _ = drift_of(bank, self.vectors)
            offline = cluster(whole, budget).groups
            bench = self.bench(listed, INNER["Mean"], methods.Average(), grid=(1.0,))
            tuned = self.bench(listed, INNER["Mean"])
            grown = {name: basis.members for name, basis in bank.bases.items()}
            rows.append(
                {
                    "budget": budget,
                    "online": value_of_partition(bench, grown).absolute,
                    "offline": value_of_partition(bench, offline).absolute,
                    "online_tuned": value_of_partition(tuned, grown).absolute,
                    "offline_tuned": value_of_partition(tuned, offline).absolute,
                    "groups": grown,
                    "drift": drift,
                    "bytes": bank.nbytes,
                    "log": [
                        {
                            key: value
                            for key, value in asdict(step).items()
                            if key in ("kind", "names", "read", "written", "seconds")
                        }
                        for step in bank.state.log
                    ],
                }
            )
        one = {name: (task,) for name, task in zip(listed, listed, strict=True)}
        return {
            "rows": rows,
            "save_all": value_of_partition(self.bench(listed, INNER["Mean"]), one).absolute,
            "save_all_untuned": value_of_partition(
                self.bench(listed, INNER["Mean"], methods.Average(), grid=(1.0,)), one
            ).absolute,
        }


def sparse_section(study: Study) -> Any:
    """Every way of keeping the learnt tasks' vectors, by largest entries; λ = 1, as the paper has it, and tuned."""
    from thetau.compression import storage

    listed = study.learnt()
    found = cluster(study.similarity(listed))
    numbers = {task: float(basis[1:]) for task, basis in found.label().items()}
    vectors = {task: study.vectors[task] for task in listed}
    rows = []
    for density in (0.05,):
        kept = storage(list(vectors.values()), density=density, clusters=PerTask(numbers), names=listed)
        ways: dict[str, Any] = {
            "localize_stitch": methods.LocalizeStitch(density=density),
            "mask_sharing": methods.LocalizeStitch(density=density, sharing="mask", clusters=PerTask(numbers)),
            "stitch_twice": methods.LocalizeStitch(density=density, sharing="twice", clusters=PerTask(numbers)),
        }
        if density == 0.05:
            ways = {"dense": methods.TaskArithmetic(scale=1 / len(listed)), **ways}
        for name, method in ways.items():
            space, parts = outer_space(study.evaluator, study.weights, vectors, method, tangent=False)
            added = bases_addition(space, listed, parts, outer=name, grid=(1.0, 3.0, 6.0), individual=study.own(listed))
            rows.append(
                {
                    "name": name,
                    "density_kept": None if name == "dense" else density,
                    "storage": asdict(kept.row(name)),
                    "one_shot": added.one_shot.absolute,
                    "tuned": added.tuned.absolute,
                    "normalised": added.tuned.normalised,
                    "lambda": added.scale,
                    "grid": _tried(added),
                    "accuracy": _by_task([added.tuned.accuracy]),
                }
            )
            study.say(f"  {name} {density:g}: {100 * added.one_shot.absolute:.1f}, tuned {100 * added.tuned.absolute:.1f}")
    return {"tasks": listed, "groups": found.groups, "rows": rows}


def mixed_section(study: Study) -> Any:
    """The second base is the first one, trained on with a higher rate on other tasks; the same tasks are then learnt from it."""
    from thetau.studies.mixing import Family, mixed_bases

    setting = study.setting
    steps = int(setting.config["steps"])
    config = FinetuneConfig.of(
        {**setting.config, "paradigm": "mtl", "steps": 2 * steps, "lr": 4 * setting.config["lr"]}, "second base"
    )
    second = study.run / "finetuned" / "second-base" / Cache.key([config.content(), setting.second])[:8]
    study.evaluator.load_base()
    others = [study.loaded[task] for task in setting.second]
    finetune(study.encoder, others, second, config, base=setting.backbone, heads=study.evaluator.heads)
    encoder = load_encoder(second)
    tasks = [study.loaded[task] for task in setting.mixed]
    limits = {"validation": setting.validation, "test": setting.test}
    evaluator = Evaluator(encoder, tasks, limits=limits, cache=study.run / "cache-second", **setting.size)
    models = {}
    for task in tasks:
        own = FinetuneConfig.of(setting.config, task.name)
        models[task.name] = study.run / "finetuned-second" / task.name / Cache.key([own.content(), encoder.base_hash])[:8]
        evaluator.load_base()
        finetune(encoder, task, models[task.name], own, base=str(second), heads=evaluator.heads)
    paths = {task: study.models[task] for task in setting.mixed}
    one = Family(
        name="first",
        evaluator=study.evaluator,
        base=study.weights,
        models={task: read_weights(path) for task, path in paths.items()},
    )
    two = Family(
        name="second",
        evaluator=evaluator,
        base=encoder.weights(),
        models={task: read_weights(path) for task, path in models.items()},
    )
    alpha = 0.3
    apart = thetau.open(second) - study.base
    norms = {"bases_apart": apart.norm(), "first": {}, "second": {}}
    for task in setting.mixed:
        norms["first"][task] = study.vectors[task].norm()
        norms["second"][task] = (thetau.open(models[task]) - thetau.open(second)).norm()
    from thetau.diagnostics import inspect

    looked = inspect(
        study.base,
        [
            thetau.open(path, name=f"{which}/{task}")
            for which, some in (("first", paths), ("second", models))
            for task, path in some.items()
        ],
        candidates=[thetau.open(second, name="second base")],
    )
    verdict = looked.candidates
    return {
        "alpha": alpha,
        "norms": norms,
        "used": mixed_bases(one, two, alpha=alpha),
        "own": mixed_bases(one, two, alpha=alpha, minus="own"),
        "verdict": verdict,
    }


def _cosines(target: Any, bases: Mapping[str, Any]) -> dict[str, float]:
    from thetau.statistics.gram import cosines

    found = cosines(thetau.gram([target, *bases.values()]))
    return dict(zip(bases, found[0, 1:].tolist(), strict=True))


def _at_one(method: Any) -> Any:
    """λ = 1: the outer λ is tuned."""
    return replace(method, scale=1.0)


def _study(study: PartitionStudy) -> Any:
    assert study.natural is not None
    return {
        "natural": study.natural.absolute,
        "natural_normalised": study.natural.normalised,
        "rank": study.rank,
        "average_k2": study.by_size[2].absolute,
        "average_all": study.overall.absolute,
        "values": [
            {
                "partition": value.label,
                "k": len(value.groups),
                "absolute": value.absolute,
                "normalised": value.normalised,
                "lambda": value.addition.scale,
                "grid": _tried(value.addition),
                "one_shot": value.addition.one_shot.absolute,
                "accuracy": {task: found.value for task, found in value.addition.best.accuracy.items()},
            }
            for value in study.values
        ],
    }


def _by_task(found: Sequence[Mapping[str, Measure]]) -> dict[str, float]:
    """Task → its accuracy, a mean over several partitions."""
    return {task: mean(one[task].value for one in found) for task in found[0]}


def _tried(added: BasesAddition) -> list[float]:
    """The common λ that were tried."""
    first = next(iter(added.parts))
    return [one.coefficients[first] / added.parts[first] for one in added.trials if len(set(one.coefficients.values())) == 1]


def _negated(found: Any) -> Any:
    return {
        "pretrained": found.pretrained_target,
        "pretrained_control": found.pretrained_control,
        "alpha": found.tuned.alpha,
        "curve": [[trial.alpha, trial.target, trial.control] for trial in found.trials],
        "target": found.tuned.target,
        "control": found.tuned.control,
        "one_shot_target": found.one_shot.target,
        "one_shot_control": found.one_shot.control,
    }


def _plain(value: Any) -> Any:
    from pydantic import TypeAdapter

    return json.loads(TypeAdapter(Any).dump_json(value))


SECTIONS = (
    "tasks",
    "clusters",
    "steps",
    "partitions",
    "outer",
    "savings",
    "sizes",
    "negation",
    "ood",
    "sparse",
    "mixed",
    "online",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SETTINGS))
    parser.add_argument("--data", type=Path, help="folder of the suite's tasks")
    parser.add_argument("--run", type=Path, default=Path("runs/bases"), help="folder of models, merges and evaluations")
    parser.add_argument("--backbone", help="folder or hub id of the base")
    parser.add_argument("--out", type=Path, help="where the results go; by default experiments/bases/SUITE.json")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of them, with commas between")
    parser.add_argument("--again", default="", help="sections to do anew, with commas between")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a few steps on shipped tasks, to see that all of it works")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    setting = SETTINGS[given.suite]
    if given.quick:
        setting = quick(setting)
    if given.backbone:
        setting = replace(setting, backbone=given.backbone)
    name = f"{given.suite}-quick" if given.quick else given.suite
    out = given.out or RESULTS / f"{name}.json"
    study = Study(setting, given.run / name, given.data, out, given.suite, is_quick=given.quick)
    for section in given.sections.split(","):
        study.section(section, getattr(study, section), given.again.split(","))


if __name__ == "__main__":
    main()
