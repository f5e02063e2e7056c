"""A causal model on tasks of lm-evaluation-harness, by that library's own rules, with n and intervals.

Gao et al., <https://github.com/EleutherAI/lm-evaluation-harness>. The prompts, the splits and the metrics are the harness'; the weights and the tokenizer are
those that run here, so that merges and adapters are measured as any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from thetau.errors import DataError, ThetauError, nearest
from thetau.evaluate.accuracy import Z95, wilson
from thetau.evaluate.cache import Cache
from thetau.evaluate.requests import keep_answers
from thetau.models import Encoder, weights_hash
from thetau.models.causal import end_tokens
from thetau.models.library import quiet, reason_of

_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match")
BATCH = 16


@final
@dataclass(frozen=True, kw_only=True)
class Harnessed:
    """`value` of the harness' `metric` after its `filter` on `n` examples; the 95 % interval `low`..`high` where there is one."""

    metric: str
    filter: str
    value: float
    n: int
    low: float | None
    high: float | None


def run_harness(
    encoder: Encoder, tasks: Sequence[str], *, folder: Path | None = None, limit: int | None = None, cache: Path | None = None
) -> dict[str, tuple[Harnessed, ...]]:
    """What the harness measures of the weights that `encoder` runs with, by task; a group gives its tasks.

    - `folder`: of task files of one's own (YAML), looked at before those of the harness. `limit`: the first so many examples of each task.
    - `cache`: a folder; what the model answered to a request is kept there, and asked once of the same weights, tokens and harness.

    Raises `DataError`: not installed, no such task, one that cannot be loaded, a model that is not causal.
    """
    if encoder.kind != "causal":
        raise DataError(
            f"{encoder.folder}: lm-evaluation-harness runs causal language models; this is read as {encoder.kind}. Give a causal one."
        )
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: must be a folder of task files, as --harness-tasks. There is none.")
    with _silent():
        harness = _library()
        manager = _manager(harness, tasks, folder)
        backbone: Any = encoder.backbone
        model = harness["HFLM"](
            pretrained=backbone, tokenizer=encoder.tokenizer, backend="causal", batch_size=BATCH, max_length=encoder.max_length
        )
        keep_answers(model, None if cache is None else cache / f"harness-{_identity(encoder)}.jsonl")
        try:
            found: Any = harness["evaluate"](
                model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        except ThetauError:
            raise
        except Exception as error:  # another library's code on task files of anybody's
            raise DataError(
                f"lm-evaluation-harness cannot run {', '.join(tasks)} ({reason_of(error)}). Its data come from the hub, unless the task file names local "
                "files (`dataset_path: json`, `dataset_kwargs`)."
            ) from error
    return {
        name: _scores(one, int(found["n-samples"][name]["effective"]))
        for name, one in found["results"].items()
        if name in found["n-samples"]
    }


def _identity(encoder: Encoder) -> str:
    """Of all that an answer to a request depends on."""
    fast = getattr(encoder.tokenizer, "backend_tokenizer", None)
    tokens = encoder.tokenizer.get_vocab() if fast is None else fast.to_str()
    weights = weights_hash(encoder.weights(exact=True))
    return Cache.key([weights, encoder.form, tokens, sorted(end_tokens(encoder)), encoder.max_length, version("lm_eval")])


def _scores(result: dict[str, Any], n: int) -> tuple[Harnessed, ...]:
    """The figures of one task, as the harness names them: `metric,filter` beside `metric_stderr,filter`."""
    made = []
    for key, value in result.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{chosen}")
        low: float | None = None
        high: float | None = None
        if metric in _SHARES and 0 <= value <= 1:
            low, high = wilson(round(value * n), n)
        elif isinstance(error, int | float):
            low, high = value - Z95 * error, value + Z95 * error
        made.append(Harnessed(metric=metric, filter=chosen, value=float(value), n=n, low=low, high=high))
    return tuple(made)


def _manager(harness: dict[str, Any], tasks: Sequence[str], folder: Path | None) -> Any:
    """The index of tasks: of the folder alone where it has them all, since that of the harness is long to read."""
    manager: Any = None
    known: set[str] = set()
    for defaults in (False, True) if folder is not None else (True,):
        try:
            manager = harness["TaskManager"](include_path=None if folder is None else str(folder), include_defaults=defaults)
        except Exception as error:  # another library's code on task files of anybody's
            raise DataError(f"{folder}: lm-evaluation-harness cannot read the task files there ({reason_of(error)}).") from error
        known = set(manager.all_tasks)
        if set(tasks) <= known:
            return manager
    lacking = next(name for name in tasks if name not in known)
    where = "" if folder is None else f", nor in {folder}"
    raise DataError(
        f"lm-evaluation-harness has no task {lacking!r}{where}.{nearest(lacking, known)} `lm_eval ls tasks` lists them; a task file of one's own is read from "
        "the folder that --harness-tasks names."
    )


def _library() -> dict[str, Any]:
    try:
        return {
            "evaluate": import_module("lm_eval").simple_evaluate,
            "TaskManager": import_module("lm_eval.tasks").TaskManager,
            "HFLM": import_module("lm_eval.models.huggingface").HFLM,
        }
    except ImportError as error:
        raise DataError(f"--harness needs lm-evaluation-harness ({error}). Install it: pip install 'thetau[harness]'") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without the harness' advice; what went wrong comes as an error."""
    import logging

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
