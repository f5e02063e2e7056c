"""How similar a task is to the bases of a bank: from a converged vector, from a few steps of training, or as the user knows it.

Zeng et al. 2025, <https://arxiv.org/abs/2502.01015>, Section 5.2 and Appendix C.2: one batch's update, or one epoch, already tells
which basis a task belongs to, so that no converged model of it is needed. A batch here has the 128 examples of the paper's: the step of a
small one is mostly noise, and its cosines with the bases are too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from thetau.errors import DataError, nearest
from thetau.facade import Expression, as_vector
from thetau.facade import open as open_weights
from thetau.finetune import FinetuneConfig, finetune
from thetau.finetune.run import make_lesson
from thetau.models import Encoder
from thetau.tasks import Task

BATCH, PART = 128, 16
Similar = Callable[[Expression], Mapping[str, float]]
"""A task vector → its cosine with each basis, as `Bank.similar`."""


@final
@dataclass(frozen=True, kw_only=True)
class TargetSimilarity:
    """The cosines of a task's vector with each basis, and how they came about.

    - `how`: from a converged `vector`, from `steps` or `epochs` of training, or `given` by hand, without cosines.
    - `source`: where the vector lay, or what it was trained with. `steps`: optimiser steps that were made.
    - `norm`: of the vector. `given`: the bases that the user named.
    """

    task: str
    how: Literal["vector", "steps", "epochs", "given"]
    cosines: dict[str, float]
    source: str = ""
    steps: int | None = None
    norm: float | None = None
    given: tuple[str, ...] = ()

    def ranked(self) -> tuple[str, ...]:
        """The bases, the most similar one first; of equals the first by name."""
        return tuple(sorted(self.cosines, key=lambda name: (-self.cosines[name], name)))


def similarity_of_vector(task: str, vector: Expression, similar: Similar, *, source: str = "") -> TargetSimilarity:
    """From a converged task vector. Raises `DataError` when it is zero."""
    return TargetSimilarity(
        task=task, how="vector", cosines=dict(similar(vector)), source=source, norm=_length(vector, task, "Fine-tune it longer.")
    )


def similarity_given(task: str, chosen: Sequence[str], known: Sequence[str]) -> TargetSimilarity:
    """As the user knows it: the bases named, of those there are. Raises `DataError`."""
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise DataError(f"no basis {unknown[0]!r}.{nearest(unknown[0], known)} Bases: {', '.join(known)}.")
    if not chosen or len(set(chosen)) != len(chosen):
        raise DataError(f"name different bases, at least one. Got {list(chosen)}.")
    return TargetSimilarity(task=task, how="given", cosines={}, given=tuple(chosen))


def short_config(*, tangent: bool = False, batch_size: int | None = None, **others: Any) -> FinetuneConfig:
    """The config of a short run: batches of 128, taken in parts of 16 examples. `others`: fields of it, as `lr`. Raises `RecipeError`."""
    size = BATCH if batch_size is None else batch_size
    given = {"paradigm": "linear" if tangent else "standard", "batch_size": size, "accumulation": max(1, math.ceil(size / PART))}
    return FinetuneConfig.of({**given, **others}, "short run")


def similarity_of_run(
    encoder: Encoder,
    task: Task,
    base: Expression,
    similar: Similar,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    config: FinetuneConfig | None = None,
    tangent: bool = False,
    run: Path | None = None,
    base_label: str = "",
) -> TargetSimilarity:
    """From a short run on the task's training split: one step by default.

    The run has no warm-up, so that its first step moves the weights by the whole learning rate, and no weight decay, so that it moves them
    for the task alone. `encoder` must hold the base's weights.

    Args:
        base: the same base, opened, from which the vector is taken.
        steps, epochs: the length of the run; one of them.
        config: learning rate, batch size and the rest, `short_config` by default; its length, warm-up and weight decay do not count.
        tangent: train the linear form, as the bank's vectors were.
        run: a folder that keeps the short runs, so that they are made once.

    Raises:
        DataError: bad lengths or data, or a run that left the weights as they were.
    """
    if steps is not None and epochs is not None:
        raise DataError("a short run has a number of steps or of epochs, not both.")
    length = epochs if epochs is not None else 1 if steps is None else steps
    if length < 1:
        raise DataError(f"a short run has at least one {'step' if epochs is None else 'epoch'}. Got {length}.")
    plain: dict[str, Any] = {"warmup": 0.0, "weight_decay": 0.0, "save_every": 0}
    chosen = config or short_config(tangent=tangent)
    if chosen.how.linear != tangent:
        space = "the tangent space: train with paradigm linear" if tangent else "the weights: train with paradigm standard"
        raise DataError(f"the bank's vectors belong to {space}. Got paradigm {chosen.paradigm!r}.")
    if epochs is not None:
        examples = len(make_lesson(encoder, task, chosen, {}).inputs)
        length = epochs * math.ceil(examples / chosen.batch_size)
    short = FinetuneConfig(**{**_fields(chosen), **plain, "steps": length})
    with tempfile.TemporaryDirectory(prefix="thetau-") as folder:
        out = (run or Path(folder)) / f"short-{task.name}-{_key(encoder, task, short)}"
        finetune(encoder, task, out, short, base=base_label or str(encoder.folder))
        vector = as_vector(open_weights(out, base=base), base).named(task.name)
        remedy = f"Raise the learning rate (lr={short.lr:g}) or the number of steps ({short.steps})."
        return TargetSimilarity(
            task=task.name,
            how="steps" if epochs is None else "epochs",
            norm=_length(vector, task.name, remedy),
            cosines=dict(similar(vector)),
            source=f"{short.paradigm}, lr {short.lr:g}, batches of {short.batch_size}, seed {short.seed}",
            steps=length,
        )


def similar_bases(similarity: TargetSimilarity, threshold: float | None = None, most: int | None = None) -> tuple[str, ...]:
    """The bases to use for a task, the most similar first: those given by hand; else all with a cosine of at least `threshold`, at most
    `most` of them; without a threshold the `most` (1 by default) most similar ones. May be none.

    Raises:
        DataError: `threshold` or `most` is out of range.
    """
    if threshold is not None and not -1 <= threshold <= 1:
        raise DataError(f"the threshold is a cosine, between −1 and 1. Got {threshold:g}.")
    if most is not None and most < 1:
        raise DataError(f"at least one basis must be allowed. Got {most}.")
    if similarity.how == "given":
        if threshold is not None or most is not None:
            raise DataError("bases that are given by hand are used as given: leave the threshold and the number out.")
        return similarity.given
    ranked = similarity.ranked()
    if threshold is None:
        return ranked[: most or 1]
    return tuple(name for name in ranked if similarity.cosines[name] >= threshold)[:most]


def _length(vector: Expression, task: str, remedy: str) -> float:
    length = vector.norm()
    if length == 0:
        raise DataError(f"the vector of {task!r} is zero, so it is similar to nothing. {remedy}")
    return length


def _fields(config: FinetuneConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _key(encoder: Encoder, task: Task, config: FinetuneConfig) -> str:
    from thetau.evaluate.cache import Cache

    lesson = make_lesson(encoder, task, config, {})
    return Cache.key([encoder.base_hash, encoder.form, config.content(), lesson.inputs.hash, lesson.head.hash()])[:12]
