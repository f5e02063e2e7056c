"""Small safetensors files, from tensors that are all in memory. Outputs as large as a model are streamed, see `checkpoint.writer`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.disk.files import replacing
from thetau.checkpoint.dtypes import WRITTEN, Dtype, dtype_name
from thetau.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, of any device, as one safetensors file, whole or not at all.

    Raises:
        OutputError: the file cannot be written, or a tensor has a dtype that the format has not.
    """
    for name, tensor in tensors.items():
        if dtype_name(tensor.dtype) not in WRITTEN:
            raise OutputError(
                f"{path}: {name!r} is of {tensor.dtype}, which safetensors cannot hold. Known: {', '.join(dtype.name for dtype in WRITTEN.values())}."
            )
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that every tensor is aligned
    head, _ = header([(name, Dtype.of(tensors[name].dtype), tuple(tensors[name].shape)) for name in names], metadata or {})
    with replacing(path) as file:
        file.write(head)
        for name in names:
            raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if raw.numel():
                file.write(raw.numpy().data)


def header(entries: Iterable[tuple[str, Dtype, Sequence[int]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The head of a file whose tensors (name, dtype, shape) follow each other in this order, and the bytes that they take."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, dtype, shape in entries:
        end = place + prod(shape) * dtype.itemsize
        content[name] = {"dtype": WRITTEN[dtype.title].name, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, place
