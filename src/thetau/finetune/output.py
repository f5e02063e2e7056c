"""A fine-tuned model on disk: an ordinary checkpoint folder, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thetau.checkpoint.disk import copy_side_files, new_folder, write_json, write_tensors
from thetau.tasks.head import AnyHead
from thetau.tasks.heads import read_head, write_head

RECORD = "thetau_finetune.json"
_WEIGHTS = "model.safetensors"
_HEADS = "heads"
_ADAPTER = "adapter_model.safetensors"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `write_checkpoint` recorded in a folder, or None when it is not one of its folders."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = any((folder / name).is_file() for name in (_WEIGHTS, _ADAPTER))
    return record if isinstance(record, dict) and whole else None


def write_checkpoint(
    out: Path,
    weights: Mapping[str, Tensor],
    base: Path,
    record: Mapping[str, Any],
    snapshots: Path | None = None,
    heads: Mapping[str, AnyHead] | None = None,
) -> None:
    """Write weights, the base's config and tokenizer, and the record to `out`, which must not exist.

    `snapshots` is a folder that becomes `out/snapshots`; `heads` that were trained go to `out/heads`.
    Everything is written to a sibling folder that is renamed at the end. Raises
    `OutputError`; then there is no `out`.
    """

    def fill(folder: Path) -> None:
        copy_side_files(base, folder)
        write_tensors(folder / _WEIGHTS, weights, {"thetau.space": "tangent"} if record.get("space") == "tangent" else None)
        if snapshots is not None and snapshots.is_dir():
            shutil.copytree(snapshots, folder / "snapshots")

    write_folder(out, fill, record, heads)


def trained_heads(folder: Path) -> dict[str, AnyHead]:
    """The heads that were trained with a checkpoint, by task; none where there are none. Raises `DataError` for a damaged one."""
    return {path.stem: read_head(path) for path in sorted((folder / _HEADS).glob("*.safetensors"))}


def write_folder(
    out: Path, fill: Callable[[Path], None], record: Mapping[str, Any], heads: Mapping[str, AnyHead] | None = None
) -> None:
    """Have `fill` write into a sibling folder, add the record, and rename it to `out`, which must not exist. Raises `OutputError`."""
    with new_folder(out) as folder:
        fill(folder)
        for task, head in (heads or {}).items():
            write_head(folder / _HEADS / f"{task}.safetensors", head)
        write_json(folder / RECORD, record, indent=1)
