"""From what a user names (a path, a hub id, a state dict, a module) to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thetau.checkpoint.compressed import expanded
from thetau.checkpoint.disk import SIDE_FILES
from thetau.checkpoint.lora import LoraSource, is_adapter
from thetau.checkpoint.masked import MaskedStore, one_vector, store_of
from thetau.checkpoint.memory import from_mapping, from_module, open_torch, open_torch_index
from thetau.checkpoint.remote import is_url, open_url
from thetau.checkpoint.safetensors import exists, open_file, open_index
from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")


def open_source(what: str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Source, *, base: Source | None = None) -> Source:
    """Open weights lazily: only headers are read.

    `what` is a safetensors file, of a model or of a task vector, dense or compressed, or `file#task` of one that holds several; a folder
    with shards and an index, one safetensors file, torch files or a LoRA adapter (which needs `base`); a torch file; a hub id,
    `org/name` or `org/name@revision` (prefix `hub:` where a folder of that name exists); a state dict; or a module.

    Raises:
        CheckpointError: nothing readable is there, or it is not what it says it is.
    """
    if isinstance(what, nn.Module):
        return from_module(what)
    if isinstance(what, Mapping):
        return from_mapping(what, f"state dict of {len(what)} tensors")
    if isinstance(what, Source):
        return what
    if not isinstance(what, str | os.PathLike):
        raise TypeError(f"`open` takes a path, a hub id, a state dict or a module. Got {type(what).__name__}.")
    text = os.fspath(what)
    if is_url(text):
        return expanded(one_vector(open_url(text)))
    path = Path(text)
    if text and not text.startswith(HUB_PREFIX) and exists(path):
        return expanded(one_vector(_open_path(path, base)))
    file, _, task = text.rpartition("#")
    if file and exists(Path(file)):
        return open_store(file).task(task)
    identifier = text.removeprefix(HUB_PREFIX)
    if HUB_ID.fullmatch(identifier):
        return _open_path(_download(identifier, text), base)
    raise CheckpointError(f"{text!r}: no such file or folder, and not a hub id of the form org/name or org/name@revision.")


def open_store(path: str | os.PathLike[str]) -> MaskedStore:
    """Open a file that holds the vectors of several tasks; only its header is read.

    Raises:
        CheckpointError: nothing readable is there, it is no such file, or it is damaged.
    """
    text = os.fspath(path)
    if not is_url(text) and not exists(Path(text)):
        raise CheckpointError(f"{text}: no such file.")
    return store_of(open_url(text) if is_url(text) else _open_path(Path(text), None))


def _open_path(path: Path, base: Source | None) -> Source:
    if path.is_file():
        return _open_weights(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: neither a file nor a folder.")
    if (path / "model.safetensors.index.json").exists():
        return open_index(path / "model.safetensors.index.json")
    if (path / "open_clip_config.json").exists() and (path / "open_clip_model.safetensors").exists():
        return open_file(path / "open_clip_model.safetensors", path)  # beside it lies the image tower alone, for timm
    if (path / "model.safetensors").exists():
        return open_file(path / "model.safetensors", path)
    if is_adapter(path):
        if base is None:
            raise CheckpointError(
                f"{path}: a LoRA adapter needs its base. Give it: `thetau.open(adapter, base=...)`, or `--base` on the command line."
            )
        return LoraSource(path, base)
    for index in sorted(path.glob("*.safetensors.index.json")):
        return open_index(index)
    tensors = sorted(path.glob("*.safetensors"))
    if len(tensors) == 1:
        return open_file(tensors[0], path)
    if len(tensors) > 1:
        raise CheckpointError(
            f"{path}: holds {len(tensors)} safetensors files and no index. Name one of them: {', '.join(p.name for p in tensors[:4])}."
        )
    if (path / "pytorch_model.bin.index.json").exists():
        return open_torch_index(path / "pytorch_model.bin.index.json")
    torch_files = [
        found for pattern in ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.ckpt") for found in sorted(path.glob(pattern))
    ]
    if len(set(torch_files)) == 1 or (torch_files and torch_files[0].name == "pytorch_model.bin"):
        return open_torch(torch_files[0], path)
    if any(path.glob("**/zero_pp_rank_*")):
        raise CheckpointError(
            f"{path}: holds the parts of DeepSpeed's ZeRO. Run `zero_to_fp32.py`, which lies beside them, and give what that writes."
        )
    if any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path}: holds the shards of torch's distributed checkpoint (FSDP). Join them with `python -m torch.distributed.checkpoint.format_utils "
            "dcp_to_torch FOLDER FILE`, and give the file."
        )
    there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{path}: holds no weights that can be read (safetensors, LoRA adapter, torch files). It holds: {there}."
    )


def _open_weights(path: Path) -> Source:
    if path.name.endswith(".index.json"):
        return open_torch_index(path) if ".bin" in path.name else open_index(path)
    if path.suffix == ".safetensors":
        return open_file(path)
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        return open_torch(path)
    raise CheckpointError(f"{path}: unknown kind of file. Weights end in .safetensors, .bin, .pt, .pth or .ckpt.")


def _download(identifier: str, text: str) -> Path:
    """A snapshot from the hub, or from its local cache when offline; safetensors first, torch files only where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = identifier.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors", *SIDE_FILES]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.bin", *SIDE_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{text}: no such file or folder, and the hub has no such model within reach ({reason})."
        ) from error
    return folder
