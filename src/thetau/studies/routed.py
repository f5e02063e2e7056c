"""Tasks measured with what lies beside a merged model, each input's part being chosen by a router and not by the task's name (Twin-Merging)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.measures import Measure
from thetau.evidence.twin import TaskRouter
from thetau.facade import Expression


def measure_routed(
    evaluator: Evaluator,
    router: TaskRouter,
    merged: Mapping[str, Tensor],
    models: Mapping[str, Expression],
    tasks: Sequence[str],
    split: str,
    *,
    origin: str = "the merged model",
) -> tuple[dict[str, Measure], dict[str, float | None]]:
    """Task → its metric, and how often the router holds its own task for the likeliest (None where it does not know the task).

    Args:
        models: task → the merged model with that task's part.

    Raises:
        DataError: the router knows a task for which there is no model.
    """
    lost = [task for task in router.tasks if task not in models]
    if lost:
        raise DataError(
            f"{origin}: its router knows the task {lost[0]!r}, for which nothing lies beside the model. Merge again with `--tasks`, and learn the router "
            "again: thetau evidence twin."
        )
    evaluator.load(merged, origin)
    with torch.inference_mode():
        shares = {task: router(evaluator.read(task, split).float()).softmax(-1) for task in tasks}
    made = (
        _top(evaluator, router, models, shares, split)
        if router.mode == "top"
        else _soft(evaluator, router, merged, models, shares, split)
    )
    found = {task: evaluator.judge(task, split, read)[0] for task, read in made.items()}
    right = {
        task: float((share.argmax(-1) == router.tasks.index(task)).float().mean()) if task in router.tasks else None
        for task, share in shares.items()
    }
    return found, right


def _top(
    evaluator: Evaluator, router: TaskRouter, models: Mapping[str, Expression], shares: Mapping[str, Tensor], split: str
) -> dict[str, Tensor]:
    """Features by the model of each input's likeliest task; every model is loaded once."""
    rows: dict[str, dict[int, Tensor]] = {task: {} for task in shares}
    for place, name in enumerate(router.tasks):
        picked = {task: (share.argmax(-1) == place).nonzero().flatten().tolist() for task, share in shares.items()}
        if not any(picked.values()):
            continue
        evaluator.load(models[name].state_dict(), f"the model of {name}")
        for task, mine in picked.items():
            if mine:
                rows[task] |= dict(zip(mine, evaluator.read(task, split, mine), strict=True))
    return {task: torch.stack([row for _, row in sorted(held.items())]) for task, held in rows.items()}


def _soft(
    evaluator: Evaluator,
    router: TaskRouter,
    merged: Mapping[str, Tensor],
    models: Mapping[str, Expression],
    shares: Mapping[str, Tensor],
    split: str,
) -> dict[str, Tensor]:
    """Features of each input by weights of its own, θ* + Σ_t share_t (θ_t − θ*), all parts being held in memory."""
    encoder = evaluator.encoder
    parts: dict[str, Tensor] = {}
    for place, name in enumerate(router.tasks):
        for key, tensor in models[name].state_dict().items():
            if tensor.is_floating_point():
                held = parts.setdefault(key, torch.zeros(len(router.tasks), *tensor.shape))
                held[place] = tensor.float() - merged[key].float()
    moved = {key: part for key, part in parts.items() if bool(part.any())}
    live = encoder.backbone.state_dict()
    places = {stored: live[name] for name, stored in encoder.names.items() if stored in moved}
    made: dict[str, list[Tensor]] = {task: [] for task in shares}
    for task, share in shares.items():
        for row, weights in enumerate(share):
            with torch.no_grad():
                for stored, place in places.items():
                    mixed = merged[stored].float() + torch.tensordot(weights.to(moved[stored]), moved[stored], 1)
                    place.copy_(mixed)
            made[task] += list(evaluator.read(task, split, [row]))
    return {task: torch.stack(rows) for task, rows in made.items()}
