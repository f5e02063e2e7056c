r"""Localisation with data: a sparse mask of a task vector, learned on a few examples a class.

Localize-and-Stitch, He et al. 2024, <https://arxiv.org/abs/2408.13656>: minimise $\ell(\theta_0 + \sigma(S) \odot \tau) + \lambda
\lVert \sigma(S) \rVert_1$ over real S by gradient descent, from $S = \pm b$ on and off the largest entries of τ; the mask is where
$\sigma(S)$ rounds to 1. The published code differs in its penalty: it moves S by $+\lambda\, \sigma'(S)\, \mathrm{sgn}(S)$, *away* from 0
on both sides, so it makes the mask certain of what it has rather than small. Both are here, by name: `l1` and `polarise`.

As in that code the penalty's step stands outside the learning rate, one step goes over the whole few-shot set, and the model is in
evaluation mode. Departs in scale: the code's rate of 1e7 belongs to vectors of CLIP's and RoBERTa's size. Here `lr` is relative to the
root mean square of the first gradient of S at $\sigma' = 1/4$, so that scaling loss or vector changes nothing; `lr_absolute` takes it as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from thetau.checkpoint import kind_of
from thetau.checkpoint.memory import MemorySource
from thetau.compression import Compressed, Sparse, compress
from thetau.engine.executor import Engine
from thetau.errors import AlignmentError, DataError
from thetau.evidence.config import MaskConfig
from thetau.facade import Expression
from thetau.finetune.batches import training_batches
from thetau.finetune.lesson import to_device
from thetau.models import Encoder, weights_hash
from thetau.parts import Selection
from thetau.statistics.quantile import kept_count
from thetau.tasks import Task, encode, make_head
from thetau.tasks.encoding import ordered_batches
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs
from thetau.vectors import Combination
from thetau.vectors.combination import require_vector


@final
@dataclass(frozen=True, kw_only=True)
class Learned:
    """A mask by the live model's parameter names, bool, and the loss on the few-shot set.

    `base`: without τ. `whole`: with all of it. `start`: with the mask that it began with. `losses`: before each step, with σ(S) in
    place of the mask. `last`: with the mask that was learned.
    """

    masks: Mapping[str, Tensor]
    base: float
    whole: float
    start: float
    losses: tuple[float, ...]
    last: float
    examples: int


@final
@dataclass(frozen=True, kw_only=True)
class Localised:
    """What `localize` wrote: the file, the mask's density among the vector's entries, and the losses of `Learned`.

    `error`: ‖τ − γ⊙τ‖ / ‖τ‖.
    """

    file: Compressed
    task: str
    density: float
    error: float
    base: float
    whole: float
    start: float
    losses: tuple[float, ...]
    last: float
    examples: int
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "file": self.file.to_json()}


def localize(
    encoder: Encoder,
    task: Task,
    vector: Combination,
    path: str | Path,
    config: MaskConfig | None = None,
    *,
    head: AnyHead | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    exclude: Sequence[str] = (),
    engine: Engine | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> Localised:
    """Learn a mask for a task vector on a task's training split, and write γ ⊙ τ as a sparse task vector.

    Args:
        encoder: holds the base's weights, before and after.
        vector: over the same base, in the model's own space.
        path: of the file, new, ending in `.safetensors`.
        head: by default the task's frozen head, made from the base.
        dtype: of the values. exclude: patterns of tensors whose part of the vector is dropped.
        tick: told of each step and its loss.

    Raises:
        DataError: the encoder does not hold its base, the vector is zero or of the tangent space, the data are bad, the loss diverges.
        AlignmentError: the vector's tensors are not the encoder's.
        OutputError: the file cannot be written.
    """
    config = config or MaskConfig()
    require_vector(vector, "Localising")
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "a mask is learned over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    if any(source.metadata.get("thetau.space") == "tangent" for source in vector.sources()):
        raise DataError(
            f"{vector.label}: belongs to the tangent space, where θ₀ + γ⊙τ is not the model. Masks are learned for vectors of standard, "
            "attention-only or LoRA fine-tuning."
        )
    tau = Expression(vector.terms, reference=vector.reference).state_dict(exclude=exclude, engine=engine)
    live, left = _live(encoder, vector, tau, config)
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    head = head or make_head(encoder, task, **sizes)
    inputs = encode(encoder, task, "train", **sizes)
    chosen = few(inputs, config, regression=task.regression)
    learned = learn_mask(encoder.module, inputs, head, live, config, chosen=chosen, tick=tick)
    stored = {f"backbone.{name}": known for name, known in encoder.names.items()}
    masks = {stored[name]: mask.cpu() for name, mask in learned.masks.items()}
    kept = {name: torch.where(masks[name], value, 0) if name in masks else torch.zeros_like(value) for name, value in tau.items()}
    elements = sum(value.numel() for value in tau.values())
    square = sum(float(value.double().square().sum()) for value in tau.values())
    lost = sum(float((value - kept[name]).double().square().sum()) for name, value in tau.items())
    facts = {
        "localised": vector.label,
        "task": task.name,
        "config": asdict(config),
        "examples": learned.examples,
        "data": inputs.hash,
        "head": head.hash(),
        "loss": {"base": learned.base, "whole": learned.whole, "start": learned.start, "last": learned.last},
    }
    source = MemorySource(kept, label=f"{vector.label} on {task.name}", degree=0)
    file = compress(
        Combination(((1.0, source),), reference=vector.reference, name=vector.label),
        path,
        Sparse(density=None, dtype=dtype),
        engine=engine,
        provenance=facts,
    )
    outside = (f"{len(left)} tensors of the vector were left out of the mask ({', '.join(left[:3])}).",) if left else ()
    return Localised(
        file=file,
        task=task.name,
        density=file.kept / elements,
        error=math.sqrt(lost / square),
        base=learned.base,
        whole=learned.whole,
        start=learned.start,
        losses=learned.losses,
        last=learned.last,
        examples=learned.examples,
        notes=outside,
    )


def learn_mask(
    module: nn.Module,
    inputs: Inputs,
    head: AnyHead,
    tau: Mapping[str, Tensor],
    config: MaskConfig,
    *,
    chosen: Sequence[int] | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> Learned:
    """The mask for τ, by the names of the module's parameters; the module holds θ₀, before and after.

    `chosen` are the examples that are looked at, by default all. Raises `DataError`: τ is zero, the loss is not finite.
    """
    indices = list(range(len(inputs))) if chosen is None else list(chosen)
    parameters = dict(module.named_parameters())
    own = {name: parameters[name] for name in tau}
    tau = {name: value.to(own[name]) for name, value in tau.items()}
    if not any(bool(value.any()) for value in tau.values()):
        raise DataError("the task vector is all zero where a mask is learned: there is nothing to localise.")
    base = {name: parameter.detach().clone() for name, parameter in own.items()}
    asked = {name: parameter.requires_grad for name, parameter in parameters.items()}
    training = module.training
    module.eval()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in own)
    begun = largest(tau, config.density)
    scores = {name: torch.where(mask, config.bias, -config.bias) for name, mask in begun.items()}

    def run(share: Mapping[str, Tensor], some: Sequence[int], *, backward: bool) -> float:
        """The mean loss with θ₀ + share ⊙ τ, and its gradient in the parameters."""
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(base[name] + share[name] * tau[name])
                parameter.grad = None
        total = 0.0
        for part in ordered_batches([inputs.lengths[i] for i in some]):
            batch = [some[i] for i in part]
            device = next(iter(own.values())).device
            with torch.set_grad_enabled(backward):
                labels = torch.tensor([inputs.labels[i] for i in batch], device=device)
                loss = head.loss(module(**to_device(inputs.batch(batch), device)), labels) * (len(batch) / len(some))
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise DataError("the loss of the mask is not finite: look at the vector, or lower the learning rate.")
        return total

    try:
        ends = {
            "base": run(_constant(tau, 0.0), indices, backward=False),
            "whole": run(_constant(tau, 1.0), indices, backward=False),
            "start": run({name: mask.to(tau[name]) for name, mask in begun.items()}, indices, backward=False),
        }
        losses: list[float] = []
        rate = config.lr
        picks = training_batches([inputs.lengths[i] for i in indices], config.batch_size or len(indices), config.seed)
        for step in range(config.steps):
            some = indices if config.batch_size is None else [indices[i] for i in next(picks)]
            share = {name: score.sigmoid() for name, score in scores.items()}
            losses.append(run(share, some, backward=True))
            slopes = {name: _gradient(own[name]) * tau[name] for name in own}
            if step == 0 and not config.lr_absolute:
                rate = config.lr / (_rms(slopes, tau) / 4 or 1.0)
            for name, score in scores.items():
                steep = share[name] * (1 - share[name])
                pull = steep if config.regulariser == "l1" else -steep * torch.where(score > 0, 1.0, -1.0)
                score -= rate * slopes[name] * steep + config.strength * pull
            if tick is not None:
                tick(step + 1, losses[-1])
        masks = settled(scores, tau, config.keep)
        last = run({name: mask.to(tau[name]) for name, mask in masks.items()}, indices, backward=False)
    finally:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(base[name])
                parameter.grad = None
        for name, parameter in parameters.items():
            parameter.requires_grad_(asked[name])
        module.train(training)
    return Learned(masks=masks, losses=tuple(losses), last=last, examples=len(indices), **ends)


def largest(tau: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the ⌈density · n⌉ largest entries over all tensors; those of equal size all, zeros none."""
    sizes = torch.cat([value.abs().reshape(-1) for value in tau.values()])
    cut = sizes.kthvalue(len(sizes) - kept_count(density, len(sizes)) + 1).values
    return {name: (value.abs() >= cut) & (value != 0) for name, value in tau.items()}


