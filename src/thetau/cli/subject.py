"""What a verb needs that runs a fine-tuned model on its task: the encoder of its base, the task, the head that was trained with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from thetau.models import Encoder
    from thetau.tasks import Task
    from thetau.tasks.head import AnyHead


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """`encoder` holds the base's weights; `head` is the one that was trained with the model, None where its task's frozen one serves."""

    encoder: Encoder
    task: Task
    head: AnyHead | None


def open_subject(model: str, task: str | None, base: str | None, data: Path | None, kind: str | None, *, purpose: str) -> Subject:
    """Load what a verb runs `model` with; `purpose` says in errors what for, such as `a mask is learned`.

    Where they are not given, the task and the base are those that the model's own record names. Raises `DataError`: no record of them,
    a model of the tangent space, another base.
    """
    from thetau.errors import DataError
    from thetau.evaluate.tuned import one_space, open_tuned
    from thetau.finetune.output import read_record
    from thetau.models import load_encoder
    from thetau.models.loading import kind_named
    from thetau.tasks import load_task

    path = Path(model)
    name = task if task is not None else open_tuned(model).task
    record = read_record(path) if path.is_dir() else None
    if base is None:
        if record is None:
            raise DataError(f"{model}: has no record of its base. Name it: --base.")
        base = str(record["base"])
    loaded = load_task(name, data)
    tuned = open_tuned(f"{loaded.name}={model}") if path.exists() else None
    if tuned is not None and tuned.tangent:
        raise DataError(f"{model}: belongs to the tangent space; {purpose} for models of the model's own space.")
    encoder = load_encoder(base, kind_named(kind))
    if tuned is not None:
        one_space([tuned], encoder)
    return Subject(encoder=encoder, task=loaded, head=None if tuned is None else tuned.heads().get(loaded.name))
