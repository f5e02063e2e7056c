"""From a model and a task to a fine-tuned checkpoint, once for each content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from thetau._version import __version__
from thetau.errors import OutputError
from thetau.finetune.config import FinetuneConfig
from thetau.finetune.loop import train
from thetau.finetune.output import read_record, write_checkpoint
from thetau.models import Encoder, read_weights, weights_hash
from thetau.tasks import Head, Task, Tokens, tokenise, zero_shot_head

# Part of every key; raised when the loop changes what it computes.
_LOOP = 1


@final
@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run made. `cached` says that `out` held this very result already; then `seconds` and losses are those of the first
    run.
    """

    task: str
    out: Path
    key: str
    weights_hash: str
    first_loss: float
    last_loss: float
    seconds: float
    examples: int
    truncated: int
    cached: bool


def finetune_key(encoder: Encoder, head: Head, tokens: Tokens, config: FinetuneConfig) -> str:
    """The content that a run depends on: config, the token ids and labels, the head, the base's weights."""
    parts = {"loop": _LOOP, "config": asdict(config), "data": tokens.hash, "head": head.hash(), "base": encoder.base_hash}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def finetune(
    encoder: Encoder,
    task: Task,
    out: Path,
    config: FinetuneConfig,
    *,
    base: str,
    tick: Callable[[int, float], None] | None = None,
) -> FinetuneResult:
    """Fine-tune the encoder on a task's training split and write the checkpoint to `out`.

    `encoder` must hold the base's weights; it does so again afterwards. `base` is what the record calls it. When `out` holds the
    result of the same config, data and base, nothing is done. Raises `OutputError` when `out` holds anything else, `DataError`
    for bad data or a diverging loss.
    """
    head = zero_shot_head(encoder, task)
    tokens = tokenise(encoder, task.split("train"), config.max_length)
    key = finetune_key(encoder, head, tokens, config)
    if out.exists():
        return _existing(out, key, task.name)
    before = encoder.weights()
    start = time.perf_counter()
    try:
        losses = train(encoder.module, head, tokens, config, tick)
        weights = encoder.weights()
    finally:
        encoder.load(before, base)
    record = {
        "thetau": __version__,
        "key": key,
        "task": task.name,
        "base": base,
        "base_hash": encoder.base_hash,
        "config": asdict(config),
        "data_hash": tokens.hash,
        "head_hash": head.hash(),
        "examples": len(tokens),
        "truncated": tokens.truncated,
        "licence": task.licence,
        "weights_hash": weights_hash(weights),
        "seconds": round(time.perf_counter() - start, 3),
        "losses": losses,
    }
    write_checkpoint(out, weights, encoder.folder, record)
    return _result(record, out, cached=False)


def _existing(out: Path, key: str, task: str) -> FinetuneResult:
    record = read_record(out)
    if record is None or record.get("key") != key:
        got = "something else" if record is None else f"a run on {record.get('task')!r} with other settings, data or base"
        raise OutputError(
            f"{out}: the output folder must be new, or hold this very run on {task!r}. It holds {got}. "
            "Choose another one or remove it."
        )
    if weights_hash(read_weights(out)) != record["weights_hash"]:
        raise OutputError(f"{out}: its weights are no longer those that were written there. Remove the folder and run again.")
    return _result(record, out, cached=True)


def _result(record: dict[str, Any], out: Path, *, cached: bool) -> FinetuneResult:
    losses = record["losses"]
    window = max(1, min(20, len(losses) // 2))
    return FinetuneResult(
        task=record["task"],
        out=out,
        key=record["key"],
        weights_hash=record["weights_hash"],
        first_loss=sum(losses[:window]) / window,
        last_loss=sum(losses[-window:]) / window,
        seconds=record["seconds"],
        examples=record["examples"],
        truncated=record["truncated"],
        cached=cached,
    )
