"""The head of a task for an encoder: made once, with the base, from what the two have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from thetau.checkpoint.disk import write_tensors
from thetau.errors import DataError
from thetau.models import Encoder
from thetau.models.clip_text import clip_text_features, load_clip_text
from thetau.models.language import MaskEncoder
from thetau.models.pooling import FeatureModel
from thetau.tasks.causal.head import CausalHead
from thetau.tasks.encoding import check_kind, encode, features, template_of
from thetau.tasks.head import AnyHead, Head, UnitHead, means_of, zero_shot_head
from thetau.tasks.inputs import Inputs
from thetau.tasks.language_heads import TextToTextHead, verbaliser_head
from thetau.tasks.probe import LinearHead, class_means_head, linear_probe_head, ridge_head
from thetau.tasks.task import HeadKind, Task

CLIP_SCALE = 100.0  # what CLIP's temperature was learnt to (Radford et al., 2021, 2.5)
MOST_EXAMPLES = 5000  # that a probe is fitted on


def head_kind(encoder: Encoder, task: Task, kind: HeadKind | None = None) -> HeadKind | None:
    """How the head is made: as asked, as the task says, else from prompts where there is a text tower, else a probe.

    None for language models, which bring their own.
    """
    if encoder.kind in ("mask", "text_to_text", "causal"):
        return None
    texts = encoder.kind == "sentence" or encoder.form == "projected"
    chosen = kind or task.head or ("prompts" if texts and not task.regression else "probe")
    if chosen == "prompts" and not texts:
        raise DataError(
            f"task {task.name!r}: a head from prompts needs a text tower, and this encoder has none. Use head: probe."
        )
    if task.regression and chosen != "probe":
        raise DataError(f"task {task.name!r}: a head for numbers is a probe. Got {chosen!r}.")
    return chosen


def make_head(
    encoder: Encoder,
    task: Task,
    *,
    kind: HeadKind | None = None,
    max_length: int = 64,
    image_size: int | None = None,
    cache: Path | None = None,
) -> AnyHead:
    """The frozen head of a task, with the weights that `encoder` runs with now: call it while those are the base's.

    - sentences: embeddings of class-name prompts; CLIP: those of its text tower; other image models, and numbers: a linear probe
      or class means of the base's features on the training split, the probe's penalty chosen on the validation split;
    - masked language models: the label words' rows of their own head; text-to-text: the likelihood of the labels' texts; causal ones: their own.

    With `cache`, a head is kept there by its content, and is the same to the bit wherever the run goes on. Of raw features the head is that of unit
    ones, and normalises. Raises `DataError`.
    """
    if encoder.raw and isinstance(encoder.module, FeatureModel):
        encoder.module.normalise = True
        try:
            unit = replace(encoder, form=encoder.form.removesuffix(", raw"), raw=False)
            return UnitHead(inner=make_head(unit, task, kind=kind, max_length=max_length, image_size=image_size, cache=cache))
        finally:
            encoder.module.normalise = False
    check_kind(encoder, task)
    match encoder.kind:
        case "causal":
            return CausalHead()
        case "mask":
            return verbaliser_head(cast("MaskEncoder", encoder.module), encoder.tokenizer, template_of(task, "mask"))
        case "text_to_text":
            return TextToTextHead(values=template_of(task, "text_to_text").values)
    chosen = head_kind(encoder, task, kind)
    inputs: tuple[Inputs, ...] = ()
    if chosen != "prompts":
        sizes: dict[str, Any] = {"max_length": max_length, "image_size": image_size, "limit": MOST_EXAMPLES}
        inputs = tuple(encode(encoder, task, split, **sizes) for split in ("train", "validation"))
    about = task.prompts.sentences() if chosen == "prompts" else [[one.hash for one in inputs], task.regression]
    content = [chosen, encoder.base_hash, encoder.form, about, len(task.labels)]
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    path = None if cache is None else cache / f"head-{key}.safetensors"
    found = None if path is None or not path.is_file() else read_head(path)
    if found is not None:
        return found
    head: Head | LinearHead
    match chosen:
        case "prompts":
            head = zero_shot_head(encoder, task) if encoder.kind == "sentence" else _clip_head(encoder, task)
        case _:
            head = _fitted(encoder, task, chosen, *inputs)
    if path is not None:
        write_head(path, head)
    return head


def _fitted(encoder: Encoder, task: Task, kind: HeadKind | None, train: Inputs, held_out: Inputs) -> Head | LinearHead:
    own = features(encoder, train)
    if kind == "means":
        return class_means_head(own, _classes(train), len(task.labels))
    other = features(encoder, held_out)
    if task.regression:
        return ridge_head(own, list(train.labels), (other, list(held_out.labels)))
    try:
        return linear_probe_head(own, _classes(train), len(task.labels), validation=(other, _classes(held_out)))
    except DataError as error:
        raise DataError(f"task {task.name!r}: {error}") from error


def _classes(inputs: Inputs) -> list[int]:
    return [int(label) for label in inputs.labels]


def _clip_head(encoder: Encoder, task: Task) -> Head:
    tower, tokenizer = load_clip_text(encoder.folder)
    sentences = task.prompts.sentences()
    flat = [sentence for group in sentences for sentence in group]
    rows = clip_text_features(tower, tokenizer, flat)
    return Head(classes=means_of(rows, [len(group) for group in sentences]), scale=CLIP_SCALE)


def write_head(path: Path, head: AnyHead) -> None:
    """Keep a head of tensors as one safetensors file, whole or not at all. Raises `OutputError`, `DataError` for other heads."""
    match head:
        case Head():
            tensors, facts = {"classes": head.classes}, {"kind": "prompts", "scale": repr(head.scale)}
        case LinearHead():
            tensors = {"weight": head.weight, "bias": head.bias}
            facts = {"kind": "linear", "scale": repr(head.scale), "regression": str(int(head.regression))}
        case _:
            raise DataError(f"{path}: a {type(head).__name__} is part of its model and has no file of its own.")
    write_tensors(path, tensors, facts)


def read_head(path: Path) -> Head | LinearHead:
    """What `write_head` wrote. Raises `DataError`."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scale = float(facts["scale"])
        if facts["kind"] == "prompts":
            return Head(classes=tensors["classes"], scale=scale)
        return LinearHead(weight=tensors["weight"], bias=tensors["bias"], scale=scale, regression=bool(int(facts["regression"])))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a head ({error}). Remove it or train it again.") from error
