"""Weights as plain dictionaries: read them, and name them by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from thetau.errors import CheckpointError
from thetau.facade import open as open_weights


def read_weights(path: str | Path, base: Path | None = None) -> dict[str, Tensor]:
    """All the tensors of a model's checkpoint, on the CPU, by the names that it gives them; `base` is the model that an adapter belongs to.

    Raises `CheckpointError`: it cannot be read, or holds a task vector.
    """
    opened = open_weights(path, base=base)
    if not opened.is_model:
        raise CheckpointError(
            f"{path}: a model is needed to run, this is a task vector. Add it to its base first: thetau vector apply."
        )
    weights: dict[str, Tensor] = opened.state_dict()
    return weights


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """A hexadecimal digest of names, dtypes, shapes and bits; the order of the tensors does not count.

    Examples:
        >>> weights_hash({"w": torch.zeros(2)}) == weights_hash({"w": torch.zeros(2)})
        True
        >>> weights_hash({"w": torch.zeros(2)}) == weights_hash({"w": torch.zeros(2, 1)})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
