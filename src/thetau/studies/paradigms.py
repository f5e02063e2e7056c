"""Paradigms compared on one suite: the tables of the τJp and attention-only papers, at the suite's scale.

For each seed and each row (a paradigm with its settings): fine-tune every task, add, negate with a control task, leave tasks out, and
measure what it cost. Everything is kept in the run's folder by its content; an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, final

from pydantic import TypeAdapter
from torch import Tensor

from thetau.checkpoint.disk import write_bytes
from thetau.diagnostics.interference import mean_tau_jp
from thetau.diagnostics.results import load_result
from thetau.errors import RecipeError
from thetau.evaluate.cache import Cache
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.means import average
from thetau.evaluate.measures import Measure
from thetau.evaluate.merging import build_method, merged_vector
from thetau.evaluate.spaces import Space, TangentSpace
from thetau.evaluate.tuned import difference, make_space
from thetau.finetune import FinetuneConfig, FinetuneResult, finetune
from thetau.models import load_encoder, read_weights
from thetau.studies.arithmetic import (
    ADDITION,
    NEGATION,
    Addition,
    Negation,
    OutOfDistribution,
    addition,
    negation,
    out_of_distribution,
)
from thetau.studies.memory import peak_of_training
from thetau.tasks import Task, load_task
from thetau.tasks.suite import MethodChoice, ParadigmChoice, Suite


@final
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a setting was chosen, on the validation split of one task, by the first seed: value → score."""

    field: str
    task: str
    scores: dict[str, float]
    chosen: float


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of fine-tuning: mean seconds a step over the tasks, parameters that are trained and that there are.

    `peak_gigabytes`: the most resident memory of a process of its own that trains this paradigm's first steps, the model and the data
    included; None where it was not asked. `own_process` is false in files of before, where it was that of the whole comparison by then.
    """

    seconds_a_step: float
    trained: int
    parameters: int
    peak_gigabytes: float | None
    own_process: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class TracePoint:
    """Addition at α = 1 after some steps of continued training (τJp paper, Fig. 3); test.

    `tau_jp`: the mean over ordered pairs of tasks of E‖J(x_t)τ_s‖² (Eq. 9), of the same examples; None in files of before, and for one task.
    """

    step: int
    absolute: float
    normalised: float
    accuracy: dict[str, Measure]
    tau_jp: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class ParadigmRow:
    """What one paradigm gave with one seed.

    - `space`: where its vectors are evaluated. `joint`: one model for all tasks, so that there is nothing to add.
    - `elsewhere`: the same vectors added in the other space: linear ones in the model, others in its linear form (post hoc).
    - `merged`: row of a method → the vector that it makes of all, at its λ.
    - `models`: task → folder of its model, from the run's own.
    - `others_kept`: pre-trained accuracy on the other tasks that a single vector at α = 1 keeps, a mean over ordered pairs.
    """

    name: str
    seed: int
    space: str
    config: dict[str, Any]
    tuning: tuple[Tuning, ...] = ()
    individual: dict[str, Measure] | None = None
    joint: dict[str, Measure] | None = None
    addition: Addition | None = None
    merged: dict[str, Addition] = field(default_factory=dict)
    elsewhere: Addition | None = None
    negation: tuple[Negation, ...] = ()
    left_out: tuple[OutOfDistribution, ...] = ()
    trace: tuple[TracePoint, ...] = ()
    others_kept: float | None = None
    cost: Cost | None = None
    models: dict[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class ParadigmResults:
    """The whole comparison. `pretrained`: the base on test, the control task included.

    `sizes`: task → split → examples that were evaluated; `available`: those that there are.
    """

    suite: str
    backbone: str
    base_hash: str
    tasks: tuple[str, ...]
    control: str | None
    seeds: tuple[int, ...]
    sizes: dict[str, dict[str, int]]
    pretrained: dict[str, Measure]
    rows: tuple[ParadigmRow, ...]
    quick: bool
    available: dict[str, dict[str, int]] = field(default_factory=dict)
    format: int = 1

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_bytes(path, TypeAdapter(ParadigmResults).dump_json(self, indent=1) + b"\n")

    def of(self, name: str) -> list[ParadigmRow]:
        """A row of every seed."""
        return [row for row in self.rows if row.name == name]

    def names(self) -> list[str]:
        """The rows' names, each once."""
        return list(dict.fromkeys(row.name for row in self.rows))


