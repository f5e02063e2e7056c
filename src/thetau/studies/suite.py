"""The run of a suite: fine-tune every task, merge with every method, choose λ on validation, report on test.

Fine-tuned models, accuracies and finished rows are kept in the run's folder by their content, so that an interrupted run goes
on where it was and an unchanged one does nothing again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from thetau._version import __version__
from thetau.checkpoint.disk import write_json, write_text
from thetau.errors import OutputError, RecipeError
from thetau.evaluate.cache import Cache
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Loss, Measure
from thetau.evaluate.merging import at_scale, build_method, merge_out, merged_vector
from thetau.evaluate.search import ScaleTrial, choose_scale
from thetau.evidence import MixtureConfig, learn_mixture
from thetau.evidence.wemoe import read_mixture
from thetau.facade import open as open_weights
from thetau.facade import outputs
from thetau.finetune import FinetuneConfig, FinetuneResult, finetune
from thetau.finetune.progress import Bar, bar
from thetau.models import load_encoder, read_weights
from thetau.models.mixture import mixing
from thetau.studies.memory import cost_of_merge
from thetau.studies.suite_results import Row, SuiteResults, TaskFacts
from thetau.studies.tables import markdown_table
from thetau.tasks import Task, load_task
from thetau.tasks.suite import MethodChoice, Suite

PLAN = "plan.json"  # what a run is to hold, so that one that ended early can say what is missing

# Work in units of one token forward. A training token costs about three; a step and a merge cost as much as these many tokens.
_TRAINING_TOKEN, _STEP, _MERGE = 3, 350, 30_000


def quick_form(suite: Suite) -> Suite:
    """A small run of the same suite, to see that all of it works: few steps, few examples, at most two λ."""
    return replace(
        suite,
        finetune={**suite.finetune, "steps": 20, "batch_size": 8},
        finetune_of={
            task: {k: v for k, v in own.items() if k not in ("steps", "batch_size")} for task, own in suite.finetune_of.items()
        },
        limits=replace(suite.limits, validation=min(40, suite.limits.validation), test=min(80, suite.limits.test)),
        methods=tuple(_quick(choice) for choice in suite.methods),
    )


def _quick(choice: MethodChoice) -> MethodChoice:
    """A row of at most two λ, or of few steps."""
    few = None if choice.wemoe is None else {**choice.wemoe, "steps": 20}
    return replace(choice, scales=choice.scales[::3][:2], wemoe=few)


def plan_of(suite: Suite, *, quick: bool = False) -> dict[str, Any]:
    """What a run of a suite is going to make: its tasks and the rows of its methods."""
    return {
        "suite": suite.name,
        "backbone": suite.backbone,
        "tasks": list(suite.tasks),
        "methods": [choice.name for choice in suite.methods],
        "quick": quick,
    }


def run_suite(
    suite: Suite,
    out: Path,
    *,
    data: Path | None = None,
    methods: Sequence[str] | None = None,
    quick: bool = False,
    memory: bool = False,
    console: Any = None,
) -> SuiteResults:
    """Run a suite in the folder `out` and write `results.json`, `results.md` and `results.png` there.

    `methods` picks rows by name; with `memory` each merge is made in a process of its own as well, which says its seconds and peak
    memory; `console` is rich's, stderr by default. All that can be wrong with the suite, its tasks,
    configs and methods is found before any work begins. Raises `ThetauError`.
    """
    start = time.perf_counter()
    if methods:
        suite = replace(suite, methods=suite.selected(methods))
    if quick:
        suite = quick_form(suite)
    configs = {
        task: FinetuneConfig.of({**suite.finetune, **suite.finetune_of.get(task, {})}, f"suite {suite.name}, task {task}")
        for task in suite.tasks
    }
    if suite.joint:
        joint_config(configs, suite.name)
    built = {choice.name: build_method(choice) for choice in suite.methods}
    for choice in suite.methods:
        _mixture_config(suite, choice)
    tasks = [load_task(name, data) for name in suite.tasks]
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: the run's folder is a file. Choose another one.")
    run = _Run(suite, out, tasks, memory=memory)
    write_json(out / PLAN, plan_of(suite, quick=quick))
    with bar("preparing", run.units(configs), "", console) as progress:
        run.bar = progress
        tuned = run.finetune(configs)
        references = run.references(tuned)
        rows = [run.merge(choice, built[choice.name], tuned) for choice in suite.methods]
        progress.finish("done")
    results = SuiteResults(
        suite=suite.name,
        description=suite.description,
        backbone=suite.backbone,
        base_hash=run.evaluator.encoder.base_hash,
        tasks=tuple(run.facts(task, configs[task.name], tuned[task.name]) for task in tasks),
        rows=(*references, *rows),
        limits=asdict(suite.limits),
        quick=quick,
        versions=_versions(),
        seconds=round(time.perf_counter() - start, 1),
    )
    results.save(out / "results.json")
    write_text(out / "results.md", markdown_table(results))
    return results


def joint_config(configs: Mapping[str, FinetuneConfig], suite: str) -> FinetuneConfig:
    """Of one model for all tasks, in the paradigm of the first one's own. Raises `RecipeError`: a paradigm that joint training has no form of."""
    first = next(iter(configs.values()))
    paradigm = "mtl" if first.paradigm == "standard" else f"mtl+{first.paradigm}"
    try:
        return replace(first, paradigm=paradigm, steps=sum(one.steps for one in configs.values()))
    except ValueError as error:
        raise RecipeError([f"`joint`: {error}"], f"suite {suite}") from error


