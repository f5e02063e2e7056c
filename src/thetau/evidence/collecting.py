"""What every collector does: check what it is given, name what it makes, and choose the labels whose gradients count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thetau.errors import CheckpointError, DataError, OutputError
from thetau.evidence.config import FisherConfig, Labels, MomentConfig
from thetau.evidence.files import read_facts
from thetau.facade import open as open_weights
from thetau.finetune.lesson import to_device
from thetau.models import Encoder, weights_hash
from thetau.tasks import Task
from thetau.tasks.head import AnyHead
from thetau.tasks.inputs import Inputs, label_tensor


def check_start(path: Path, encoder: Encoder) -> None:
    """Nothing where a collection can begin: a name for one file, and a base for the head.

    Raises:
        OutputError: the file is to be of another kind.
        DataError: the encoder runs with other weights.
    """
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: evidence is one safetensors file. Let its name end in .safetensors.")
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError("the head is made from the base, but the encoder runs with other weights. Load the base's into it first.")


def key_of(*content: Any) -> str:
    """A digest of all that decides a result."""
    return hashlib.blake2b(json.dumps(list(content), sort_keys=True).encode(), digest_size=16).hexdigest()


def existing(path: Path, evidence: str, key: str, what: str) -> dict[str, Any] | None:
    """The result that a file holds already; None where there is no file. `what` is what messages call it.

    Raises:
        OutputError: the file holds something else, or another result.
    """
    if not path.exists():
        return None
    try:
        facts = read_facts(path, evidence)
    except CheckpointError as error:
        raise OutputError(
            f"{path}: must be new, or hold this very {what}. It holds something else. Choose another name."
        ) from error
    if facts.get("key") != key:
        raise OutputError(
            f"{path}: must be new, or hold this very {what}. It holds one of {facts.get('model')} on {facts.get('task')!r} with other "
            "settings, data or weights. Choose another name or remove it."
        )
    told: dict[str, Any] = json.loads(facts["result"])
    return told


def check_classes(task: Task) -> None:
    """Raise `DataError` for a task of a causal language model, whose answers are texts."""
    if task.form is not None:
        raise DataError(
            f"task {task.name!r}: is of kind {task.kind}, whose answers are texts, and this needs a task with classes. What needs inputs alone "
            "(thetau evidence gram) reads it."
        )


def check_head(encoder: Encoder, head: AnyHead, inputs: Inputs, task: Task) -> None:
    """Raise `DataError` where the head reads other features than the model gives, or has other classes than the task."""
    check_classes(task)
    parameter = next(encoder.module.parameters())
    with torch.no_grad():
        features: Tensor = encoder.module(**to_device(inputs.batch([0]), parameter.device))
        try:
            logits = head.to(parameter.device).logits(features)
        except RuntimeError as error:
            raise DataError(
                f"task {task.name!r}: the head does not read what {encoder.folder} gives, {features.shape[-1]} features ({error}). "
                "Give the head that was made from this model's base."
            ) from error
    if not task.regression and logits.shape[-1] != len(task.labels):
        raise DataError(
            f"task {task.name!r}: the head must have the task's {len(task.labels)} classes. Got {logits.shape[-1]}; it is another task's."
        )


def file_of(origin: str, encoder: Encoder) -> dict[str, str]:
    """The fingerprint of the file that the weights lie in, by which a merge knows its models; nothing where they lie in memory."""
    if not Path(origin).exists():
        return {}
    opened = open_weights(origin, base=str(encoder.folder))
    return {"weights": opened.terms[-1][1].fingerprint()}


def labels_drawn(
    head: AnyHead, features: Tensor, inputs: Inputs, indices: Sequence[int], labels: str, config: FisherConfig | MomentConfig
) -> tuple[Tensor, Tensor]:
    """The labels whose gradients count, and what each counts: `[example, label]` both.

    Raises:
        DataError: the model's outputs are not finite.
    """
    if labels == "empirical":
        given = label_tensor([inputs.labels[index] for index in indices]).to(features.device)[:, None]
        return given, torch.ones(given.shape, device=features.device)
    outcomes, shares = head.outcomes(features.detach())
    if not torch.isfinite(shares).all():
        raise DataError(
            f"the model's outputs must be finite; these weights give NaN or Inf for example {indices[0]}, so there is no Fisher."
        )
    if labels == "true":
        return outcomes, shares
    # A function of the seed and the example alone, whatever the batch and wherever a run goes on.
    generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + index) for index in indices]
    level = torch.stack([torch.rand(config.draws, generator=generator) for generator in generators]).to(features.device)
    places = torch.searchsorted(shares.cumsum(-1), level).clamp(max=shares.shape[-1] - 1)
    if config.draws > shares.shape[-1]:  # every label once, with the share of the draws that fell on it
        return outcomes, nn.functional.one_hot(places, shares.shape[-1]).float().mean(1)
    return outcomes.gather(-1, places), torch.full_like(level, 1 / config.draws)


def labels_of(labels: Labels, outcomes: int, most: int) -> Labels:
    """Whose labels count in the end: with more classes than `most`, `true` is sampled, for a class costs a backward pass."""
    return "sampled" if labels == "true" and outcomes > most else labels


def stored_names(encoder: Encoder) -> dict[str, tuple[str, ...]]:
    """Parameter of the module → its names in the checkpoint: several where the checkpoint stores a tied tensor twice.

    Raises `DataError`: the checkpoint holds none.
    """
    first = {id(parameter): name for name, parameter in encoder.module.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, parameter in encoder.module.named_parameters(remove_duplicate=False):
        known = encoder.names.get(name.removeprefix("backbone."))
        if known is not None and parameter.is_floating_point():
            found.setdefault(first[id(parameter)], []).append(known)
    if not found:
        raise DataError(f"{encoder.folder}: no parameter of the model is in its checkpoint, so nothing can be said of any.")
    return {name: tuple(dict.fromkeys(names)) for name, names in found.items()}
