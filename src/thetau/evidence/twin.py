r"""Twin-Merging's router: which task an input is of, told from a merged model's features, so that the task's part can be used without being named.

Lu et al., NeurIPS 2024, <https://arxiv.org/abs/2406.15479>; code: LZY-the-boys/Twin-Merging f481c60. A perceptron of one hidden layer over the merged
model's features, 50 epochs at 5e-4 over examples of all tasks, which are labelled by nothing but their task; an input then runs through θ* + Σ_t
softmax(router)_t (θ_t − θ*), θ_t being what lies beside the model for task t (`thetau merge --tasks`). `mode: top` takes the likeliest task's alone:
a pass for each task instead of one for each input. Departs from the code in reading the features that the heads read (the mean of the last hidden state
there), in weighing every task alike however many examples it has, and in keeping the last epoch; the code keeps the one that is best on the test set.

Neither model changes, so the merged one runs once over the examples and the epochs go over stored features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError
from thetau.evidence.collecting import existing, key_of
from thetau.evidence.config import TwinConfig
from thetau.evidence.files import read_facts, save_evidence
from thetau.finetune.batches import training_batches
from thetau.models import Encoder, weights_hash
from thetau.tasks import Task, encode
from thetau.tasks.encoding import features

EVIDENCE = "twin-router"
FOLDER = "twin"  # inside a merged model's
FILE = "router.safetensors"
_LOOP = 1
_PARTS = ("first", "first_bias", "second", "second_bias")


@final
@dataclass(frozen=True, kw_only=True)
class TaskRouter:
    """Which task an input is of. `tensors`: `first` `[hidden, feature]`, `second` `[task, hidden]` and their biases. `mode`: as `TwinConfig` has it."""

    tasks: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    mode: str = "soft"

    def __call__(self, read: Float[Tensor, "example feature"]) -> Float[Tensor, "example task"]:
        """The tasks' logits."""
        return logits(self.tensors, read)


@final
@dataclass(frozen=True, kw_only=True)
class Routed:
    """What `learn_router` wrote: the file, and how often the router is right on the examples that it learned from, and on those held back (NaN: none)."""

    path: Path
    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    learned: float
    held: float
    mode: str
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path)}


def learn_router(
    encoder: Encoder,
    tasks: Mapping[str, Task],
    merged: Mapping[str, Tensor],
    path: str | Path,
    config: TwinConfig | None = None,
    *,
    origin: str = "the merged model",
) -> Routed:
    """Learn which task an input is of from a merged model's features, and write the router.

    Args:
        encoder: holds the base's weights, before and after.
        tasks: those that something lies beside the model for, by name; two at least.
        merged: the merged model's weights, by the base's names; `origin` is what messages and the file call it.
        path: of the file, new or holding this very router; `MERGED/twin/router.safetensors` is where `thetau evaluate` looks.

    Raises:
        DataError: a single task, a task without examples or that the encoder has no features of, features that are not finite.
        OutputError: the file cannot be written, or holds something else.
    """
    config, path = config or TwinConfig(), Path(path)
    names = tuple(sorted(tasks))
    if len(names) < 2:
        raise DataError(f"a router tells tasks apart, and needs two at least. Got {', '.join(names) or 'none'}.")
    if encoder.kind in ("text_to_text", "causal"):
        raise DataError(
            f"{encoder.folder}: is of kind {encoder.kind}, whose outputs are of a task already; a router reads the features of an encoder."
        )
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "a router is learned over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    inputs = {name: encode(encoder, tasks[name], config.split, limit=config.examples, **sizes) for name in names}
    if empty := [name for name in names if not len(inputs[name])]:
        raise DataError(
            f"task {empty[0]!r}: has no example in its split {config.split}, and a router is learned from examples of every task. Name another split "
            "(`split=train`)."
        )
    facts = {
        "base": encoder.base_hash,
        "merged": weights_hash(merged),
        "data": {name: one.unlabelled for name, one in inputs.items()},
    }
    key = key_of(_LOOP, facts, asdict(config))
    kept = existing(path, EVIDENCE, key, "router")
    if kept is not None:
        return Routed(path=path, cached=True, **{**kept, "tasks": tuple(kept["tasks"]), "notes": tuple(kept["notes"])})
    own = encoder.weights(exact=True)
    try:
        encoder.load(merged, origin)
        read = {name: features(encoder, one).clone() for name, one in inputs.items()}
    finally:
        encoder.load(own, "the base")
    held = {
        name: torch.arange(len(rows)) % config.hold == config.hold - 1 if config.hold else torch.zeros(len(rows)) > 0
        for name, rows in read.items()
    }
    if nothing := [name for name in names if bool(held[name].all())]:
        raise DataError(
            f"task {nothing[0]!r}: all its {len(inputs[nothing[0]])} examples are held back (`hold={config.hold}`), and none is left to learn from. Hold "
            "fewer back, or none (`hold=0`)."
        )
    seen, unseen = (
        (
            torch.cat([rows[held[name] == which] for name, rows in read.items()]),
            torch.cat([torch.full((int((held[name] == which).sum()),), place) for place, name in enumerate(names)]),
        )
        for which in (False, True)
    )
    tensors = fit(*seen, len(names), config)
    result = Routed(
        path=path,
        tasks=names,
        examples={name: len(one) for name, one in inputs.items()},
        learned=_right(tensors, *seen),
        held=_right(tensors, *unseen),
        mode=config.mode,
    )
    told = {name: value for name, value in result.to_json().items() if name not in ("path", "cached")}
    about = {
        "model": origin,
        "task": ", ".join(names),
        "tasks": json.dumps(names),
        "base": encoder.base_hash,
        "merged": str(facts["merged"]),
        "mode": config.mode,
        "config": json.dumps(asdict(config)),
        "key": key,
        "result": json.dumps(told),
    }
    save_evidence(path, EVIDENCE, tensors, about)
    return result


