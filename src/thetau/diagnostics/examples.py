r"""What a few examples of the tasks add to `thetau doctor`: losses, $\tau$Jp, and how far inputs move.

Of each task and each model: the loss and the score of θ₀ + τ; $E\,\lVert J(x;\theta_0)\,\tau\rVert^2$ (Yoshida et al., NeurIPS 2024 workshop, Eq. 9), what the
vector does to the task's features to first order; and how far the inputs of the linear layers turn and stretch against the base (Cheng et al., ICML
2025, "WUDI-Merging", Eqs. 7 and 8), which WUDI takes to be little on a model's own task.

The base is run, and one model at a time with it; no vector is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from thetau.checkpoint.naming import layer_of
from thetau.diagnostics.advice import CHANCE
from thetau.diagnostics.doctor import Advice, Doctor, HitRate, OnTask
from thetau.diagnostics.layers import FEATURES, Seen, activations, direction_change, magnitude_change
from thetau.diagnostics.predictions import measured
from thetau.engine.executor import Engine
from thetau.engine.work import Silent
from thetau.errors import DataError, RecipeError, nearest
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import Loss, Measure
from thetau.evaluate.merging import at_scale
from thetau.evaluate.options import Few, Reading
from thetau.evaluate.spaces import TangentSpace
from thetau.evaluate.tuned import Tuned, check_over, make_space, tuned_at
from thetau.facade import Expression, ThetauWarning, as_vector
from thetau.finetune.output import read_record
from thetau.models import load_encoder
from thetau.models.loading import kind_named
from thetau.pace import doing, each
from thetau.tasks import load_task
from thetau.tasks.head import AnyHead
from thetau.vectors.identity import identities

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # positions of each layer that are looked at, about
NAMED = 3  # pairs that are named in the advice
OUTSIDE = "outside"  # the group of layers that stand in no block, as in the doctor's other figures


@final
@dataclass(frozen=True, kw_only=True)
class Examples:
    """A base that runs, tasks with their heads, and whose they are.

    - `owners`: task → the model that was trained on it, "" where none is known. `tuned`: model → its record, where it has one.
    """

    evaluator: Evaluator
    weights: Mapping[str, Tensor]
    owners: Mapping[str, str]
    tuned: Mapping[str, Tuned]
    reading: Reading
    split: str


def open_examples(base: str, models: Sequence[Expression], tasks: Sequence[str], *, few: Few, reading: Reading) -> Examples:
    """Load the base and the tasks, each `TASK` or `MODEL=TASK`, before the long passes and not after them.

    Raises:
        ThetauError: a task that is not found or named twice, a model that was not given, a split without examples, a base that does not run.
    """
    names = identities(models)
    paths = {name: Path(model.terms[-1][1].label) for name, model in zip(names, models, strict=True)}
    tuned = {name: tuned_at(path, name) for name, path in paths.items() if path.exists()}
    wanted = [_told(text, names) for text in tasks]
    loaded = [load_task(what, reading.data) for _, what in wanted]
    if twice := [one.name for place, one in enumerate(loaded) if one.name in [other.name for other in loaded[:place]]]:
        raise RecipeError([f"the task {twice[0]!r} is given twice."], "--task")
    owners = {task.name: owner or _owner(task.name, paths) for (owner, _), task in zip(wanted, loaded, strict=True)}
    encoder = load_encoder(base, kind_named(reading.kind), raw=reading.features == "raw")
    for one in tuned.values():
        check_over(one, encoder)
    heads: dict[str, AnyHead] = {
        task: head for task, owner in owners.items() if owner in tuned and (head := tuned[owner].heads().get(task)) is not None
    }
    evaluator = Evaluator(
        encoder,
        loaded,
        limits={few.split: few.examples},
        max_length=reading.max_length,
        image_size=reading.image_size,
        heads=heads,
        cache=reading.cache,
    )
    for task in owners:
        if not len(evaluator.inputs(task, few.split)):
            raise DataError(f"task {task!r}: the split {few.split!r} has no example.")
    return Examples(
        evaluator=evaluator,
        weights=encoder.weights(exact=True),
        owners=owners,
        tuned=tuned,
        reading=reading,
        split=few.split,
    )


def _told(text: str, names: Sequence[str]) -> tuple[str, str]:
    """`MODEL=TASK` as its parts, or "" and a task. Raises `RecipeError`: no such model."""
    owner, equals, task = text.partition("=")
    if not equals or Path(text).exists():
        return "", text
    if owner not in names:
        raise RecipeError(
            [f"{text}: no model is called {owner!r}; they are called {', '.join(names)}.{nearest(owner, names)}"], "--task"
        )
    return owner, task


def _owner(task: str, paths: Mapping[str, Path]) -> str:
    """The model whose record, or else whose name, is of a task; "" where none is."""
    recorded = [
        name
        for name, path in paths.items()
        if path.is_dir() and (record := read_record(path)) is not None and record.get("task") == task
    ]
    return next(iter([*recorded, *(name for name in paths if name == task)]), "")


def with_examples(
    found: Doctor, examples: Examples, base: Expression, models: Sequence[Expression], *, engine: Engine | None = None
) -> Doctor:
    """The doctor's result with what the examples say of the models that fit the base, and the advice that follows from it."""
    opened = dict(zip(identities(models), models, strict=True))
    look = _Look(examples)
    silent = replace(engine or Engine(), progress=Silent())  # the models are told, not their bytes
    for name in each("model", found.compared):
        look.take(name, _vector(opened[name], base, silent))
    examples.evaluator.load_base()
    tasks = look.done()
    return replace(
        found,
        tasks=tasks,
        advice=_before_conflicts(found.advice, advise(tasks, found.compared, found.staying)),
        notes=(*found.notes, *look.notes),
    )


