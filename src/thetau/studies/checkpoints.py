"""One checkpoint measured on tasks, in the model or in its linear form, under heads made from the base or trained with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from thetau.checkpoint.locate import packaged_models
from thetau.diagnostics.results import Result
from thetau.errors import DataError
from thetau.evaluate.means import average
from thetau.evaluate.measures import Measure
from thetau.evaluate.session import Session
from thetau.evaluate.tuned import difference, is_tangent
from thetau.evidence.surgery import corrected_heads
from thetau.finetune.output import trained_heads
from thetau.models import locate, read_weights
from thetau.studies.options import Evaluate
from thetau.tasks.head import AnyHead


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointMeasured(Result):
    """What `evaluate_checkpoint` found. `metrics`: of each task; `tasks`: its value, with n and a 95 % interval.

    `corrected`: the tasks whose features went through a correction that lies beside the model (`thetau evidence surgery`).
    """

    model: str
    base: str
    split: str
    max_length: int
    average: float
    space: str
    metrics: dict[str, str]
    tasks: dict[str, Measure]
    corrected: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values, the metric beside each task's value."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("metrics", "tasks")}
        return facts | {"tasks": {name: {"metric": self.metrics[name], **asdict(one)} for name, one in self.tasks.items()}}


def heads_of(model: str | Path, options: Evaluate | None = None) -> dict[str, AnyHead]:
    """The heads that were trained with a checkpoint, or with the one that the options name. Raises `DataError`: that has none."""
    given = options or Evaluate()
    source = given.heads or _where(model)
    found = trained_heads(source) if source.is_dir() else {}
    if given.heads is not None and not found:
        raise DataError(f"{given.heads}: holds no trained heads. Give the folder of a model that was fine-tuned with train_head.")
    return found


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
    tangent = given.space == "tangent" or (given.space == "auto" and where.exists() and is_tangent(where))
    weights = read_weights(where if where.exists() else model, base=session.encoder.folder)
    session.evaluator.on_tokens = on_tokens
    corrected = {} if tangent or not given.surgery else corrected_heads(where, weights, session.evaluator.heads)
    session.evaluator.heads.update(corrected)
    if tangent:
        own = session.encoder.weights(exact=True)
        linear = session.space_of({"model": difference(weights, own)}, tangent=True)
        found = {name: linear.accuracy({"model": 1.0}, name, given.split) for name in session.tasks}
    else:
        found = session.evaluator.evaluate(weights, given.split, origin=str(model))
    return CheckpointMeasured(
        model=str(model),
        base=session.base,
        split=given.split,
        max_length=session.reading.max_length,
        average=average(found),
        space="tangent" if tangent else "weights",
        metrics={name: session.evaluator.tasks[name].metric for name in found},
        tasks=found,
        corrected=tuple(corrected),
    )


def _where(model: str | Path) -> Path:
    return locate(str(model)) if str(model) in packaged_models() else Path(model)
