r"""Representation Surgery: a small correction for each task that brings a merged model's features to those of the task's own model.

Yang et al., ICML 2024, <https://arxiv.org/abs/2402.02705>; code: EnnengYang/RepresentationSurgery 5df3f4e: f − U ReLU(D f) of rank 16 without bias, U
starting at zero, so that before the first update it is the merged model; Adam at 1e-3 minimises the mean absolute difference from the features of the
task's own model on unlabelled examples, one update for each batch of 16, 1,000 updates. Which task an input is of must be known. The code looks at the
features before they are brought to unit length and learns on test images; here features are those that the heads read (of unit length where those
want it, and brought back to it), and the split is a choice.

Neither model changes, so each runs once over the examples, and the updates go over stored features. Corrections lie beside the merged model, in its
folder `surgery`, a file a task; `thetau evaluate` finds them there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from thetau.errors import DataError
from thetau.evidence.collecting import existing, key_of
from thetau.evidence.config import SurgeryConfig
from thetau.evidence.files import read_facts, save_evidence
from thetau.finetune.batches import training_batches
from thetau.models import Encoder, weights_hash
from thetau.tasks import Task, encode
from thetau.tasks.corrected import CorrectedHead, Correction
from thetau.tasks.encoding import features
from thetau.tasks.head import AnyHead

EVIDENCE = "surgery"
FOLDER = "surgery"  # inside a merged model's
_LOOP = 1
_UNIT = ("sentence", "image")  # kinds of encoders whose features have unit length


@final
@dataclass(frozen=True, kw_only=True)
class Surgery:
    """What `learn_surgery` wrote for a task: the file, and the mean absolute difference of features before and after."""

    path: Path
    task: str
    examples: int
    before: float
    after: float
    notes: tuple[str, ...] = field(default_factory=tuple)
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path)}


def learn_surgery(
    encoder: Encoder,
    task: Task,
    merged: Mapping[str, Tensor],
    individual: Mapping[str, Tensor],
    path: str | Path,
    config: SurgeryConfig | None = None,
    *,
    origin: str = "the merged model",
    tick: Callable[[int], None] | None = None,
) -> Surgery:
    """Learn a task's correction of a merged model's features, and write it.

    Args:
        encoder: holds the base's weights, before and after.
        merged: the merged model's weights, by the base's names; `origin` is what messages and the file call it.
        individual: those of the model that was fine-tuned on the task.
        path: of the file, new or holding this very correction; `MERGED/surgery/TASK.safetensors` is where `thetau evaluate` looks.
        tick: told of the number of tokens or patches that have run.

    Raises:
        DataError: no example, an encoder of another kind or with other weights, features that are not finite.
        OutputError: the file cannot be written, or holds something else.
    """
    config, path = config or SurgeryConfig(), Path(path)
    if encoder.kind == "text_to_text":
        raise DataError(
            "a text-to-text model's features are the labels' scores themselves; there is nothing to correct below them."
        )
    if weights_hash(encoder.weights()) != encoder.base_hash:
        raise DataError(
            "a correction is learned over the base, but the encoder runs with other weights. Load the base's into it first."
        )
    sizes: dict[str, Any] = {"max_length": config.max_length, "image_size": config.image_size}
    inputs = encode(encoder, task, config.split, limit=config.examples, **sizes)
    if not len(inputs):
        raise DataError(
            f"task {task.name!r}: has no example in its split {config.split}, and a correction is learned from unlabelled examples. Leave the task out, "
            "or name another split (`split=test`)."
        )
    facts = {
        "task": task.name,
        "data": inputs.unlabelled,
        "base": encoder.base_hash,
        "merged": weights_hash(merged),
        "individual": weights_hash(individual),
    }
    key = key_of(_LOOP, facts, asdict(config))
    kept = existing(path, EVIDENCE, key, "correction")
    if kept is not None:
        return Surgery(path=path, cached=True, **{**kept, "notes": tuple(kept["notes"])})
    own = encoder.weights(exact=True)
    try:
        encoder.load(merged, origin)
        given = features(encoder, inputs, tick).clone()
        encoder.load(individual, f"the model of {task.name}")
        wanted = features(encoder, inputs, tick).clone()
    finally:
        encoder.load(own, "the base")
    unit = encoder.kind in _UNIT
    correction = correct(given, wanted, config, unit=unit)
    ends = [float((corrected - wanted).abs().mean()) for corrected in (given, correction(given))]
    notes = []
    if ends[1] > ends[0]:
        notes.append(
            f"the correction of {task.name} does not bring the features nearer: {ends[0]:.4g} before, {ends[1]:.4g} after."
        )
    result = Surgery(path=path, task=task.name, examples=len(inputs), before=ends[0], after=ends[1], notes=tuple(notes))
    told = {name: value for name, value in result.to_json().items() if name not in ("path", "cached")}
    more = {
        "model": origin,
        "examples": str(len(inputs)),
        "unit": json.dumps(unit),
        "config": json.dumps(asdict(config)),
        "key": key,
        "result": json.dumps(told),
    }
    save_evidence(path, EVIDENCE, {"up": correction.up, "down": correction.down}, facts | more)
    return result


def correct(
    given: Float[Tensor, "example feature"], wanted: Float[Tensor, "example feature"], config: SurgeryConfig, *, unit: bool
) -> Correction:
    """The correction of features towards others, after so many updates.

    Raises:
        DataError: the features are not finite.
    """
    for rows, what in ((given, "the merged model"), (wanted, "the task's own model")):
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"the features of {what} must be finite. Look at its weights.")
    width = given.shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    down = ((2 * torch.rand(config.rank, width, generator=generator) - 1) / width**0.5).requires_grad_()
    up = torch.zeros(width, config.rank, requires_grad=True)
    adam = torch.optim.Adam([down, up], lr=config.lr)
    picks = training_batches([1] * len(given), config.batch, config.seed)
    for _ in range(config.updates):
        batch = next(picks)
        rows = given[batch]
        adam.zero_grad()
        loss = nn.functional.l1_loss(rows - (rows @ down.T).relu() @ up.T, wanted[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return Correction(up=up.detach(), down=down.detach(), unit=unit)


def surgery_file(merged: Path, task: str) -> Path:
    """Where a merged model's folder holds the correction of a task."""
    return merged / FOLDER / f"{task}.safetensors"


def read_correction(path: Path, merged: Mapping[str, Tensor]) -> Correction:
    """A correction that `learn_surgery` wrote for this merged model.

    Raises:
        CheckpointError: it is none.
        DataError: it is another model's.
    """
    facts = read_facts(path, EVIDENCE)
    if facts.get("merged") != weights_hash(merged):
        raise DataError(
            f"{path}: was learned for another merged model, {facts.get('model')}, than the one that is measured. Learn it again: thetau evidence surgery."
        )
    tensors = load_file(path)
    return Correction(up=tensors["up"], down=tensors["down"], unit=bool(json.loads(facts["unit"])))


def corrected_heads(merged: Path, weights: Mapping[str, Tensor], heads: Mapping[str, AnyHead]) -> dict[str, AnyHead]:
    """The heads of those tasks for which a merged model's folder holds a correction, behind it; none where it holds none."""
    return {
        task: CorrectedHead(head=head, correction=read_correction(surgery_file(merged, task), weights))
        for task, head in heads.items()
        if surgery_file(merged, task).is_file()
    }
