"""The one training loop. Paradigms differ by the view of the model, what of it is trained, the lessons and the penalty."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.finetune.batches import training_batches
from thetau.finetune.config import FinetuneConfig
from thetau.finetune.lesson import Lesson, to_device
from thetau.finetune.penalty import Penalty
from thetau.finetune.processes import Processes
from thetau.finetune.state import Saved, StateFolder, random_state, set_random_state
from thetau.finetune.views import LinearView, ModelView, View
from thetau.models.parts import chosen_names
from thetau.tasks.head import AnyHead
from thetau.tasks.probe import LinearHead, frozen_copy, trainable

_WINDOW = 20
_BLOW_UP = 4.0


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """`losses`: of every step, without the penalty; `penalties`: λ times the penalty. `names`: what was trained.

    `heads`: task → head, those that were trained.
    """

    losses: list[float]
    penalties: list[float]
    names: tuple[str, ...]
    heads: Mapping[str, AnyHead] = field(default_factory=dict)


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
    lessons: Sequence[Lesson],
    config: FinetuneConfig,
    *,
    against: Sequence[Lesson] = (),
    start: Mapping[str, Tensor] | None = None,
    frozen: Sequence[str] = (),
    state: StateFolder | None = None,
    processes: Processes | None = None,
    snapshot: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train `module` in place.

    `module(**columns)` gives features `[example, feature]`, from θ₀ as it holds them. Several lessons are learnt jointly, one a step in
    turns that the seed decides.

    - `against`: tasks whose inputs the τJp penalty keeps unchanged.
    - `start`: τ to begin from, by parameter name (linear paradigms).
    - `frozen`: parameters that no scope trains.
    - `state`: where a resumable state is kept every `config.save_every` steps, and found.
    - `snapshot(step, trained)`: called before the first step and after each, with what is trained (τ in linear paradigms); in the first
      process only.
    - `tick(step, loss)`: called after each step, in every process.

    The result depends on the arguments alone: the caller's random state is neither read nor changed. Raises `DataError` when the loss
    diverges, when nothing is trained, or when the model has no linear form.
    """
    processes = processes or Processes(config.device or "cpu")
    how = config.how
    _check_lessons(lessons, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters() if name not in set(frozen)}
    names = [name for name in shapes if "lora_" in name] if how.lora else chosen_names(shapes, config.trains)
    if not names:
        raise DataError(f"paradigm {config.paradigm!r}, scope {config.trains!r}: the model has no parameter that it trains.")
    chosen = set(names)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.to(processes.device)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    lessons = [_placed(lesson, processes) for lesson in lessons]
    if config.train_head:
        lessons = [replace(lesson, head=trainable(lesson.head, lesson.name)) for lesson in lessons]
    guessing = max(_guessing(lesson) for lesson in lessons)
    saved = None if state is None else state.load()
    first = 0 if saved is None else saved.step
    losses: list[float] = [] if saved is None else list(saved.losses)
    penalties: list[float] = [] if saved is None else list(saved.penalties)
    _same_start(first, processes, state)
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        torch.manual_seed(config.seed + 1000003 * processes.rank)
        try:
            view: View = LinearView(module, names, start) if how.linear else ModelView(module, names)
            learnt = view.trained | _head_tensors(lessons, config)
            optimiser = _optimiser(view, learnt, config)
            penalty = Penalty([_placed(one, processes) for one in against], config, first) if how.penalty else None
            if saved is not None:
                _restore(saved.tensors, learnt, optimiser)
                _restore_random(saved, config, processes)
            if snapshot is not None and first == 0:
                processes.once(snapshot, 0, view.trained)
            for step, (turn, indices) in enumerate(islice(_batches(lessons, config), first, config.steps), start=first):
                rate = learning_rate(step, config)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.zero_grad(set_to_none=True)
                loss, extra = _gradients(view, learnt, lessons[turn], indices, penalty, step, config, processes)
                losses.append(loss)
                penalties.append(extra)
                _check(losses, guessing, config, state)
                nn.utils.clip_grad_norm_(learnt.values(), config.max_grad_norm)
                view.decay(rate * config.weight_decay)
                optimiser.step()
                if snapshot is not None:
                    processes.once(snapshot, step + 1, view.trained)
                if state is not None and config.save_every and (step + 1) % config.save_every == 0:
                    processes.once(state.save, step + 1, _content(learnt, optimiser, processes), losses, penalties)
                if tick is not None:
                    tick(step + 1, losses[-1])
            view.finish()
        finally:
            module.eval()
            module.to("cpu")
            for name, parameter in module.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(before[name])
    heads = {lesson.name: frozen_copy(lesson.head) for lesson in lessons if isinstance(lesson.head, LinearHead)}
    return Trained(losses=losses, penalties=penalties, names=tuple(names), heads=heads if config.train_head else {})