def _vector(model: Expression, base: Expression, engine: Engine) -> dict[str, Tensor]:
    """τ in memory; without tensors where the model is the base itself. What it warns of is among the findings already."""
    vector = as_vector(model, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThetauWarning)
        return vector.state_dict(engine=engine) if vector.terms else {}


@dataclass
class _Figures:
    """Of one model, or of the base, on one task."""

    loss: float | None = None
    score: float | None = None
    tau_jp: float | None = None
    direction: float | None = None
    magnitude: float | None = None
    layers: Mapping[str, float] | None = None


class _Look:
    """Runs the base first, then each model as it is handed over, on every task."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.evaluator, self.split = examples, examples.evaluator, examples.split
        self.notes: list[str] = []
        self.figures: dict[str, list[_Figures]] = {task: [] for task in examples.owners}
        self.unit: dict[str, float | None] = dict.fromkeys(examples.owners)
        self.start: dict[str, _Figures] = {}
        self.inputs: dict[str, Mapping[str, Seen]] = {}
        self.causal = self.evaluator.encoder.kind == "causal"
        if self.causal:
            self.notes.append(
                "τJp and the inputs of layers are looked at in encoders; of a causal language model there are loss and score."
            )
        for task in examples.owners:
            self.start[task], self.inputs[task] = _Figures(), {}
            try:
                self.start[task] = self._scored(task, examples.weights, "the base")
                if not self.causal:
                    self.inputs[task] = self._seen(task, examples.weights, "the base")
            except DataError as error:  # a metric that is not defined, no linear layer: what is known already must not be lost
                self.notes.append(f"the base on {task}: {error}")

    def take(self, name: str, vector: Mapping[str, Tensor]) -> None:
        """Measure one model."""
        weights = at_scale(self.examples.weights, vector, 1.0)
        linear = self._linear(name, vector)
        one = self.examples.tuned.get(name)
        tangent = one is not None and one.tangent
        for task in self.examples.owners:
            try:
                figures = self._in_form(name, task, linear) if tangent else self._scored(task, weights, name)
                figures.tau_jp = self._tau_jp(name, task, linear)
                if not tangent and not self.causal:
                    self._moved(task, self._seen(task, weights, name), figures)
            except DataError as error:
                self.notes.append(f"{name} on {task}: {error}")
                figures = _Figures()
            self.figures[task].append(figures)
        if tangent:
            self.notes.append(
                f"{name} belongs to the tangent space: its losses are those of its linear form, whose layers read what the base's do."
            )

    def _linear(self, name: str, vector: Mapping[str, Tensor]) -> TangentSpace | None:
        """The linear form; None of a causal model, and where nothing moves that runs."""
        moved = self.evaluator.encoder.parameters(vector)
        if self.causal or not any(bool(tensor.any()) for tensor in moved.values()):
            return None
        space = make_space(self.evaluator, self.examples.weights, {name: vector}, tangent=True, cache=self.examples.reading.cache)
        assert isinstance(space, TangentSpace)
        return space

    def _tau_jp(self, name: str, task: str, linear: TangentSpace | None) -> float | None:
        if linear is None:
            return None if self.causal else 0.0
        try:
            first, change = linear.terms(name, task, self.split)
        except DataError as error:
            self.notes.append(f"{name} on {task}: no τJp: {error}")
            return None
        self.unit[task] = float(first.double().square().sum(-1).mean())
        return float(change.double().square().sum(-1).mean())

    def _in_form(self, name: str, task: str, linear: TangentSpace | None) -> _Figures:
        """Of a model of the tangent space: the linear form's."""
        if linear is None:
            return replace(self.start[task], tau_jp=None)
        return _figures(*self.evaluator.judge(task, self.split, linear.features({name: 1.0}, task, self.split)))

    def _scored(self, task: str, weights: Mapping[str, Tensor], origin: str) -> _Figures:
        if not self.causal:
            read = self.evaluator.features(weights, task, self.split, origin=origin)
            return _figures(*self.evaluator.judge(task, self.split, read))
        score = self.evaluator.evaluate(weights, self.split, [task], origin=origin)[task]
        try:
            return _figures(score, self.evaluator.losses(weights, self.split, [task], origin=origin)[task])
        except DataError as error:  # answers that are longer than what is taught have no loss
            self.notes.append(f"{origin} on {task}: no loss: {error}")
            return _figures(score, None)

    def _seen(self, task: str, weights: Mapping[str, Tensor], origin: str) -> Mapping[str, Seen]:
        with doing(f"layers of {origin} on {task}"):
            found = activations(self.evaluator.encoder, weights, self.evaluator.inputs(task, self.split), ROWS, origin)
        return {name: one for name, one in found.items() if name != FEATURES}

    def _moved(self, task: str, seen: Mapping[str, Seen], figures: _Figures) -> None:
        blocks: dict[str, list[float]] = {}
        turned, stretched = [], []
        for name, before in self.inputs[task].items():
            x, start = seen[name].x, before.x
            if x is None or start is None:
                continue
            turned.append(direction_change(x, start))
            stretched.append(magnitude_change(x, start))
            block = layer_of(name)
            blocks.setdefault(OUTSIDE if block is None else str(block), []).append(turned[-1])
        figures.direction, figures.magnitude = _mean(turned), _mean(stretched)
        figures.layers = {name: math.fsum(values) / len(values) for name, values in blocks.items()}

    def done(self) -> tuple[OnTask, ...]:
        """All of it, task by task."""
        return tuple(self._task(task, owner) for task, owner in self.examples.owners.items())

    def _task(self, task: str, owner: str) -> OnTask:
        rows, start = self.figures[task], self.start[task]
        blocks = dict.fromkeys(block for row in rows for block in row.layers or {})
        return OnTask(
            task=task,
            own=owner,
            split=self.split,
            n=len(self.evaluator.inputs(task, self.split)),
            metric=self.evaluator.tasks[task].metric,
            unit=self.unit[task],
            base_loss=start.loss,
            base_score=start.score,
            loss=tuple(row.loss for row in rows),
            score=tuple(row.score for row in rows),
            tau_jp=tuple(row.tau_jp for row in rows),
            direction=tuple(row.direction for row in rows),
            magnitude=tuple(row.magnitude for row in rows),
            layers={block: tuple((row.layers or {}).get(block) for row in rows) for block in blocks},
        )


