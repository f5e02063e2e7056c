"""A search: trials of a recipe's method on validation, until there are as many as were asked for."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.context import SpawnProcess as Process
from pathlib import Path
from typing import Any, final

import optuna
import torch
import yaml
from optuna.trial import TrialState
from torch import Tensor

from thetau.checkpoint.disk import write_text
from thetau.checkpoint.remote import is_url
from thetau.engine.executor import Engine
from thetau.errors import DataError, RecipeError, ThetauError
from thetau.evaluate.means import average, normalised
from thetau.evaluate.measures import Loss, Measure, perplexities
from thetau.evaluate.options import Reading
from thetau.evaluate.spaces import Reader
from thetau.evidence.jobs import threads_each
from thetau.facade import complete
from thetau.facade import open as open_weights
from thetau.methods import plain
from thetau.pace import steps
from thetau.recipes import Recipe
from thetau.studies.options import Search
from thetau.studies.searching.halving import Ladder, goes_on, ladder_of
from thetau.studies.searching.mixing import Mixer, Mixture, open_mixture
from thetau.studies.searching.objectives import Objective, objectives_of
from thetau.studies.searching.results import (
    OBJECTIVES,
    RUNG,
    SECONDS,
    Searched,
    SearchFigures,
    best_of,
    plain_measures,
    read_trial,
)
from thetau.studies.searching.samplers import FAULT, check_sampler
from thetau.studies.searching.space import SearchSpace, read_space
from thetau.studies.searching.trials import Trials, values_of

Say = Callable[[str], None]


def _quiet(line: str) -> None:
    """Say nothing."""


def search(
    recipe: Recipe,
    options: Search,
    *,
    reading: Reading | None = None,
    say: Say = _quiet,
) -> Searched:
    """Search a recipe's fields on the validation split. The test split is read only where `options.test` asks for the figures at the end.

    With a storage, trials that are there count, and other processes may be at work on it. A trial that fails is recorded, and the search goes on.

    Raises:
        RecipeError: the space, the objectives or the sampler do not fit the recipe; all that is wrong with the space together.
        DataError: the models cannot be measured; no trial was completed.
        OutputError: the storage holds the trials of another search, or cannot be written.
    """
    read = reading or Reading()
    if options.jobs > 1 and options.storage is None:
        raise RecipeError(
            ["several jobs share their trials in a file: give one with --storage, or a folder with --out."], "--jobs"
        )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(min(threads, threads_each(options.jobs)))
        hunt = Hunt.of(recipe, options, read)
        with hunt.trials, _helpers(recipe, options, read, say):
            hunt.work(say)
    finally:
        torch.set_num_threads(threads)
    return hunt.found()


@contextmanager
def _helpers(recipe: Recipe, options: Search, reading: Reading, say: Say) -> Iterator[None]:
    """The other processes, which are waited for at the end, or ended where this one fails."""
    helpers = [Process(target=_help, args=(recipe, options, reading)) for _ in range(options.jobs - 1)]
    for helper in helpers:
        helper.start()
    try:
        yield
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        for helper in helpers:
            helper.join()
    lost = sum(helper.exitcode != 0 for helper in helpers)
    if lost:
        say(f"warning: {lost} of {options.jobs} processes ended early; the others did their trials.")


def _help(recipe: Recipe, options: Search, reading: Reading) -> None:
    """What another process does; the first one says what may be wrong."""
    try:
        torch.set_num_threads(threads_each(options.jobs))
        hunt = Hunt.of(recipe, options, reading)
        with hunt.trials:
            hunt.work(_quiet)
    except (ThetauError, KeyboardInterrupt):
        sys.exit(1)


def _content(recipe: Recipe, mixture: Mixture) -> dict[str, Any]:
    """A recipe by what its files hold, wherever they lie."""
    said = complete(recipe) | {"models": dict(mixture.hashes), "base": mixture.session.encoder.base_hash}
    if recipe.evidence:
        said["evidence"] = {
            kind: {task: open_weights(path).terms[0][1].fingerprint() for task, path in given.items()}
            for kind, given in recipe.evidence.items()
        }
    return said


@final
@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a trial's model gave so far, by task: the examples that were read, what the head reads of them, and the figures on them."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    read: dict[str, list[Tensor]] = field(default_factory=dict)
    values: dict[str, Measure] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)

    def note(self, task: str, value: Measure, loss: Loss | None) -> None:
        """Keep a task's figures."""
        self.values[task] = value
        if loss is not None:
            self.losses[task] = loss