def logits(tensors: Mapping[str, Tensor], read: Float[Tensor, "example feature"]) -> Float[Tensor, "example task"]:
    """W₂ ReLU(W₁ f + b₁) + b₂."""
    hidden = nn.functional.linear(read, tensors["first"], tensors["first_bias"]).relu()
    told: Tensor = nn.functional.linear(hidden, tensors["second"], tensors["second_bias"])
    return told


def fit(
    read: Float[Tensor, "example feature"], told: Int[Tensor, " example"], tasks: int, config: TwinConfig
) -> dict[str, Tensor]:
    """A router's tensors, after so many epochs of Adam on the cross-entropy, every task weighing alike.

    Raises:
        DataError: the features are not finite, or the loss diverges.
    """
    if not bool(torch.isfinite(read).all()):
        raise DataError("the features of the merged model must be finite. Look at its weights.")
    width = read.shape[1]
    generator = torch.Generator().manual_seed(config.seed)

    def drawn(rows: int, columns: int) -> Tensor:
        spread = 1 / columns**0.5
        return torch.empty(rows, columns).uniform_(-spread, spread, generator=generator).requires_grad_()

    tensors = {
        "first": drawn(config.hidden, width),
        "first_bias": torch.zeros(config.hidden, requires_grad=True),
        "second": drawn(tasks, config.hidden),
        "second_bias": torch.zeros(tasks, requires_grad=True),
    }
    counts = torch.bincount(told, minlength=tasks).clamp(min=1)
    weight = len(told) / (tasks * counts.float())
    adam = torch.optim.Adam(tensors.values(), lr=config.lr)
    picks = training_batches([1] * len(read), config.batch, config.seed)
    for _ in range(config.epochs * -(-len(read) // config.batch)):
        batch = next(picks)
        adam.zero_grad()
        loss = nn.functional.cross_entropy(logits(tensors, read[batch]), told[batch], weight=weight)
        if not bool(torch.isfinite(loss)):
            raise DataError(f"the router's loss must be finite. Got {float(loss.detach())}; take a smaller `lr`.")
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _right(tensors: Mapping[str, Tensor], read: Tensor, told: Tensor) -> float:
    return float((logits(tensors, read).argmax(-1) == told).float().mean()) if len(told) else float("nan")


def router_file(merged: Path) -> Path:
    """Where a merged model's folder holds its router."""
    return merged / FOLDER / FILE


def read_router(path: Path, merged: Mapping[str, Tensor]) -> TaskRouter:
    """A router that `learn_router` wrote for this merged model.

    Raises:
        CheckpointError: it is none, or damaged.
        DataError: it is another model's.
    """
    facts = read_facts(path, EVIDENCE)
    if facts.get("merged") != weights_hash(merged):
        raise DataError(
            f"{path}: was learned for another merged model, {facts.get('model')}, than the one that is measured. Learn it again: thetau evidence twin."
        )
    try:
        tensors = load_file(path)
        return TaskRouter(
            tasks=tuple(json.loads(facts["tasks"])), tensors={name: tensors[name] for name in _PARTS}, mode=facts["mode"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: is damaged, {error} is missing or cannot be read. Learn it again: thetau evidence twin."
        ) from error