def load_paradigm_results(path: Path) -> ParadigmResults:
    """Read what `ParadigmResults.save` wrote. Raises `DataError`."""
    remedy = "Give the paradigms.json that `thetau suite run --paradigm` writes."
    return load_result(ParadigmResults, path, "a comparison of paradigms", remedy)


def named_models(given: Sequence[str]) -> list[str]:
    """Models as they were named, those of a row of a comparison in place of `RUN:ROW`, `RUN:ROW:SEED` or `RUN:ROW:SEED:TASK,TASK`.

    Raises:
        RecipeError: no model is named, or the comparison has no such row, seed or task.
    """
    found: list[str] = []
    for entry in given:
        run, colon, row = entry.partition(":")
        listing = Path(run) / "paradigms.json"
        if Path(entry).exists() or not colon or not listing.is_file():
            found.append(entry)
            continue
        name, _, rest = row.partition(":")
        seed, _, tasks = rest.partition(":")
        rows = [one for one in load_paradigm_results(listing).of(name) if str(one.seed) == (seed or "0") and one.models]
        if not rows:
            raise RecipeError([f"{listing}: no row {name!r} of seed {seed or 0} with models of its own."], "models")
        wanted = tasks.split(",") if tasks else list(rows[0].models)
        if unknown := [task for task in wanted if task not in rows[0].models]:
            raise RecipeError([f"{listing}, row {name!r}: no task {unknown[0]!r}. Known: {', '.join(rows[0].models)}."], "models")
        found += [str(Path(run) / rows[0].models[task]) for task in wanted]
    if not found:
        raise RecipeError(["name at least one fine-tuned model."], "models")
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def run_paradigms(
    suite: Suite,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    paradigms: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    data: Path | None = None,
    quick: bool = False,
    memory: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ParadigmResults:
    """Compare the suite's paradigms (those named, or all) in the folder `out`; writes `paradigms.json` after every row.

    - `paradigms`: names of the suite's rows, or paradigms of fine-tuning with the suite's own settings.
    - `methods`: rows of the suite, or methods, that merge each paradigm's vectors besides their sum.
    - `memory`: measure each row's peak memory in a process of its own, which takes a start of Python each; by default unless `quick`.

    Without a control task in the suite there is no negation, and the τJp penalty is on the other tasks alone.
    """
    if not suite.paradigms and not paradigms:
        raise RecipeError(
            ["the suite has no `paradigms` to compare. Name some: standard, attention, linear, …"], where=suite.name
        )
    suite = suite.with_paradigms(paradigms or [])
    if quick:
        suite = _quick(suite)
    chosen = suite.selected_paradigms(paradigms) if paradigms else suite.paradigms
    choices = suite.selected_or_named(methods)
    built = {choice.name: build_method(choice) for choice in choices}
    run = _Run(suite, out, data, quick, say, memory=not quick if memory is None else memory)
    rows: list[ParadigmRow] = []
    for seed in seeds:
        for choice in chosen:
            row = run.row(choice, seed)
            merged = (
                {} if row.joint is not None else {one.name: run.merged(choice, seed, one, built[one.name]) for one in choices}
            )
            rows.append(replace(row, merged=merged, models=run.models(choice, seed)))
            results = run.results(rows, seeds)
            results.save(out / "paradigms.json")
    return results


def _quick(suite: Suite) -> Suite:
    return replace(
        suite,
        tasks=tuple(name for name in suite.tasks if name != suite.control)[:3],
        finetune={**suite.finetune, "steps": 6, "batch_size": 8},
        limits=replace(
            suite.limits,
            validation=min(24, suite.limits.validation),
            test=min(40, suite.limits.test),
            control=min(40, suite.limits.control),
        ),
        paradigms=tuple(
            replace(
                one,
                fields={key: value for key, value in one.fields.items() if key != "steps"},
                grid={field: values[:1] for field, values in one.grid.items()},
                trace=(0, 2) if one.trace else (),
            )
            for one in suite.paradigms
        ),
    )


@final
class _Run:
    def __init__(
        self, suite: Suite, out: Path, data: Path | None, quick: bool, say: Callable[[str], None], *, memory: bool
    ) -> None:
        self.memory = memory
        self.suite, self.out, self.data, self.quick, self.say = suite, out, data, quick, say
        self.tasks = [load_task(name, data) for name in suite.tasks]
        self.control: Task | None = None
        if suite.control is not None:
            control = load_task(suite.control, data)
            self.control = next((task for task in self.tasks if task.name == control.name), control)
        self.everything = list(
            {task.name: task for task in [*self.tasks, *([] if self.control is None else [self.control])]}.values()
        )
        self.encoder = load_encoder(suite.backbone, raw=suite.features == "raw")
        limits = suite.limits
        self.evaluator = Evaluator(
            self.encoder,
            self.everything,
            limits={"validation": limits.validation, "test": limits.test},
            limits_of={} if self.control is None else {self.control.name: {"validation": limits.control, "test": limits.control}},
            max_length=limits.max_length,
            image_size=limits.image_size,
            cache=out / "cache",
        )
        self.base = self.encoder.weights()
        self.cache = Cache(folder=out / "cache")
        self.names = [task.name for task in self.tasks]
        self.tunings: dict[str, tuple[Tuning, ...]] = {}
        self.addition_grid: Sequence[float] = ADDITION[::5] if quick else ADDITION
        self.negation_grid: Sequence[float] = NEGATION[::10] if quick else NEGATION

    def results(self, rows: Sequence[ParadigmRow], seeds: Sequence[int]) -> ParadigmResults:
        everything = [task.name for task in self.everything]
        return ParadigmResults(
            suite=self.suite.name,
            backbone=self.suite.backbone,
            base_hash=self.encoder.base_hash,
            tasks=tuple(self.names),
            control=None if self.control is None else self.control.name,
            seeds=tuple(seeds),
            sizes={
                name: {split: len(self.evaluator.inputs(name, split)) for split in ("validation", "test")} for name in everything
            },
            pretrained=self.evaluator.evaluate(self.base, "test", everything),
            rows=tuple(rows),
            quick=self.quick,
            available={
                task.name: {split: len(task.split(split)) for split in ("validation", "test")} for task in self.everything
            },
        )

    # Fine-tuning

    def config(self, choice: ParadigmChoice, seed: int, **more: Any) -> FinetuneConfig:
        where = f"suite {self.suite.name}, paradigm {choice.name}"
        return FinetuneConfig.of({**self.suite.finetune, **choice.fields, **more, "seed": seed}, where)

    def tuned_config(self, choice: ParadigmChoice, seed: int) -> tuple[FinetuneConfig, tuple[Tuning, ...]]:
        """The settings of a grid, one field after another, by the first seed on the suite's `tune_on`, or its first task."""
        if choice.name in self.tunings:
            found = self.tunings[choice.name]
            return self.config(choice, seed, **{one.field: one.chosen for one in found}), found
        listed: list[Tuning] = []
        if choice.like is not None:
            other = next(one for one in self.suite.paradigms if one.name == choice.like)
            listed += self.tuned_config(other, seed)[1]
        fixed: dict[str, Any] = {one.field: one.chosen for one in listed}
        task = next((one for one in self.tasks if one.name == self.suite.tune_on), self.tasks[0])
        for setting, values in choice.grid.items():
            scores = {}
            for value in values:
                config = self.config(choice, 0, **fixed, **{setting: value})
                scores[value] = self.score(self.trained(choice, task, config), task, config)
                self.say(f"  {choice.name}: {setting} = {value:g} on {task.name}: {scores[value]:.3f}")
            best = max(values, key=lambda value: (scores[value], -value))
            fixed[setting] = best
            listed.append(
                Tuning(
                    field=setting, task=task.name, scores={f"{value:g}": score for value, score in scores.items()}, chosen=best
                )
            )
        self.tunings[choice.name] = tuple(listed)
        return self.config(choice, seed, **fixed), tuple(listed)

    def score(self, result: FinetuneResult, task: Task, config: FinetuneConfig) -> float:
        """Validation accuracy on the task; with a penalty, the mean of that and of what the other tasks keep of the base's."""
        space = self.space({task.name: result.out}, tangent=result.tangent)
        own = space.accuracy({task.name: 1.0}, task.name, "validation").value
        if not config.how.penalty:
            return own
        return (own + self.kept(space, task.name, "validation")) / 2

    def kept(self, space: Space, vector: str, split: str) -> float:
        """Measure on the other tasks with one vector added, relative to the base's, at most 1 each."""
        others = [name for name in self.names if name != vector]
        shares = []
        for name in others:
            before = space.accuracy({}, name, split).value
            shares.append(min(1.0, space.accuracy({vector: 1.0}, name, split).value / before) if before else 1.0)
        return mean(shares) if shares else 1.0

    def trained(self, choice: ParadigmChoice, task: Task, config: FinetuneConfig) -> FinetuneResult:
        """One task's model; the first task of an incremental order is kept from the control task alone."""
        against = self.against(task, config)
        start = None if choice.start is None else self.start_of(choice, task, config.seed)
        parts = [
            config.content(),
            [one.name for one in against],
            str(start),
            choice.trace,
            *(["raw"] if self.encoder.raw else []),
        ]
        key = Cache.key(parts)[:8]
        out = self.out / "finetuned" / task.name / f"{config.paradigm}-{key}"
        self.evaluator.load_base()
        result = finetune(
            self.encoder,
            task,
            out,
            config,
            base=self.suite.backbone,
            against=against,
            start=start,
            snapshots=choice.trace,
            heads=self.evaluator.heads,
        )
        if not result.cached:
            self.say(
                f"  {choice.name}, {task.name}, seed {config.seed}: loss {result.first_loss:.2f} → {result.last_loss:.2f}, {result.seconds:.0f} s"
            )
        return result

    def against(self, task: Task, config: FinetuneConfig) -> list[Task]:
        """The tasks of the penalty: the control first, which in an incremental order every other is kept from; so it is learnt last itself."""
        if not config.how.penalty:
            return []
        first = [] if self.control is None else [self.control]
        others = [one for one in self.tasks if one not in first]
        if config.penalty == "incremental":
            return [*others, *first] if task in first else [*first, *others]
        return [one for one in (*first, *others) if one.name != task.name]

    def models(self, choice: ParadigmChoice, seed: int) -> dict[str, str]:
        """Where a row's models lie in the run's folder; none for a joint one."""
        config, _ = self.tuned_config(choice, seed)
        if config.how.joint:
            return {}
        return {task.name: str(self.trained(choice, task, config).out.relative_to(self.out)) for task in self.tasks}

    def joint(self, config: FinetuneConfig) -> FinetuneResult:
        """All tasks in one model, with as many steps as the individuals together."""
        config = replace(config, steps=config.steps * len(self.tasks))
        key = Cache.key([config.content(), self.names, *(["raw"] if self.encoder.raw else [])])[:8]
        self.evaluator.load_base()
        return finetune(
            self.encoder,
            self.tasks,
            self.out / "finetuned" / "joint" / f"{config.paradigm}-{key}",
            config,
            base=self.suite.backbone,
            heads=self.evaluator.heads,
        )

    # Evaluation

    def space(self, models: Mapping[str, Path], *, tangent: bool) -> Space:
        return self.space_of(
            {name: read_weights(path, base=self.encoder.folder) for name, path in models.items()}, tangent=tangent
        )

    def space_of(self, weights: Mapping[str, Mapping[str, Tensor]], *, tangent: bool) -> Space:
        return self.space_from({name: difference(model, self.base) for name, model in weights.items()}, tangent=tangent)

    def space_from(self, vectors: Mapping[str, Mapping[str, Tensor]], *, tangent: bool) -> Space:
        return make_space(self.evaluator, self.base, vectors, tangent=tangent, cache=self.out / "cache")

    def parts(self, choice: ParadigmChoice, seed: int) -> list[Any]:
        """All that a row depends on."""
        return [
            choice.name,
            seed,
            asdict(choice),
            self.suite.finetune,
            self.names,
            self.suite.control,
            asdict(self.suite.limits),
            self.quick,
            *(["raw"] if self.encoder.raw else []),
        ]

    def merged(self, choice: ParadigmChoice, seed: int, method: MethodChoice, built: Any) -> Addition:
        """A paradigm's vectors by a method, its λ chosen on validation as α is."""
        parts = [self.parts(choice, seed), asdict(method), repr(built)]
        found = self.cache.get(Addition, parts)
        if found is None:
            config, _ = self.tuned_config(choice, seed)
            models = {task.name: self.trained(choice, task, config).out for task in self.tasks}
            own = self.space(models, tangent=config.how.linear)
            individual = {
                split: {name: own.accuracy({name: 1.0}, name, split) for name in self.names} for split in ("validation", "test")
            }
            vector = merged_vector(self.encoder.folder, list(models.values()), list(models), built)
            space = self.space_from({"merged": vector}, tangent=config.how.linear)
            grid = (*method.scales, *([] if 1.0 in method.scales else [1.0]))
            found = addition(space, self.names, grid=grid, vectors={"merged": 1.0}, individual=individual)
            self.cache.put(found, parts)
        tuned = found.tuned
        self.say(
            f"  {choice.name}, {method.name}: {100 * tuned.absolute:.1f} ({100 * tuned.normalised:.1f}) at λ = {tuned.alpha:g}"
        )
        return found

    def row(self, choice: ParadigmChoice, seed: int) -> ParadigmRow:
        parts = self.parts(choice, seed)
        row = self.cache.get(ParadigmRow, parts)
        if row is None:
            self.say(f"{choice.name}, seed {seed}")
            row = self.row_anew(choice, seed)
            self.cache.put(row, parts)
        self.say(_line(row))
        return row

    def row_anew(self, choice: ParadigmChoice, seed: int) -> ParadigmRow:
        config, tuning = self.tuned_config(choice, seed)
        tangent = config.how.linear
        facts: dict[str, Any] = {
            "name": choice.name,
            "seed": seed,
            "space": "tangent" if tangent else "weights",
            "config": config.content(),
        }
        facts["tuning"] = tuning
        if config.how.joint:
            result = self.joint(config)
            space = self.space({"joint": result.out}, tangent=tangent)
            found = {name: space.accuracy({"joint": 1.0}, name, "test") for name in self.names}
            return ParadigmRow(**facts, joint=found, cost=self.cost([result], config, self.tasks))
        results = {task.name: self.trained(choice, task, config) for task in self.tasks}
        space = self.space({name: result.out for name, result in results.items()}, tangent=tangent)
        added = addition(space, self.names, grid=self.addition_grid)
        facts |= {
            "addition": added,
            "individual": added.individual,
            "cost": self.cost(list(results.values()), config, self.tasks[:1], choice),
        }
        facts["others_kept"] = mean(self.kept(space, name, "test") for name in self.names)
        if choice.negate and self.control is not None:
            control = self.control.name
            others = [name for name in self.names if name != control]
            facts["negation"] = tuple(negation(space, name, control, grid=self.negation_grid) for name in others)
        if choice.leave_out:
            facts["left_out"] = out_of_distribution(space, self.names, grid=self.addition_grid)
        if choice.elsewhere:
            other = self.space({name: result.out for name, result in results.items()}, tangent=not tangent)
            facts["elsewhere"] = addition(other, self.names, grid=self.addition_grid)
        if choice.trace:
            facts["trace"] = tuple(self.trace_point(step, results, added) for step in choice.trace)
        return ParadigmRow(**facts)

    def trace_point(self, step: int, results: Mapping[str, FinetuneResult], added: Addition) -> TracePoint:
        """Add the vectors as they were after `step` steps."""
        from safetensors.torch import load_file

        from thetau.evaluate.means import normalised

        weights = {
            name: {**self.base, **load_file(result.out / "snapshots" / f"{step:06d}.safetensors")}
            for name, result in results.items()
        }
        vectors = {name: self.encoder.parameters(difference(model, self.base)) for name, model in weights.items()}
        space = TangentSpace(self.evaluator, vectors, self.out / "cache")
        found = {name: space.accuracy(dict.fromkeys(self.names, 1.0), name, "test") for name in self.names}
        own = {name: space.accuracy({name: 1.0}, name, "test") for name in self.names}
        interference = mean_tau_jp(space, self.names, "test") if len(self.names) > 1 else None
        return TracePoint(
            step=step, absolute=average(found), normalised=normalised(found, own), accuracy=found, tau_jp=interference
        )

    def cost(
        self,
        results: Sequence[FinetuneResult],
        config: FinetuneConfig,
        tasks: Sequence[Task],
        choice: ParadigmChoice | None = None,
    ) -> Cost:
        """What training `tasks` by this config costs; `choice` is the row of single tasks."""
        names = [json.loads((result.out / "thetau_finetune.json").read_text())["trained"] for result in results]
        sizes = {name: parameter.numel() for name, parameter in self.encoder.module.named_parameters()}
        steps = config.steps * (len(self.tasks) if config.how.joint else 1)
        peak = self.peak(config, tasks, choice) if self.memory else None
        return Cost(
            seconds_a_step=mean(result.seconds / steps for result in results),
            trained=sum(sizes.get(name, 0) for name in names[0]),
            parameters=sum(sizes.values()),
            peak_gigabytes=None if peak is None else round(peak, 3),
            own_process=peak is not None,
        )

    def peak(self, config: FinetuneConfig, tasks: Sequence[Task], choice: ParadigmChoice | None) -> float:
        """GB that a process of its own needs for this."""
        words = dict(zip([task.name for task in self.tasks], self.suite.tasks, strict=True))
        words |= {} if self.control is None else {self.control.name: self.suite.control or ""}
        chosen = self.tasks[-1:] if config.how.penalty else tasks  # the last one has others before it in any order
        return peak_of_training(
            self.suite.backbone,
            [words[task.name] for task in chosen],
            config,
            against=[words[task.name] for task in self.against(chosen[0], config)],
            start=None if choice is None or choice.start is None else self.start_of(choice, chosen[0], config.seed),
            data=self.data,
            raw=self.encoder.raw,
        )

    def start_of(self, choice: ParadigmChoice, task: Task, seed: int) -> Path:
        """The model whose vector this row trains further."""
        other = next(one for one in self.suite.paradigms if one.name == choice.start)
        return self.trained(other, task, self.tuned_config(other, seed)[0]).out


def _line(row: ParadigmRow) -> str:
    if row.joint is not None:
        return f"{row.name}, seed {row.seed}: joint {100 * average(row.joint):.1f}"
    assert row.addition is not None and row.individual is not None
    one, tuned = row.addition.one_shot, row.addition.tuned
    return (
        f"{row.name}, seed {row.seed}: individual {100 * average(row.individual):.1f}, one-shot {100 * one.absolute:.1f} "
        f"({100 * one.normalised:.1f}), tuned {100 * tuned.absolute:.1f} ({100 * tuned.normalised:.1f}) at α = {tuned.alpha:g}"
    )