@final
@dataclass(frozen=True, kw_only=True)
class Hunt:
    """All that a process needs for its trials."""

    mixture: Mixture
    options: Search
    space: SearchSpace
    objectives: tuple[Objective, ...]
    ladder: Ladder
    own: Mapping[str, Measure]
    trials: Trials

    @classmethod
    def of(cls, recipe: Recipe, options: Search, reading: Reading) -> Hunt:
        """Everything is checked before the first trial."""
        mixture = open_mixture(recipe, options.task, reading, options.validation)
        session = mixture.session
        space = read_space(options.space, mixture.method, mixture.identities, mixture.tensors)
        lower = [name for name, task in session.evaluator.tasks.items() if task.metric == "perplexity"]
        objectives = objectives_of(options.objective, mixture.tasks, session.tasks, lower)
        check_sampler(options.sampler, space.dimensions, len(objectives))
        if mixture.causal and any(one.name == "loss" for one in objectives):
            for task, split in product(mixture.tasks, ("validation", "test") if options.test else ("validation",)):
                session.evaluator.check_loss(task, split)
        named = [one.name for one in objectives if one.of_task]
        order = dict.fromkeys([*named, *mixture.tasks, *session.tasks])
        counts = {task: len(session.evaluator.inputs(task, "validation")) for task in order}
        ladder = ladder_of(counts, options.halving, options.rungs, options.factor, options.seed)
        facts = {
            "the recipe": _content(recipe, mixture),
            "the space": [str(one) for one in space.dimensions],
            "the objectives": [one.name for one in objectives],
            "the data": {task: session.evaluator.inputs(task, "validation").hash for task in sorted(order)},
            "the halving": [dict(one) for one in ladder.rungs],
        }
        trials = Trials(options.storage, space, objectives, facts, sampler=options.sampler, seed=options.seed)
        own = {task: mixture.single.accuracy({task: 1.0}, task, "validation") for task in mixture.tasks}
        return cls(mixture=mixture, options=options, space=space, objectives=objectives, ladder=ladder, own=own, trials=trials)

    def work(self, say: Say) -> None:
        """Trial after trial, until there are enough."""
        engine = Engine(workers=threads_each(self.options.jobs))
        mixer = Mixer(self.mixture, engine, say)
        with steps("trial", self.options.trials) as step:
            while (trial := self.trials.ask(self.options.trials)) is not None:
                step(", ".join(f"{name} {value}" for name, value in values_of(trial).items()))
                self._try(trial, mixer, say)

    def _try(self, trial: optuna.Trial, mixer: Mixer, say: Say) -> None:
        """One trial, which ends as complete, pruned or failed, whatever happens in it."""
        began = time.monotonic()
        try:
            told = self._measured(trial, mixer.made(self.space.method_of(values_of(trial))))
        except Exception as error:  # a method of anyone's may fail in any way; the search goes on
            reason = " ".join(str(error).split()) or type(error).__name__
            self.trials.note(trial, {FAULT: reason[:2000], SECONDS: time.monotonic() - began})
            self.trials.tell(trial, TrialState.FAIL)
            say(f"trial {trial.number}: failed: {reason[:200]}")
            return
        self.trials.note(trial, {SECONDS: time.monotonic() - began})
        if told is None:
            self.trials.tell(trial, TrialState.PRUNED)
            say(f"trial {trial.number}: pruned")
            return
        self.trials.tell(trial, TrialState.COMPLETE, list(told.values()))
        say(f"trial {trial.number}: {', '.join(f'{name} {value:.4f}' for name, value in told.items())}")

    def _measured(self, trial: optuna.Trial, reader: Reader) -> dict[str, float] | None:
        """The objectives; None where the trial was pruned."""
        seen = _Seen()
        values, losses = seen.values, seen.losses
        for rung in range(len(self.ladder.rungs)):
            self._climb(rung, reader, seen)
            told = {one.name: one.value(values, losses, self.own) for one in self.objectives}
            known = {name: value for name, value in told.items() if value is not None}
            if not all(math.isfinite(value) for value in known.values()):
                raise DataError(f"an objective must be a finite number. Got {known}.")
            self.trials.note(trial, {OBJECTIVES: known, RUNG: rung, **plain_measures(values, losses)})
            if rung == len(self.ladder.rungs) - 1:
                return known
            mine = [one.loss(known[one.name]) for one in self.objectives if one.name in known]
            single = known.get(self.objectives[0].name) if len(self.objectives) == 1 else None
            others = self.trials.report(trial, rung, mine, single)
            if not goes_on(mine, others, self.options.factor):
                return None
        raise AssertionError("a ladder has at least one rung")

    def _climb(self, rung: int, reader: Reader, seen: _Seen) -> None:
        """Read what is new at a rung, and judge all that was read so far."""
        evaluator = self.mixture.session.evaluator
        for task in self.ladder.rungs[rung]:
            new = self.ladder.rows(task, rung, len(evaluator.inputs(task, "validation")))
            if not new:
                continue
            rows = seen.rows.setdefault(task, [])
            rows += new
            if self.mixture.causal:  # answers are texts, of which nothing is kept: all are asked for again
                seen.note(task, *evaluator.ask(task, "validation", rows, loss=self._asks_loss(task)))
                continue
            read = seen.read.setdefault(task, [])
            read.append(reader(task, "validation", new))
            seen.note(task, *evaluator.judge(task, "validation", torch.cat(read), rows))

    def _asks_loss(self, task: str) -> bool:
        """Whether a causal model's loss on a task is asked for, which takes a pass of its own."""
        return task in self.mixture.tasks and any(one.name == "loss" for one in self.objectives)

    def found(self) -> Searched:
        """What the trials gave. Raises `DataError`: none was completed."""
        trials = tuple(read_trial(one, self.space) for one in self.trials.ended())
        best = best_of(trials, self.objectives)
        if not best:
            faults = [one.error for one in trials if one.error is not None]
            said = f" Trial {next(one.number for one in trials if one.error)} failed: {faults[0]}" if faults else ""
            raise DataError(f"none of {len(trials)} trials was completed.{said}")
        start = self.space.start()
        first = next((one.number for one in trials if one.values == start), None)
        session = self.mixture.session
        return Searched(
            recipe=_movable(self.mixture.recipe, self.mixture.identities),
            base=session.base,
            tasks=session.tasks,
            space={field.strip(): said.strip() for field, _, said in (text.partition("=") for text in self.options.space)},
            objectives={one.name: "smaller" if one.smaller else "larger" for one in self.objectives},
            sampler=self.options.sampler,
            seed=self.options.seed,
            halving=self.options.halving,
            rungs=tuple(dict(one) for one in self.ladder.rungs),
            validation=self.options.validation,
            individual=dict(self.own),
            trials=trials,
            best=best,
            start=first,
            test=self._tested({number: next(one.method for one in trials if one.number == number) for number in best})
            if self.options.test
            else (),
        )

    def _tested(self, chosen: Mapping[int, Mapping[str, Any] | None]) -> tuple[SearchFigures, ...]:
        """The chosen trials on test, after the recipe as it is."""
        mixer = Mixer(self.mixture, Engine(workers=threads_each(1)), _quiet)
        evaluator, merged = self.mixture.session.evaluator, self.mixture.tasks
        own = {task: self.mixture.single.accuracy({task: 1.0}, task, "test") for task in merged}
        found = []
        for number, method in ((None, plain(self.mixture.method)), *chosen.items()):
            assert method is not None
            reader = mixer.made(method)
            seen = _Seen()
            for task in self.mixture.session.tasks:
                if self.mixture.causal:
                    seen.note(task, *evaluator.ask(task, "test", loss=self._asks_loss(task)))
                else:
                    seen.note(task, *evaluator.judge(task, "test", reader(task, "test", None)))
            ours = {task: seen.values[task] for task in merged if task not in perplexities(seen.values)}
            found.append(
                SearchFigures(
                    number=number,
                    accuracy=seen.values,
                    loss=seen.losses,
                    absolute=average(ours) if ours else None,
                    normalised=normalised(ours, own) if ours else None,
                )
            )
        return tuple(found)


