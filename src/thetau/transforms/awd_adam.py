"""AWD in full dimension with Adam, for comparison: the same objective, another landing point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thetau.statistics.gram import cosines


@dataclass(frozen=True)
class FullDelta:
    """δ by tensor name, each `[*shape]`, and which task vectors are not zero everywhere, `[task]`."""

    entries: Mapping[str, Tensor]
    alive: Tensor


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
    alive = torch.stack([stacks[name].reshape(len(stacks[name]), -1).any(1) for name in names]).any(0)
    if int(alive.sum()) < 2:
        return FullDelta({name: torch.zeros_like(stacks[name][0]) for name in names}, alive)
    if scope == "vector":
        shapes = {name: stacks[name][0].shape for name in names}
        joined = torch.cat([stacks[name].reshape(len(alive), -1) for name in names], 1)
        delta = _descend(joined[alive][:, None], alpha, reverse, steps, lr)[0]
        pieces = delta.split([shapes[name].numel() for name in names])
        found = {name: piece.reshape(shapes[name]) for name, piece in zip(names, pieces, strict=True)}
    else:
        found = {}
        for name in names:
            stack = stacks[name][alive]
            rows = stack.reshape(len(stack), stack.shape[1] if scope == "row" and stack.ndim > 1 else 1, -1)
            found[name] = _descend(rows, alpha, reverse, steps, lr).reshape(stack.shape[1:])
    return FullDelta(found, alive)


def _descend(rows: Tensor, alpha: float, reverse: bool, steps: int, lr: float) -> Tensor:
    """δ of shape `[group, n]` for vectors `[task, group, n]`, one objective a group."""
    delta = torch.zeros_like(rows[0], requires_grad=True)
    rms = float(rows.double().square().mean().sqrt())
    optimiser = torch.optim.Adam([delta], lr=lr * rms)
    k = len(rows)
    for _ in range(steps):
        with torch.enable_grad():
            left = (rows - delta).transpose(0, 1)
            cos = cosines(left @ left.transpose(1, 2)).abs()
            pairs = (cos.sum((1, 2)) - cos.diagonal(dim1=1, dim2=2).sum(1)) / (k * (k - 1))
            norm = (delta.square().sum(1) + torch.finfo(delta.dtype).tiny).sqrt()
            loss = ((-pairs if reverse else pairs) + alpha * norm).sum()
            (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimiser.step()
    return delta.detach()
