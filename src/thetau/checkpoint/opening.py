"""From what a user names (a path, a hub id, a state dict, a module) to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.compressed import expanded
from thetau.checkpoint.hub import download, key_of, look, open_headers
from thetau.checkpoint.lora import CONFIG, LoraSource, is_adapter, is_flat, lacks_config
from thetau.checkpoint.masked import MaskedStore, one_vector, store_of
from thetau.checkpoint.memory import from_mapping, from_module, open_torch, open_torch_index
from thetau.checkpoint.names import renamed
from thetau.checkpoint.quantised import dequantised
from thetau.checkpoint.quantised.gguf import open_gguf
from thetau.checkpoint.remote import is_url, open_url
from thetau.checkpoint.safetensors import SafetensorsSource, exists, open_file, open_index
from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

HUB_PREFIX = "hub:"
FLAT_FILE = "pytorch_lora_weights.safetensors"  # a pipeline's, by diffusers
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Over:
    """What an adapter is put over, and what is replaced in its names first."""

    base: Source | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


def open_source(
    what: str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Source,
    *,
    base: Source | None = None,
    rename: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """Open weights lazily: only headers are read, those of a model on the hub too; its files are downloaded when something is first read.

    `what` is a safetensors file, of a model or of a task vector, dense or compressed, or `file#task` of one that holds several; a folder
    with shards and an index, one safetensors file, torch files or a LoRA adapter (which needs `base`); a torch file; a hub id,
    `org/name` or `org/name@revision` (prefix `hub:` where a folder of that name exists); a state dict; or a module. `rename` are regular
    expressions and what replaces them in the names of tensors; of an adapter, in the paths of its modules, before they are looked up in the base.

    Raises:
        CheckpointError: nothing readable is there, or it is not what it says it is.
        AlignmentError: an adapter does not fit its base, or `rename` fits nothing, or gives two tensors one name.
    """
    opened = _opened(what, Over(base, rename))
    return opened if opened.over is not None else renamed(opened, rename)


def _opened(what: str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Source, base: Over) -> Source:
    if isinstance(what, Source):
        return what
    if isinstance(what, Mapping):
        return dequantised(from_mapping(what, f"state dict of {len(what)} tensors"))
    if not isinstance(what, str | os.PathLike):
        if not isinstance(what, torch.nn.Module):
            raise TypeError(f"`open` takes a path, a hub id, a state dict or a module. Got {type(what).__name__}.")
        return dequantised(from_module(what))
    text = os.fspath(what)
    if is_url(text):
        return dequantised(expanded(one_vector(open_url(text))))
    path = Path(text)
    if text and not text.startswith(HUB_PREFIX) and exists(path):
        return dequantised(expanded(one_vector(_open_path(path, base))))
    file, _, task = text.rpartition("#")
    if file and exists(Path(file)):
        return _adapter_of(Path(file), base, task) if Path(file).is_dir() else open_store(file).task(task)
    identifier = text.removeprefix(HUB_PREFIX)
    if HUB_ID.fullmatch(identifier):
        return dequantised(_open_hub(identifier, text, base))
    raise CheckpointError(f"{text!r}: no such file or folder, and not a hub id of the form org/name or org/name@revision.")


def open_store(path: str | os.PathLike[str]) -> MaskedStore:
    """Open a file that holds the vectors of several tasks; only its header is read.

    Raises:
        CheckpointError: nothing readable is there, it is no such file, or it is damaged.
    """
    text = os.fspath(path)
    if not is_url(text) and not exists(Path(text)):
        raise CheckpointError(f"{text}: no such file.")
    return store_of(open_url(text) if is_url(text) else _open_path(Path(text), Over()))


def _open_path(path: Path, base: Over) -> Source:
    if path.is_file():
        return _unless_adapter(path, _open_weights(path), base)
    if not path.is_dir():
        raise CheckpointError(f"{path}: neither a file nor a folder.")
    main = weights_among({found.name for found in path.iterdir()}, str(path))
    if main is not None:
        opened = _open_main(path, main)
        named = main in ("model.safetensors", "open_clip_model.safetensors") or main.endswith(".index.json")
        return opened if named else _unless_adapter(path / main, opened, base)
    if is_adapter(path) or (path / FLAT_FILE).exists():
        return _lora(path, base)
    if (path / "pytorch_model.bin.index.json").exists():
        return open_torch_index(path / "pytorch_model.bin.index.json")
    torch_files = [
        found for pattern in ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.ckpt") for found in sorted(path.glob(pattern))
    ]
    if len(set(torch_files)) == 1 or (torch_files and torch_files[0].name == "pytorch_model.bin"):
        return open_torch(torch_files[0], path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return open_gguf(files[0])
    if files:
        raise CheckpointError(f"{path}: holds {len(files)} GGUF files. Name one of them: {', '.join(p.name for p in files[:4])}.")
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


def weights_among(names: Collection[str], where: str) -> str | None:
    """Which of a folder's files opens its safetensors model, an index or the one file; None for an adapter, and where there is none.

    Raises:
        CheckpointError: there are several files and no index.
    """
    if "model.safetensors.index.json" in names:
        return "model.safetensors.index.json"
    if {"open_clip_config.json", "open_clip_model.safetensors"} <= set(names):
        return "open_clip_model.safetensors"  # beside it lies the image tower alone, for timm
    if "model.safetensors" in names:
        return "model.safetensors"
    if CONFIG in names or FLAT_FILE in names:
        return None
    here = sorted(name for name in names if "/" not in name)
    for name in here:
        if name.endswith(".safetensors.index.json"):
            return name
    tensors = [name for name in here if name.endswith(".safetensors")]
    if len(tensors) > 1:
        raise CheckpointError(
            f"{where}: holds {len(tensors)} safetensors files and no index. Name one of them: {', '.join(tensors[:4])}."
        )
    return tensors[0] if tensors else None


def _open_main(folder: Path, main: str) -> SafetensorsSource:
    return open_index(folder / main) if main.endswith(".index.json") else open_file(folder / main, folder)


def _open_hub(identifier: str, text: str, base: Over) -> Source:
    """A model on the hub, by its headers where the cache lacks its files; torch files and adapters are downloaded at once."""
    commit = look(identifier)
    main = weights_among(commit.sizes, text) if commit is not None else None
    if commit is not None and main is not None:
        folder = commit.folder
        lazy = open_headers(commit, main)
        if lazy is not None and "thetau.form" not in lazy.metadata:
            return lazy
        if lazy is not None:
            lazy.prepare()  # a compressed task vector: small, and checked part by part
    else:
        folder = download(identifier, text)
        main = weights_among({found.name for found in folder.iterdir()}, str(folder))
    if main is None:
        return _open_path(folder, base)
    opened = _open_main(folder, main)
    opened.key = key_of(folder)
    return expanded(one_vector(opened))


def _lora(path: Path, over: Over, name: str | None = None) -> LoraSource:
    """An adapter over its base. Raises `CheckpointError` where none is given."""
    if over.base is None:
        raise CheckpointError(
            f"{path}: a LoRA adapter needs its base. Give it: `thetau.open(adapter, base=...)`, or `--base` on the command line."
        )
    return LoraSource(path, over.base, name, over.rename)


def _adapter_of(path: Path, base: Over, name: str) -> Source:
    """One of several adapters in a folder: a folder of its own below it, as PEFT saves them, or tensors that bear its name."""
    inner = path / name
    if is_adapter(inner):
        return _lora(inner, base)
    return _lora(path, base, name)


def _unless_adapter(path: Path, source: Source, base: Over) -> Source:
    """A file's weights, or the adapter that it holds in kohya's or diffusers' spelling.

    Raises:
        CheckpointError: the adapter's base, or its configuration, is missing.
    """
    if is_flat(source.specs):
        return _lora(path, base)
    if lacks_config(source.specs):
        raise CheckpointError(
            f"{path}: is a PEFT adapter without its `adapter_config.json`, which says α and the kind of adapter. "
            "Give the folder that holds both."
        )
    return source


def _open_weights(path: Path) -> Source:
    if path.name.endswith(".index.json"):
        return open_torch_index(path) if ".bin" in path.name else open_index(path)
    if path.suffix == ".safetensors":
        return open_file(path)
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        return open_torch(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise CheckpointError(f"{path}: unknown kind of file. Weights end in .safetensors, .bin, .pt, .pth, .ckpt or .gguf.")