def _check_lessons(lessons: Sequence[Lesson], config: FinetuneConfig) -> None:
    if len(lessons) > 1 and not config.how.joint:
        raise DataError(
            f"paradigm {config.paradigm!r} trains on one task. Got {len(lessons)}; several are learnt by mtl, or by mtl+{config.paradigm}."
        )
    if not lessons:
        raise DataError("fine-tuning needs at least one task. Got none.")
    for lesson in lessons:
        if not len(lesson.inputs):
            raise DataError(f"task {lesson.name!r}: the training split is empty.")


def _head_tensors(lessons: Sequence[Lesson], config: FinetuneConfig) -> dict[str, Tensor]:
    """The tensors of the heads that are trained, by names that no module has."""
    if not config.train_head:
        return {}
    heads = {lesson.name: lesson.head for lesson in lessons}
    return {
        f"head of {name}.{part}": getattr(head, part)
        for name, head in heads.items()
        if isinstance(head, LinearHead)
        for part in ("weight", "bias")
    }


def _placed(lesson: Lesson, processes: Processes) -> Lesson:
    return Lesson(name=lesson.name, inputs=lesson.inputs, head=lesson.head.to(processes.device))


def _batches(lessons: Sequence[Lesson], config: FinetuneConfig) -> Iterator[tuple[int, list[int]]]:
    """(lesson, indices) of one step after another; of several lessons, each once a round in a shuffled order."""
    if len(lessons) == 1:
        for indices in training_batches(lessons[0].inputs.lengths, config.batch_size, config.seed):
            yield 0, indices
        return
    streams = [training_batches(lesson.inputs.lengths, config.batch_size, f"{config.seed}/{lesson.name}") for lesson in lessons]
    turn = 0
    while True:
        order = list(range(len(lessons)))
        random.Random(f"{config.seed}/round {turn}").shuffle(order)
        for one in order:
            yield one, next(streams[one])
        turn += 1


def _gradients(
    view: View,
    learnt: Mapping[str, Tensor],
    lesson: Lesson,
    indices: list[int],
    penalty: Penalty | None,
    step: int,
    config: FinetuneConfig,
    processes: Processes,
) -> tuple[float, float]:
    """The gradients of one step into `view`, and its loss and penalty."""
    size = math.ceil(len(indices) / config.accumulation)
    total = extra = 0.0
    for begin in range(0, len(indices), size):
        own = indices[begin : begin + size][processes.share]
        if own:
            labels = lesson.inputs.targets(own).to(processes.device)
            with _precision(config, processes):
                features = view.features(to_device(lesson.inputs.batch(own), processes.device))
            loss = lesson.head.loss(features.float(), labels) * (len(own) / len(indices))
            torch.autograd.backward(loss)
            total += loss.item()
    if penalty is not None:
        with _precision(config, processes):
            for term in penalty.terms(view, step, processes.device, processes.share):
                torch.autograd.backward(term)
                extra += term.item()
    view.collect()
    if processes.count > 1:
        total, extra = _sum(learnt.values(), total, extra, processes)
    return total, extra


