"""Codes out of words and bytes, and columns of a stored matrix without the rest of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_ROW = 4096  # bytes of a row up to which all of it is read rather than a piece of it
BLOCK = 1 << 20  # bytes that are read at once where whole rows are
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def columns(stored: Source, name: str, start: int, stop: int) -> Tensor:
    """Columns `start:stop` of a stored matrix: `[rows, stop - start]`. Of long rows that lie on a disk, only these bytes are read.

    Raises:
        CheckpointError: the file ends early.
    """
    spec = stored.specs[name]
    row_bytes, width = spec.row_elements * spec.dtype.itemsize, (stop - start) * spec.dtype.itemsize
    place = stored.place(name)
    out = torch.empty((spec.rows, stop - start), dtype=spec.dtype.torch)
    if place is None or row_bytes <= WHOLE_ROW or 2 * width >= row_bytes:
        step = max(1, BLOCK // max(1, row_bytes))
        for first in range(0, spec.rows, step):
            last = min(first + step, spec.rows)
            out[first:last] = stored.read(name, first, last)[:, start:stop]
        return out
    file, offset = place
    view = out.view(torch.uint8).reshape(-1).numpy().data
    at = offset + start * spec.dtype.itemsize
    for row in range(spec.rows):
        got = os.preadv(file, [view[row * width : (row + 1) * width]], at + row * row_bytes)
        if got != width:
            raise CheckpointError(f"{spec.file}: the file ended inside tensor {name!r}; it changed while it was read.")
    return out


def from_words(words: Tensor, bits: int) -> Tensor:
    """Codes out of 32-bit words `[words, columns]`, a stream of bits down each column, the lowest bit first: `[codes, columns]`, integers."""
    if 32 % bits == 0:  # a word holds whole codes
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[:, None] >> shifts[:, None]) & ((1 << bits) - 1)).reshape(-1, words.shape[1])
    count = words.shape[0] * 32 // bits
    bit = torch.arange(count) * bits
    word, offset = bit // 32, (bit % 32)[:, None]
    plain = words.long() & 0xFFFFFFFF
    after = torch.cat([plain[1:], torch.zeros_like(plain[:1])])  # a code may begin in one word and end in the next
    return ((plain[word] >> offset) | (after[word] << (32 - offset))) & ((1 << bits) - 1)


def nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """The two halves of each byte, side by side along the last axis, int64."""
    low, high = (packed & 0xF).long(), (packed >> 4).long()
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, -1).reshape(*packed.shape[:-1], -1)


def exponents(codes: Tensor) -> Tensor:
    """Powers of two that a byte stores (E8M0): 2^(code − 127), float32."""
    return torch.ldexp(torch.ones(codes.shape), codes.int() - 127)
