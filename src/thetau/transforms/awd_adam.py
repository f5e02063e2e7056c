"""AWD in full dimension with Adam, for comparison: the same objective, another landing point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.linalg.rounding import MARGIN, eps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FullDelta:
    """δ by tensor name, each `[*shape]`, and which task vectors it is taken from: `[task, *]`, true where a task is not zero over the scope."""

    entries: Mapping[str, Tensor]
    alive: Mapping[str, Tensor]


def full_dimension(stacks: Mapping[str, Tensor], *, alpha: float, scope: str, reverse: bool, steps: int, lr: float) -> FullDelta:
    """Descend from δ = 0.

    Args:
        stacks: every tensor's task vectors, `[task, *shape]`.
        alpha: weight of ‖δ‖.
        scope: "vector", "tensor" or "row": over what cosines and ‖δ‖ are taken.
        reverse: maximise the mean |cos| instead.
        steps: Adam steps.
        lr: step size, in units of the rms of a tensor's entries.
    """
    names = sorted(stacks)
    if scope == "vector":
        groups = [torch.cat([stacks[name].reshape(len(stacks[name]), 1, -1) for name in names], 2)]
        sizes = [stacks[name][0].numel() for name in names]
    else:
        groups = [
            stacks[n].reshape(len(stacks[n]), stacks[n].shape[1] if scope == "row" and stacks[n].ndim > 1 else 1, -1)
            for n in names
        ]
    alive = [rows.any(2) for rows in groups]
    deltas = [_descend(rows, seen, alpha, reverse, steps, lr) for rows, seen in zip(groups, alive, strict=True)]
    if scope == "vector":
        deltas, alive = list(torch.split(deltas[0][0], sizes)), alive * len(names)
    return FullDelta(
        {name: delta.reshape(stacks[name].shape[1:]) for name, delta in zip(names, deltas, strict=True)},
        dict(zip(names, alive, strict=True)),
    )


def _descend(rows: Tensor, alive: Tensor, alpha: float, reverse: bool, steps: int, lr: float) -> Tensor:
    """δ of shape `[group, n]` for vectors `[task, group, n]`, one objective a group, over the tasks that are alive in it.

    Groups with fewer than two such tasks get δ = 0. A cosine that is rounding of float32 vectors is zero and pulls at nothing.
    """
    delta = torch.zeros_like(rows[0], requires_grad=True)
    delta.grad = torch.zeros_like(delta)
    optimiser = torch.optim.Adam([delta], lr=lr * float(rows.double().square().mean().sqrt()))
    both = alive.T[:, :, None] & alive.T[:, None, :] & ~torch.eye(len(rows), dtype=torch.bool)
    pairs = both.sum((1, 2))
    rounding = MARGIN * eps(rows.dtype)
    active = pairs > 0
    for _ in range(steps):
        with torch.enable_grad():
            left = (rows - delta).transpose(0, 1)
            inner = left @ left.transpose(1, 2)
            norm = inner.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(inner.dtype).tiny).sqrt()
            cos = (inner / (norm[:, :, None] * norm[:, None, :])).abs()
            cos = cos.masked_fill(~both | (cos <= rounding), 0)  # Adam would make full steps of it
            mean = cos.sum((1, 2)) / pairs.clamp(min=1)
            length = (delta.square().sum(1) + torch.finfo(delta.dtype).tiny).sqrt()
            loss = (((-mean if reverse else mean) + alpha * length) * active).sum()
            (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimiser.step()
    return delta.detach()
