"""One checkpoint measured on tasks, in the model or in its linear form, under heads made from the base, trained with it, or its own classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from thetau.checkpoint.locate import packaged_models
from thetau.compression import parts_beside
from thetau.diagnostics.results import Result
from thetau.errors import CheckpointError, DataError
from thetau.evaluate.answers import Answers
from thetau.evaluate.means import average
from thetau.evaluate.measures import Measure, measure, perplexities
from thetau.evaluate.options import BASE, Reading
from thetau.evaluate.session import Session
from thetau.evaluate.tuned import difference, is_tangent
from thetau.evidence.surgery import corrected_heads
from thetau.evidence.twin import read_router, router_file
from thetau.evidence.wemoe import mixture_file, read_mixture
from thetau.facade import open_base
from thetau.finetune.output import read_record, trained_heads
from thetau.models import locate, read_weights
from thetau.models.causal import check_tokenizer
from thetau.models.classifier import Classifier, classifier_of, load_classifier
from thetau.models.loading import kind_of
from thetau.models.mixture import Mixture, mixing
from thetau.pace import each
from thetau.studies.options import Evaluate
from thetau.studies.routed import measure_routed
from thetau.tasks import Task, load_task
from thetau.tasks.encoding import encode, features
from thetau.tasks.head import AnyHead


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointMeasured(Result):
    """What `evaluate_checkpoint` or `evaluate_classifier` found. `metrics`: of each task; `tasks`: its value, with n and a 95 % interval.

    - `average`: of all but perplexities, None where there is nothing else. `head`: what turned features into answers.
    - `corrected`: the tasks whose features went through a correction that lies beside the model (`thetau evidence surgery`).
    - `own`: the tasks that were measured with what the method made for them, which lies beside the model (`thetau merge --tasks`).
    - `routed`: of the tasks whose parts a router chose, input by input (`thetau evidence twin`): the share of inputs whose own task it held for the
      likeliest; None where it does not know the task.
    - `mixed`: the tasks that were measured with MLPs mixed by input, whose mixture lies beside the model (`thetau evidence wemoe`).
    """

    model: str
    base: str
    split: str
    max_length: int
    average: float | None
    space: str
    metrics: dict[str, str]
    tasks: dict[str, Measure]
    head: str = "made from the base"
    corrected: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    routed: dict[str, float | None] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was counted besides of a causal model's answers, in sentences."""
        return tuple(f"{name}: {note}" for name, one in self.tasks.items() if isinstance(one, Answers) for note in one.notes)

    def to_json(self) -> dict[str, Any]:
        """As plain values, the metric beside each task's value."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("metrics", "tasks")}
        facts |= {"corrected": list(self.corrected), "own": list(self.own), "mixed": list(self.mixed)}
        return facts | {"tasks": {name: {"metric": self.metrics[name], **asdict(one)} for name, one in self.tasks.items()}}


def heads_of(model: str | Path, options: Evaluate | None = None) -> dict[str, AnyHead]:
    """The heads that were trained with a checkpoint, or with the one that the options name. Raises `DataError`: that has none."""
    given = options or Evaluate()
    source = given.heads or _where(model)
    found = trained_heads(source) if source.is_dir() else {}
    if given.heads is not None and not found:
        raise DataError(f"{given.heads}: holds no trained heads. Give the folder of a model that was fine-tuned with train_head.")
    return found


def has_classifier(model: str | Path, options: Evaluate | None = None) -> bool:
    """Whether a checkpoint is measured by the classifier that it was saved with.

    It is not where the options name other heads, and `auto` leaves what thetau fine-tuned to the head that this was trained with.
    """
    given = options or Evaluate()
    where = _where(model)
    if given.head == "names" or given.heads is not None or not where.is_dir():
        return False
    if given.head == "classifier":
        return True
    return classifier_of(where) is not None and read_record(where) is None


def evaluate_classifier(
    model: str | Path,
    tasks: Sequence[str | Path],
    options: Evaluate | None = None,
    reading: Reading | None = None,
    *,
    on_tokens: Callable[[int], None] | None = None,
) -> CheckpointMeasured:
    """Measure a checkpoint by the classifier that it was saved with.

    Its classes are the task's by their names, or by their numbers where its config has no names. Raises `CheckpointError`: no classifier; `DataError`:
    classes that are not the task's.
    """
    given, read = options or Evaluate(), reading or Reading()
    where = _where(model)
    classifier = load_classifier(where)
    found: dict[str, Measure] = {}
    metrics: dict[str, str] = {}
    for task in each("task", [load_task(name, read.data) for name in tasks], lambda task: task.name):
        order = class_order(classifier, task, str(model))
        inputs = encode(
            classifier.encoder,
            task,
            given.split,
            max_length=read.max_length,
            image_size=read.image_size,
            limit=given.limit,
        )
        logits = features(classifier.encoder, inputs, on_tokens)
        told = logits[:, 0] if task.regression else logits[:, list(order)].argmax(-1)
        found[task.name], metrics[task.name] = measure(task.metric, told, inputs.labels), task.metric
    return CheckpointMeasured(
        model=str(model),
        base=str(model),
        split=given.split,
        max_length=read.max_length,
        average=average(found),
        space="weights",
        metrics=metrics,
        tasks=found,
        head="the checkpoint's own classifier",
    )


def class_order(classifier: Classifier, task: Task, origin: str) -> tuple[int, ...]:
    """The classifier's output for each class of a task, in the task's order. Raises `DataError`: the classes are others."""
    needed = 1 if task.regression else len(task.labels)
    if classifier.count == needed and (task.regression or classifier.labels is None):
        return tuple(range(needed))
    own = [_plain_label(label) for label in classifier.labels or ()]
    wanted = [_plain_label(label) for label in task.labels]
    if len(own) != needed or sorted(own) != sorted(wanted):
        shown = ", ".join((classifier.labels or ())[:8]) or f"{classifier.count} without names"
        raise DataError(
            f"{origin}: its classifier's classes are {shown}; those of task {task.name!r} are {', '.join(task.labels[:8]) or 'numbers'}. "
            "Correct `id2label` in its config.json, or leave the classifier out: --head names."
        )
    return tuple(own.index(label) for label in wanted)


def _plain_label(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", label.lower()).strip()


def evaluate_checkpoint(
    model: str | Path,
    session: Session,
    options: Evaluate | None = None,
    *,
    on_tokens: Callable[[int], None] | None = None,
) -> CheckpointMeasured:
    """Measure a checkpoint (folder, file, packaged model or hub id) on the session's tasks, with the session's heads.

    `on_tokens` is called with the number of tokens done. Raises `CheckpointError`, `DataError`.
    """
    given = options or Evaluate()
    where = _where(model)
    if session.encoder.kind == "causal" and where.is_dir():
        check_tokenizer(session.encoder, where)
    tangent = in_tangent_space(where, given)
    weights = read_weights(where if where.exists() else model, base=session.encoder.folder)
    session.evaluator.on_tokens = on_tokens
    beside = {} if tangent or not given.tasks or not where.is_dir() else parts_beside(where, open_base(session.base))
    router = read_router(router_file(where), weights) if beside and given.router and router_file(where).is_file() else None
    own_tasks = [name for name in session.tasks if name in beside or router is not None]
    shared = [name for name in session.tasks if name not in own_tasks]
    mixture = None
    if not tangent and given.mixture and mixture_file(where).is_file():
        mixture = read_mixture(mixture_file(where), weights, session.encoder.base_hash)
    # A correction is of the merged model's features, which a task's own model and a mixture do not have.
    heads = {name: head for name, head in session.evaluator.heads.items() if name not in own_tasks}
    corrected = {} if tangent or mixture is not None or not given.surgery else corrected_heads(where, weights, heads)
    session.evaluator.heads.update(corrected)
    found: dict[str, Measure] = {}
    routed: dict[str, float | None] = {}
    if tangent:
        base = session.encoder.weights(exact=True)
        linear = session.space_of({"model": difference(weights, base)}, tangent=True)
        found = {name: linear.accuracy({"model": 1.0}, name, given.split) for name in session.tasks}
    else:
        if router is not None:
            found, routed = measure_routed(
                session.evaluator, router, weights, beside, session.tasks, given.split, origin=str(model)
            )
        for task in [] if router is not None else own_tasks:
            own = beside[task].state_dict()
            found |= session.evaluator.evaluate(own, given.split, [task], origin=f"{model} for {task}")
        with _mixed(session, mixture):
            found |= session.evaluator.evaluate(weights, given.split, shared, origin=str(model))
        found = {name: found[name] for name in session.tasks}
    shares = {name: one for name, one in found.items() if name not in perplexities(found)}
    return CheckpointMeasured(
        model=str(model),
        base=session.base,
        split=given.split,
        max_length=session.encoder.max_length if session.encoder.kind == "causal" else session.reading.max_length,
        average=average(shares) if shares else None,
        space="tangent" if tangent else "weights",
        metrics={name: session.evaluator.tasks[name].metric for name in found},
        tasks=found,
        head=_head(model, session, given),
        corrected=tuple(corrected),
        own=() if router is not None else tuple(own_tasks),
        routed=routed,
        mixed=() if mixture is None or router is not None else tuple(shared),
    )


@contextmanager
def _mixed(session: Session, mixture: Mixture | None) -> Iterator[None]:
    """While it lasts, the session's encoder mixes its MLPs by input, where there is a mixture."""
    if mixture is None:
        yield
        return
    with mixing(session.encoder, mixture, session.weights) as (encoder, _), session.evaluator.through(encoder):
        yield