def best_recipe(found: Searched, number: int) -> dict[str, Any]:
    """The recipe with a trial's values, complete, so that `thetau merge` runs it from any folder; its models keep the names that the search knew them by.

    Raises:
        DataError: there is no such trial, or its values make no method.
    """
    method = next((one.method for one in found.trials if one.number == number), None)
    if method is None:
        raise DataError(f"the search has no trial {number} whose values make a method.")
    return {**found.recipe, "method": method}


def write_best(found: Searched, folder: Path) -> list[Path]:
    """A recipe for each of the best trials: `best.yaml`, or `best-1.yaml`, `best-2.yaml`, … of a front. Raises `OutputError`."""
    paths = []
    for place, number in enumerate(found.best, start=1):
        path = folder / ("best.yaml" if len(found.best) == 1 else f"best-{place}.yaml")
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.trial(number).objectives.items())
        text = yaml.safe_dump(best_recipe(found, number), sort_keys=False, allow_unicode=True)
        write_text(path, f"# Trial {number} of {len(found.trials)}, on validation: {told}\n{text}")
        paths.append(path)
    for path in folder.glob("best*.yaml"):  # of a shorter search
        if path not in paths and re.fullmatch(r"best(-\d+)?\.yaml", path.name):
            path.unlink()
    return paths


def _movable(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """A recipe whose files are found from any folder, its models named."""

    def at(path: str) -> str:
        return str(Path(path).resolve()) if not is_url(path) and Path(path).exists() else path

    said = complete(recipe)
    said["base"] = said["base"] and at(said["base"])
    said["models"] = [
        {"path": at(entry.path), "name": name, **({"over": at(entry.over)} if entry.over else {})}
        for entry, name in zip(recipe.entries(), names, strict=True)
    ]
    if "evidence" in said:
        said["evidence"] = {kind: {task: at(path) for task, path in given.items()} for kind, given in said["evidence"].items()}
    return said