def _sum(learnt: Iterable[Tensor], total: float, extra: float, processes: Processes) -> tuple[float, float]:
    """Sum gradients, loss and penalty over the processes. What has no gradient in any of them gets none, so that the optimiser passes over
    it, as it does in one process.
    """
    tensors = list(learnt)
    sums = torch.tensor([total, extra, *(float(tensor.grad is not None) for tensor in tensors)], device=processes.device)
    grads = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    processes.sum([sums, *grads])
    total, extra, *holders = sums.tolist()
    for tensor, grad, holder in zip(tensors, grads, holders, strict=True):
        tensor.grad = grad if holder else None
    return total, extra


def _precision(config: FinetuneConfig, processes: Processes) -> Any:
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(processes.device.type, dtype=getattr(torch, config.precision))


def _optimiser(view: View, learnt: Mapping[str, Tensor], config: FinetuneConfig) -> torch.optim.Optimizer:
    own = config.weight_decay if isinstance(view, ModelView) else 0.0
    heads = [tensor for name, tensor in learnt.items() if name not in view.trained]
    groups = [
        {"params": [p for p in view.trained.values() if p.ndim > 1], "weight_decay": own},
        {"params": [p for p in view.trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if heads:
        groups.append({"params": heads, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        fused=True,
    )


def _content(learnt: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, processes: Processes) -> dict[str, Tensor]:
    """All that the next step depends on."""
    states = processes.gather(random_state(processes.device))
    content = {_random_name(rank): one for rank, one in enumerate(states)}
    for name, tensor in learnt.items():
        content[f"trained/{name}"] = tensor
        content |= {f"{key}/{name}": value for key, value in optimiser.state.get(tensor, {}).items()}
    return content


def _restore(content: Mapping[str, Tensor], learnt: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, tensor in learnt.items():
            tensor.copy_(content[f"trained/{name}"])
            found = {key: content[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in content}
            if found:
                optimiser.state[tensor] = {
                    key: value.to(tensor.device if key != "step" else "cpu") for key, value in found.items()
                }


def _restore_random(saved: Saved, config: FinetuneConfig, processes: Processes) -> None:
    """This process's random state; one that the state does not know, as the run had fewer processes, begins its own."""
    found = saved.tensors.get(_random_name(processes.rank))
    if found is None:
        torch.manual_seed(random.Random(f"{config.seed}/{processes.rank}/{saved.step}").getrandbits(63))
    else:
        set_random_state(found, processes.device)


def _random_name(rank: int) -> str:
    return f"random/{rank}" if rank else "random"


def _same_start(first: int, processes: Processes, state: StateFolder | None) -> None:
    steps = [int(step) for step in processes.gather(torch.tensor(first))]
    if len(set(steps)) > 1:
        folder = None if state is None else state.folder
        raise DataError(
            f"all processes must begin at one step, but they find states of steps {steps}. The folder must be one that all of them see: {folder}."
        )


def _guessing(lesson: Lesson) -> float:
    """The cross-entropy of guessing among the labels; 0 for numbers."""
    labels = set(lesson.inputs.labels)
    return math.log(max(len(labels), 2)) if all(isinstance(label, int) for label in labels) else 0.0


def _check(losses: list[float], guessing: float, config: FinetuneConfig, state: StateFolder | None) -> None:
    """Stop when the loss is not a number, or its recent mean is several times that of the start and of guessing."""
    step = len(losses)
    kept = ""
    if state is not None and config.save_every and step > config.save_every:
        kept = f" The last good state, of step {(step - 1) // config.save_every * config.save_every}, is kept in {state.folder}."
    remedy = f"Lower the learning rate (lr={config.lr:g}) or lengthen the warm-up (warmup={config.warmup:g}); no output was written.{kept}"
    if not math.isfinite(losses[-1]):
        raise DataError(f"the loss diverged: {losses[-1]} at step {step} of {config.steps}. {remedy}")
    recent = sum(losses[-_WINDOW:]) / _WINDOW
    start = max(sum(losses[:_WINDOW]) / _WINDOW, guessing)
    if step >= 2 * _WINDOW and recent > _BLOW_UP * start:
        raise DataError(
            f"the loss diverged: its mean over the last {_WINDOW} steps is {recent:.3g} at step {step} of {config.steps}, "
            f"at the start it was {start:.3g}. {remedy}"
        )
