"""Task vectors of one matrix, as fine-tuning makes them, and streaming reductions called on them without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from synthetic import site
from thetau.methods.wudi_solvers import Interference
from thetau.parts import Method, StreamReduction

PAPER_RMS = 2.4e-4


def task_vectors(tasks: int, d_out: int, d_in: int, *, rms: float = PAPER_RMS, seed: int = 0) -> list[Tensor]:
    """Matrices with a decaying spectrum and a part in common, as fine-tuning makes them, of the paper's scale."""
    generator = torch.Generator().manual_seed(seed)
    side = min(d_out, d_in)
    decay = torch.arange(1, side + 1).float() ** -0.5
    shared = torch.randn(d_out, d_in, generator=generator)
    found = []
    for _ in range(tasks):
        left, right = torch.randn(d_out, side, generator=generator), torch.randn(side, d_in, generator=generator)
        matrix = (left * decay) @ right / decay.norm() + 0.3 * shared
        found.append(rms * matrix / matrix.square().mean().sqrt())
    return found


def interference(vectors: list[Tensor], **fields: Any) -> Tensor:
    return fed(Interference(**fields), vectors)


def reduced(method: Method, vectors: Sequence[Tensor]) -> Tensor:
    """What a method's streaming reduction makes of one matrix."""
    part = method.chain().reduction
    assert isinstance(part, StreamReduction)
    return fed(part, vectors)


def fed(part: StreamReduction, vectors: Sequence[Tensor]) -> Tensor:
    total = part.init(*vectors[0].shape, len(vectors))
    for index, vector in enumerate(vectors):
        total = part.add(total, vector.clone(), site([f"t{index}"]))
    return part.result(total, site([f"t{index}" for index in range(len(vectors))]))
