"""Weights that already lie in memory: state dicts, modules, and torch's own files (read with `weights_only=True`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.dtypes import KNOWN, Dtype, dtype_name
from thetau.checkpoint.safetensors import home_of, read_weight_map, shard_path
from thetau.checkpoint.source import Source, Spec, span
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

_INNER = ("model_state_dict", "state_dict", "model", "module", "params", "net", "network", "weights", "generator")
_ASIDE = re.compile(r"optim|sched|scaler|ema|callback|loop|hyper|config|args|rng|random|state_dict_|stat", re.IGNORECASE)
ZERO_3 = (
    "They are placeholders of DeepSpeed's ZeRO-3, which keeps the values in its own files: run its `zero_to_fp32.py` on the checkpoint's folder, and give "
    "what that writes."
)


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
        self.specs = {
            name: Spec(name=name, shape=tuple(t.shape), dtype=Dtype.of(t.dtype), file=label) for name, t in self._tensors.items()
        }
        self.twins = _shared(self._tensors)

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
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{label}: a state dict maps names to dense tensors. Got {type(value).__name__} at {name!r}.")
        if value.is_meta:
            raise CheckpointError(f"{label}: {name!r} lies on the meta device and has no values. Load the weights first.")
        if dtype_name(value.dtype) not in KNOWN:
            known = ", ".join(KNOWN)
            raise CheckpointError(
                f"{label}: {name!r} is {dtype_name(value.dtype)}, which cannot be stored. Known dtypes: {known}."
            )


def from_module(module: nn.Module) -> MemorySource:
    """A module's parameters and buffers, as its `state_dict` names them."""
    return from_mapping(module.state_dict(), type(module).__name__)


def open_torch(path: Path, folder: Path | None = None) -> MemorySource:
    """A `.bin`, `.pt`, `.pth` or `.ckpt` file, memory-mapped where its format allows; `folder` where it was found through its folder."""
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
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, in which timm keeps its arguments
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
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold a state dict. Got {type(content).__name__}.")
    content, said = _weights_in(content, path)
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    other = [str(name) for name in content if name not in tensors]
    notes = (
        *said,
        *((f"{path}: {len(other)} entries that are not tensors were left out ({', '.join(other[:3])}).",) if other else ()),
    )
    empty = [name for name, value in tensors.items() if tuple(value.shape) == (0,)]
    if tensors and 2 * len(empty) > len(tensors):
        raise CheckpointError(f"{path}: {len(empty)} of its {len(tensors)} tensors are empty, such as {empty[0]!r}. {ZERO_3}")
    return tensors, notes


def _weights_in(content: Mapping[Any, Any], path: Path) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """The weights inside a training checkpoint, and what of it is left out; a plain state dict as it is.

    Known by their keys: PyTorch's own habit (`model_state_dict`), Lightning, timm and open_clip (`state_dict`), nanoGPT (`model`), DeepSpeed
    (`module`), and others' `params`, `net`, `weights`. Averages that lie beside them (`state_dict_ema`) are not taken.

    Raises:
        CheckpointError: it holds several state dicts under names that are not known.
    """
    inner = {str(key): value for key, value in content.items() if _holds_tensors(value)}
    known = next((key for key in _INNER if key in inner), None)
    if known is None and any(isinstance(value, torch.Tensor) for value in content.values()):
        return content, ()
    models = [key for key in inner if not _ASIDE.search(key)]
    if known is None and len(models) > 1:
        raise CheckpointError(
            f"{path}: holds several sets of tensors, {', '.join(map(repr, models[:4]))}, and none is called {', '.join(_INNER[:3])}. Save the one that is "
            "wanted as a file of its own."
        )
    chosen = known or next(iter(models), None)
    if chosen is None:
        return content, ()
    left = [str(key) for key in content if str(key) != chosen]
    said = (
        (f"{path}: the weights are those under {chosen!r}; {', '.join(left[:6])} {'is' if len(left) == 1 else 'are'} left out.",)
        if left
        else ()
    )
    deeper, more = _weights_in(inner[chosen], path)
    return deeper, (*said, *more)


def _holds_tensors(value: Any) -> bool:
    """Whether it is a state dict, or holds one at the next level."""
    return isinstance(value, Mapping) and any(
        isinstance(one, torch.Tensor) or (isinstance(one, Mapping) and any(isinstance(two, torch.Tensor) for two in one.values()))
        for one in value.values()
    )
