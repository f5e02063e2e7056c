"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import torch
from torch import nn

from thetau.errors import DataError
from thetau.finetune.batches import training_batches
from thetau.finetune.config import FinetuneConfig
from thetau.finetune.paradigms import PARADIGMS
from thetau.tasks import Head, Tokens

_WINDOW = 20
_BLOW_UP = 4.0


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The learning rate of step 0, 1, …: a line up to `lr` over the warm-up, then half a cosine that ends at 0 after the last
    step.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def train(
    module: nn.Module,
    head: Head,
    tokens: Tokens,
    config: FinetuneConfig,
    tick: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `module` in place and return the loss of every step.

    `module(**columns)` gives unit vectors `[example, feature]`; `tick(step, loss)` is called after each step. The result
    depends on the arguments alone: the caller's random state is neither read nor changed. Raises `DataError` when the loss
    diverges.
    """
    paradigm = PARADIGMS[config.paradigm]
    chosen = {name: parameter for name, parameter in module.named_parameters() if paradigm.trainable(name)}
    if not chosen:
        raise DataError(f"paradigm {config.paradigm!r}: the model has no parameter that it trains.")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in chosen.values() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in chosen.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        fused=True,
    )
    labels = torch.tensor(tokens.labels)
    losses: list[float] = []
    batches = islice(training_batches(tokens.lengths, config.batch_size, config.seed), config.steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module.train()
        try:
            for step, indices in enumerate(batches):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(step, config)
                logits = head.logits(module(**tokens.batch(indices)))
                loss = nn.functional.cross_entropy(logits, labels[indices])
                losses.append(loss.item())
                _check(losses, head.classes.shape[0], config)
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(chosen.values(), config.max_grad_norm)
                optimiser.step()
                if tick is not None:
                    tick(step + 1, losses[-1])
        finally:
            module.eval()
            for parameter in module.parameters():
                parameter.grad = None
                parameter.requires_grad_(True)
    return losses


def _check(losses: list[float], classes: int, config: FinetuneConfig) -> None:
    """Stop when the loss is not a number, or its recent mean is several times that of the start and of guessing."""
    step = len(losses)
    remedy = (
        f"Lower the learning rate (lr={config.lr:g}) or lengthen the warm-up (warmup={config.warmup:g}); nothing was written."
    )
    if not math.isfinite(losses[-1]):
        raise DataError(f"the loss diverged: {losses[-1]} at step {step} of {config.steps}. {remedy}")
    recent = sum(losses[-_WINDOW:]) / _WINDOW
    start = max(sum(losses[:_WINDOW]) / _WINDOW, math.log(classes))
    if step >= 2 * _WINDOW and recent > _BLOW_UP * start:
        raise DataError(
            f"the loss diverged: its mean over the last {_WINDOW} steps is {recent:.3g} at step {step} of {config.steps}, "
            f"at the start it was {start:.3g}. {remedy}"
        )