def settled(scores: Mapping[str, Tensor], tau: Mapping[str, Tensor], keep: float | None) -> dict[str, Tensor]:
    """Masks from S: where σ(S) rounds to 1, or the share `keep` of largest S, of equal ones the larger in τ. Zeros of τ are in none."""
    if keep is None:
        return {name: (score > 0) & (tau[name] != 0) for name, score in scores.items()}
    flat = torch.cat([torch.where(tau[name] != 0, score, -torch.inf).reshape(-1) for name, score in scores.items()])
    sizes = torch.cat([tau[name].abs().reshape(-1) for name in scores])
    wanted = min(kept_count(keep, len(flat)), int((sizes != 0).sum()))
    by_size = sizes.argsort(descending=True, stable=True)
    order = by_size[flat[by_size].argsort(descending=True, stable=True)][:wanted]
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[order] = True
    parts = torch.split(mask, [score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def few(inputs: Inputs, config: MaskConfig, *, regression: bool) -> list[int]:
    """Examples drawn from a split: so many of each class, fewer where it has fewer, in their order."""
    labels = [0 if regression else label for label in inputs.labels]
    generator = random.Random(config.seed)
    found: list[int] = []
    for label in sorted(set(labels)):
        places = [place for place, one in enumerate(labels) if one == label]
        found += generator.sample(places, min(config.per_class, len(places)))
    return sorted(found)


def _live(
    encoder: Encoder, vector: Combination, tau: Mapping[str, Tensor], config: MaskConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """The vector by the live model's names, where a mask is learned; and the names where none is."""
    selection = Selection(tensors=config.tensors)
    wanted = {n: v for n, v in tau.items() if v.numel() and selection.takes(n, tuple(v.shape), kind_of(n, tuple(v.shape)))}
    live = {name: value for name, value in encoder.parameters(wanted).items() if name not in encoder.frozen}
    if not live:
        raise AlignmentError(
            f"{vector.label}: no tensor of the vector that fits {selection} is a parameter of {encoder.folder}. Give the base that the "
            "vector was taken from."
        )
    known = {f"backbone.{name}": stored for name, stored in encoder.names.items()}
    learned = {known[name] for name in live}
    return live, [name for name in tau if name not in learned]


def _constant(tau: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(one, value) for name, one in tau.items()}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _rms(slopes: Mapping[str, Tensor], tau: Mapping[str, Tensor]) -> float:
    """Root mean square over the entries that τ changes."""
    square = math.fsum(float(slope.double().square().sum()) for slope in slopes.values())
    return math.sqrt(square / max(1, sum(int((value != 0).sum()) for value in tau.values())))
