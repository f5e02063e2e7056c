"""A fine-tuned model on disk: an ordinary checkpoint folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from thetau.errors import OutputError
from thetau.tasks.head import AnyHead
from thetau.tasks.heads import read_head, write_head

RECORD = "thetau_finetune.json"
_WEIGHTS = "model.safetensors"
_HEADS = "heads"
_ADAPTER = "adapter_model.safetensors"
# What is not copied from the base: weights in any form, pages about it, records of how it was made.
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".index.json", ".md", ".gitattributes")
_RECORDS = (RECORD, "thetau.json", "data_config.json", "training_args.bin")


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
        _copy_side_files(base, folder)
        note = {"format": "pt"} | ({"thetau.space": "tangent"} if record.get("space") == "tangent" else {})
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / _WEIGHTS, metadata=note)
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
    if out.exists():
        raise OutputError(f"{out}: the output folder must not exist; it does. Choose another one or remove it.")
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        fill(temporary)
        for task, head in (heads or {}).items():
            write_head(temporary / _HEADS / f"{task}.safetensors", head)
        (temporary / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in temporary.rglob("*"):
            _fsync(path)
        temporary.chmod(0o755)
        temporary.rename(out)
        _fsync(out.parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error}); nothing was left there.") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_side_files(base: Path, target: Path) -> None:
    for path in sorted(base.iterdir()):
        if path.is_dir():
            if (path / "config.json").is_file() and not any(
                path.glob("*.safetensors")
            ):  # a sentence-transformers module, as 1_Pooling
                (target / path.name).mkdir()
                shutil.copyfile(path / "config.json", target / path.name / "config.json")
        elif not path.name.startswith(".") and not path.name.endswith(_LEFT) and path.name not in _RECORDS:
            shutil.copyfile(path, target / path.name)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