def _figures(score: Measure, loss: Loss | None) -> _Figures:
    return _Figures(loss=None if loss is None else loss.value, score=score.value)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


# Advice.


def advise(tasks: Sequence[OnTask], compared: Sequence[str], staying: Sequence[str]) -> tuple[Advice, ...]:
    """What follows: models that do not know their own task, and the vectors that do most to another task's features."""
    return (*_unlearned(tasks, compared), *_loud(tasks, compared, staying))


def _unlearned(tasks: Sequence[OnTask], compared: Sequence[str]) -> list[Advice]:
    found = []
    for one in tasks:
        if one.own not in compared:
            continue
        loss = one.loss[compared.index(one.own)]
        if loss is None or one.base_loss is None or loss < one.base_loss:
            continue
        found.append(
            Advice(
                topic="check",
                models=(one.own,),
                sentence=f"Look at {one.own} before it is merged: on {one.task}, its own task, it is no better than the base.",
                evidence=f"Loss {loss:.4f} against the base's {one.base_loss:.4f}, on {one.n} {one.split} examples.",
                uncertainty="The head that read it may not be the one that it was trained with.",
            )
        )
    return found


def _loud(tasks: Sequence[OnTask], compared: Sequence[str], staying: Sequence[str]) -> list[Advice]:
    rows = []
    for one in tasks:
        own = one.tau_jp[compared.index(one.own)] if one.own in staying else None
        if not own:
            continue
        rows += [
            (math.sqrt(value / own), name, one.own, one.task)
            for name, value in zip(compared, one.tau_jp, strict=True)
            if value is not None and name != one.own and name in staying
        ]
    if not rows:
        return []
    rows.sort(key=lambda row: -row[0])
    told = ", ".join(f"{task} by {name} ({share:.2f})" for share, name, _, task in rows[:NAMED])
    n, rate = min(one.n for one in tasks), measured("examples")
    return [
        Advice(
            topic="conflict",
            models=tuple(dict.fromkeys(name for _, doer, own, _ in rows[:NAMED] for name in (own, doer))),
            sentence=f"On examples, look first at: {told}.",
            evidence="√ of τJp: how far the other's vector moves the task's features at the base, over how far the task's own vector does.",
            uncertainty=f"To first order, at the base, on {n} examples{' or more' if len({one.n for one in tasks}) > 1 else ''} a task.{_doubt(rate)}",
            measured=rate,
        )
    ]


def _doubt(rate: HitRate | None) -> str:
    """What came of trying it, where that was no better than chance."""
    return " Where it was tried it did no better than a coin." if rate is not None and rate.low <= CHANCE else ""


def _before_conflicts(advice: Sequence[Advice], more: Sequence[Advice]) -> tuple[Advice, ...]:
    """What examples say comes after what is left out, and before what is told from weights."""
    first = [one for one in advice if one.topic == "leave out"]
    return (*first, *more, *(one for one in advice if one.topic != "leave out"))