@final
class _Run:
    """The state of one run: the live encoder, the base's weights, the caches, the bar."""

    def __init__(self, suite: Suite, out: Path, tasks: Sequence[Task], *, memory: bool = False) -> None:
        self.memory = memory
        limits = suite.limits
        self.suite, self.out, self.tasks = suite, out, list(tasks)
        self.bar: Bar | None = None
        encoder = load_encoder(suite.backbone, raw=suite.features == "raw")
        self.evaluator = Evaluator(
            encoder,
            tasks,
            limits={"validation": limits.validation, "test": limits.test},
            max_length=limits.max_length,
            image_size=limits.image_size,
            cache=out / "cache",
            on_tokens=self.advance,
        )
        self.base: dict[str, Tensor] = encoder.weights()
        self.cache = Cache(folder=out / "cache")
        self.sizes = {split: sum(self.evaluator.size(task.name, split) for task in tasks) for split in ("validation", "test")}
        self.individual: dict[str, dict[str, Measure]] = {"validation": {}, "test": {}}

    def units(self, configs: dict[str, FinetuneConfig]) -> float:
        """All the work of the run, for the bar."""
        training = sum(self.finetune_units(task, configs[task.name]) for task in self.tasks)
        merging = sum(self.merge_units(choice) for choice in self.suite.methods)
        return training + self.sizes["validation"] + 2 * self.sizes["test"] + merging

    def finetune_units(self, task: Task, config: FinetuneConfig) -> float:
        """The work of fine-tuning on one task; its test split tells the length of its examples."""
        tokens = self.evaluator.inputs(task.name, "test")
        return config.steps * (config.batch_size * sum(tokens.lengths) / len(tokens) * _TRAINING_TOKEN + _STEP)

    def merge_units(self, choice: MethodChoice) -> int:
        """The work of one row."""
        return _MERGE + len(choice.scales) * self.sizes["validation"] + self.sizes["test"]

    def advance(self, units: int | float, text: str | None = None) -> None:
        """Move the bar, once there is one."""
        if self.bar is not None:
            self.bar.advance(units, text)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.say(line)

    def finetune(self, configs: dict[str, FinetuneConfig]) -> dict[str, FinetuneResult]:
        """Every task's fine-tuned model, in a folder of its own whose name follows its settings, so that other settings find
        room.
        """
        results = {}
        self.configs = configs
        for task in self.tasks:
            config = configs[task.name]
            share = self.finetune_units(task, config) / config.steps
            text = f"fine-tune {task.name}"
            self.advance(0, text)
            result = finetune(
                self.evaluator.encoder,
                task,
                self.out / "finetuned" / task.name / _settings_key(config),
                config,
                base=self.suite.backbone,
                heads=self.evaluator.heads,
                tick=partial(self.trained, share, text),
            )
            if result.cached:
                self.advance(share * config.steps)
            how = "kept from before" if result.cached else f"{result.seconds:.0f} s"
            self.say(f"fine-tuned {task.name}: loss {result.first_loss:.2f} → {result.last_loss:.2f} ({how})")
            results[task.name] = result
        return results

    def trained(self, share: float, text: str, step: int, loss: float) -> None:
        """One step of fine-tuning."""
        self.advance(share, f"{text}, loss {loss:.2f}")

    def references(self, tuned: dict[str, FinetuneResult]) -> list[Row]:
        """The base and the individual models, on test; the individuals on validation too, as the search for λ needs them."""
        self.advance(0, "evaluate the pre-trained model")
        pretrained = self.evaluator.evaluate(self.base, "test", origin=self.suite.backbone)
        losses: dict[str, Loss] = {}
        for task in self.tasks:
            self.advance(0, f"evaluate the model of {task.name}")
            out = tuned[task.name].out
            weights = read_weights(out, base=self.evaluator.encoder.folder)
            losses |= self.evaluator.losses(weights, "test", [task.name], origin=str(out))
            for split, found in self.individual.items():
                found |= self.evaluator.evaluate(weights, split, [task.name], origin=str(out))
        rows = [
            self.row(
                "pre-trained", "pretrained", pretrained, loss=self.evaluator.losses(self.base, "test", origin=self.suite.backbone)
            ),
            self.row("individual", "individual", self.individual["test"], loss=losses),
        ]
        return [*rows, *([self.joint()] if self.suite.joint else [])]

    def joint(self) -> Row:
        """One model for all tasks, trained on them together for as many steps as they have one by one."""
        config = joint_config(self.configs, self.suite.name)
        self.advance(0, "train on all tasks jointly")
        self.evaluator.load_base()
        folder = self.out / "finetuned" / "joint" / _settings_key(config)
        made = finetune(self.evaluator.encoder, self.tasks, folder, config, base=self.suite.backbone, heads=self.evaluator.heads)
        self.say(f"trained jointly: loss {made.first_loss:.2f} → {made.last_loss:.2f}")
        weights = read_weights(made.out, base=self.evaluator.encoder.folder)
        found = self.evaluator.evaluate(weights, "test", origin=str(made.out))
        return self.row("joint training", "joint", found, loss=self.evaluator.losses(weights, "test", origin=str(made.out)))

    def row(
        self,
        name: str,
        role: Literal["pretrained", "individual", "joint", "each", "merged"],
        accuracy: dict[str, Measure],
        **more: Any,
    ) -> Row:
        """A row with its averages."""
        share = normalised(accuracy, self.individual["test"])
        return Row(name=name, role=role, accuracy=accuracy, absolute=average(accuracy), normalised=share, **more)

    def merge(self, choice: MethodChoice, method: Any, tuned: dict[str, FinetuneResult]) -> Row:
        """Merge once at λ = 1, choose λ on validation, measure on test; or the same from an earlier run."""
        parts = self.row_parts(choice, method, tuned)
        row = self.cache.get(Row, parts)
        if row is not None:
            self.advance(self.merge_units(choice))
        else:
            row = self.merge_anew(choice, method, tuned)
            self.cache.put(row, parts)
        self.say(f"{choice.name}: average {100 * row.absolute:.1f}, normalised {100 * row.normalised:.1f}")
        return row

    def merge_anew(self, choice: MethodChoice, method: Any, tuned: dict[str, FinetuneResult]) -> Row:
        """The work of `merge`."""
        self.advance(0, f"merge with {choice.name}")
        names = [task.name for task in self.tasks]
        if choice.each:
            return self.each(choice, method, tuned)
        if choice.wemoe is not None:
            return self.mixed(choice, method, tuned)
        start = time.perf_counter()
        vector = merged_vector(self.evaluator.encoder.folder, [tuned[name].out for name in names], names, method)
        seconds = round(time.perf_counter() - start, 2)
        self.advance(_MERGE)

        def evaluate(split: str, scale: float) -> dict[str, Measure]:
            self.advance(0, f"{choice.name}, λ = {scale:g}, {split}")
            return self.evaluator.evaluate(at_scale(self.base, vector, scale), split, origin=f"{choice.name}, λ = {scale:g}")

        peak = None
        if self.memory:
            models = {name: tuned[name].out for name in names}
            seconds, peak = cost_of_merge(self.evaluator.encoder.folder, models, choice.method, choice.fields)
        scale, at_end = 1.0, False
        trials: tuple[ScaleTrial, ...] = ()
        if choice.scales:
            search = choose_scale(choice.scales, lambda value: evaluate("validation", value), self.individual["validation"])
            scale, trials, at_end = search.scale, search.trials, search.at_end
        return self.row(
            choice.name,
            "merged",
            evaluate("test", scale),
            method=repr(method),
            scale=scale,
            trials=trials,
            at_end=at_end,
            merge_seconds=seconds,
            peak_gigabytes=peak,
            loss=self.evaluator.losses(at_scale(self.base, vector, scale), "test", origin=f"{choice.name}, λ = {scale:g}"),
        )

    def each(self, choice: MethodChoice, method: Any, tuned: dict[str, FinetuneResult]) -> Row:
        """What a method makes for each task, on it: a model of its own (EMR, TALL, Twin), or its vector after the transforms (AWD, Tables 6 and 7)."""
        start = open_weights(self.evaluator.encoder.folder)
        names = [task.name for task in self.tasks]
        vectors = outputs([open_weights(tuned[name].out, base=start) - start for name in names], method, names=names)
        found: dict[str, Measure] = {}
        losses: dict[str, Loss] = {}
        for name, vector in ((name, vectors[name]) for name in names):
            weights = at_scale(self.base, vector.state_dict(), 1.0)
            found |= self.evaluator.evaluate(weights, "test", [name], origin=f"{choice.name}, {name}")
            losses |= self.evaluator.losses(weights, "test", [name], origin=f"{choice.name}, {name}")
        return self.row(choice.name, "each", found, method=repr(method), loss=losses)

    def mixed(self, choice: MethodChoice, method: Any, tuned: dict[str, FinetuneResult]) -> Row:
        """The merge with MLPs mixed by input: routers learned on validation, without its labels."""
        start = open_weights(self.evaluator.encoder.folder)
        names = [task.name for task in self.tasks]
        vectors = {name: open_weights(tuned[name].out, base=start) - start for name in names}
        weights = at_scale(self.base, merge_out(vectors, method).state_dict(), 1.0)
        config = _mixture_config(self.suite, choice)
        self.evaluator.load_base()
        key = Cache.key(self.row_parts(choice, method, tuned))[:8]  # so that models with other settings find room, too
        made = learn_mixture(
            self.evaluator.encoder,
            self.evaluator.tasks,
            vectors,
            weights,
            self.out / "wemoe" / f"{key}.safetensors",
            config,
            heads=self.evaluator.heads,
            origin=choice.name,
        )
        for note in made.notes:
            self.say(f"{choice.name}: {note}")
        mixture = read_mixture(made.path, weights, self.evaluator.encoder.base_hash)
        with mixing(self.evaluator.encoder, mixture, self.base) as (encoder, _), self.evaluator.through(encoder):
            found = self.evaluator.evaluate(weights, "test", origin=choice.name)
            losses = self.evaluator.losses(weights, "test", origin=choice.name)
        return self.row(choice.name, "merged", found, method=f"{method!r} with {config!r}", loss=losses)

    def row_parts(self, choice: MethodChoice, method: Any, tuned: dict[str, FinetuneResult]) -> list[Any]:
        """All that a row depends on."""
        splits = [self.evaluator.inputs(task.name, split).hash for task in self.tasks for split in ("validation", "test")]
        heads = [self.evaluator.heads[task.name].hash() for task in self.tasks]
        models = {task.name: tuned[task.name].weights_hash for task in self.tasks}
        return [
            __version__,
            choice.name,
            repr(method),
            choice.scales,
            choice.each,
            *([] if choice.wemoe is None else [asdict(_mixture_config(self.suite, choice))]),
            self.memory,
            self.evaluator.encoder.base_hash,
            models,
            splits,
            heads,
        ]

    def facts(self, task: Task, config: FinetuneConfig, tuned: FinetuneResult) -> TaskFacts:
        """What the results say about a task."""
        test = self.evaluator.inputs(task.name, "test")
        return TaskFacts(
            name=task.name,
            kind=task.kind,
            labels=task.labels,
            licence=task.licence,
            source=task.source,
            train=tuned.examples,
            validation=len(self.evaluator.inputs(task.name, "validation")),
            test=len(test),
            truncated_test=test.truncated,
            config=asdict(config),
            finetune_key=tuned.key,
            finetune_seconds=tuned.seconds,
            first_loss=tuned.first_loss,
            last_loss=tuned.last_loss,
        )


def _mixture_config(suite: Suite, choice: MethodChoice) -> MixtureConfig:
    """How a row's routers are learned: inputs as the suite's limits have them. Raises `RecipeError`."""
    limits = suite.limits
    inputs = {"examples": limits.validation, "max_length": limits.max_length, "image_size": limits.image_size}
    return MixtureConfig.of({**inputs, **(choice.wemoe or {})}, f"suite {suite.name}, method {choice.name!r}, wemoe")


def _settings_key(config: FinetuneConfig) -> str:
    return hashlib.blake2b(json.dumps(asdict(config), sort_keys=True).encode(), digest_size=4).hexdigest()


def _versions() -> dict[str, str]:
    import transformers

    return {
        "thetau": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