def in_tangent_space(where: Path, options: Evaluate) -> bool:
    """Whether a checkpoint is measured in its linear form: where the options say so, or leave it to what the checkpoint says."""
    return options.space == "tangent" or (options.space == "auto" and where.exists() and is_tangent(where))


def base_for(model: str | Path, base: str) -> str:
    """What a checkpoint is measured with: the `base` that was named, or for a causal language model, where none was, the model itself, and for an
    adapter that thetau trained the base of its record. Raises `CheckpointError` for a model that is nowhere, and for a GGUF file alone, whose config and
    tokenizer are not read from it.
    """
    where = _where(model)
    if base == BASE and where.suffix == ".gguf" and where.is_file():
        raise CheckpointError(
            f"{where}: a GGUF file is measured with the config and the tokenizer of a folder. Name it: --base FOLDER."
        )
    if base != BASE or where.is_file():
        return base
    where = where if where.is_dir() else locate(str(model))
    if (where / "config.json").is_file():
        return str(model) if kind_of(where) == "causal" else base
    record = read_record(where)
    return base if record is None else str(record["base"])


def _head(model: str | Path, session: Session, options: Evaluate) -> str:
    if session.encoder.kind == "causal":
        return "the model's own"
    return f"trained with {options.heads or model}" if heads_of(model, options) else f"made from {session.base}"


def _where(model: str | Path) -> Path:
    return locate(str(model)) if str(model) in packaged_models() else Path(model)
