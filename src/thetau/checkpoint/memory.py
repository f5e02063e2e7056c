"""Weights that already lie in memory: state dicts, modules, and torch's own files (read with `weights_only=True`)."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thetau.checkpoint.dtypes import TO_SAFETENSORS, dtype_name
from thetau.checkpoint.safetensors import home_of, read_weight_map, shard_path
from thetau.checkpoint.source import Source, Spec, span
from thetau.errors import CheckpointError


class MemorySource(Source):
    """A state dict. Its tensors are read where they are and never written to."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        label: str,
        key: str | None = None,
        folder: Path | None = None,
        degree: int = 1,
        notes: tuple[str, ...] = (),
    ) -> None:
        if not tensors:
            raise CheckpointError(f"{label}: holds no tensor.")
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.label, self.folder, self.degree, self._notes = label, folder, degree, notes
        self.partial = degree == 0
        self.key = key or f"memory:{hash(tuple(map(_place, self._tensors.items())))}"
        self.specs = {name: Spec(name=name, shape=tuple(t.shape), dtype=t.dtype, file=label) for name, t in self._tensors.items()}
        self.shared = _shared(self._tensors)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of rows `start:stop`, on the CPU."""
        start, stop = span(self.specs[name], start, stop)
        tensor = self._tensors[name]
        rows = tensor[start:stop] if tensor.ndim else tensor
        return rows.to("cpu").contiguous()

    def fingerprint(self) -> str:
        """BLAKE2 of all names and values."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b()
        for name in sorted(self.specs):
            spec = self.specs[name]
            digest.update(f"{name}:{spec.dtype}:{spec.shape}".encode())
            flat = self._tensors[name].to("cpu").contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return digest.hexdigest()


def _place(item: tuple[str, Tensor]) -> tuple[object, ...]:
    """Where a tensor lies: two openings of the same memory are the same weights."""
    name, tensor = item
    place = tensor.data_ptr() if tensor.numel() else 0
    version = 0 if tensor.is_inference() else tensor._version  # moves when a tensor is changed in place
    return name, place, version, tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the very memory of another one → the first name of it."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
        if place in first:
            found[name] = first[place]
        else:
            first[place] = name
    return found


def from_mapping(tensors: Mapping[Any, Any], label: str) -> MemorySource:
    """A state dict in memory.

    Raises:
        CheckpointError: a key is not a string, or a value is not a dense tensor that has values and a dtype of safetensors.
    """
    _check(tensors, label)
    return MemorySource(tensors, label=label)


def _check(tensors: Mapping[Any, Any], label: str) -> None:
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{label}: a state dict maps names to dense tensors. Got {type(value).__name__} at {name!r}.")
        if value.is_meta:
            raise CheckpointError(f"{label}: {name!r} lies on the meta device and has no values. Load the weights first.")
        if value.dtype not in TO_SAFETENSORS:
            known = ", ".join(map(dtype_name, TO_SAFETENSORS))
            raise CheckpointError(
                f"{label}: {name!r} is {dtype_name(value.dtype)}, which cannot be stored. Known dtypes: {known}."
            )


def from_module(module: nn.Module) -> MemorySource:
    """A module's parameters and buffers, as its `state_dict` names them."""
    return from_mapping(module.state_dict(), type(module).__name__)


def open_torch(path: Path, folder: Path | None = None) -> MemorySource:
    """A `.bin`, `.pt` or `.pth` file, memory-mapped where its format allows; `folder` where it was found through its folder."""
    tensors, notes = _load(path)
    _check(tensors, str(path))
    return MemorySource(tensors, label=str(path), key=_stamp([path]), folder=folder or home_of(path), notes=notes)


def open_torch_index(index: Path) -> MemorySource:
    """Shards of torch files, by their `pytorch_model.bin.index.json`."""
    weight_map = read_weight_map(index)
    paths = [shard_path(index.parent, name, index) for name in dict.fromkeys(weight_map.values())]
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for path in paths:
        part, said = _load(path)
        tensors |= {name: tensor for name, tensor in part.items() if name in weight_map}
        notes += said
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{index}: names {lost[0]!r}, which no shard holds ({len(lost)} such tensors). The index and its shards do not belong together."
        )
    _check(tensors, str(index.parent))
    return MemorySource(tensors, label=str(index.parent), key=_stamp(paths), folder=index.parent, notes=tuple(notes))


def _stamp(paths: list[Path]) -> str:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return "file:" + hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _load(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not path.is_file():  # a FIFO would hang us
        raise CheckpointError(f"{path} is not a regular file. Give the path of a torch file.")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError) as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: no zip, no map
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and loading it could run code, so it was not loaded. Save the weights as safetensors where you trust them."
        ) from error
    except Exception as error:  # a damaged pickle fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable torch file ({reason}). Copy or download it again.") from error
    if isinstance(content, Mapping) and len(content) <= 4:  # a training checkpoint around the weights
        inner = [content[key] for key in ("state_dict", "model", "module") if isinstance(content.get(key), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold a state dict. Got {type(content).__name__}.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    other = [str(name) for name in content if name not in tensors]
    notes = (f"{path}: {len(other)} entries that are not tensors were left out ({', '.join(other[:3])}).",) if other else ()
    return tensors, notes
