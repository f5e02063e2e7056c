"""From the examples of a split to what a model reads, once for each split, and to batches of similar length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thetau.errors import DataError
from thetau.models import Encoder
from thetau.models.causal import padding_of
from thetau.pace import counted_by
from thetau.tasks.causal.encode import CausalInputs, encode_questions
from thetau.tasks.images import ImageSplit, preprocess
from thetau.tasks.inputs import Inputs, label_tensor
from thetau.tasks.prompted import label_inputs, mask_inputs
from thetau.tasks.rows import Split
from thetau.tasks.task import Task
from thetau.tasks.templates import Prompt, read_prompt

# Pairs of a batch's rows and tokens that keep two cores busy; more only adds padding.
_TOKENS_PER_BATCH = 1024
_ROWS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A split as token ids, not padded. `columns` maps `input_ids`, … to one list an example; `pads` to the value that fills a
    column.

    `truncated` counts the examples that were longer than `max_length`.
    """

    columns: Mapping[str, Sequence[Sequence[int]]]
    pads: Mapping[str, int]
    labels: tuple[int, ...] | tuple[float, ...]
    max_length: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each example."""
        return tuple(len(ids) for ids in self.columns["input_ids"])

    @cached_property
    def hash(self) -> str:
        """A hexadecimal digest of ids and labels: the texts, the tokenizer, the limits, all that a model sees."""
        content = json.dumps([{name: list(map(list, rows)) for name, rows in self.columns.items()}, self.labels], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the ids alone."""
        content = json.dumps({name: list(map(list, rows)) for name, rows in self.columns.items()}, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The columns of some examples, `[example, token]` int64, padded on the right to the longest of them."""
        width = max(self.lengths[i] for i in indices)
        return {
            name: torch.tensor([[*rows[i], *([self.pads[name]] * (width - len(rows[i])))] for i in indices], dtype=torch.int64)
            for name, rows in self.columns.items()
        }

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The labels of some examples."""
        return label_tensor([self.labels[i] for i in indices])


def encode(
    encoder: Encoder, task: Task, split: str, *, max_length: int, image_size: int | None = None, limit: int | None = None
) -> Inputs:
    """A task's split as `encoder` reads it, at most `limit` examples.

    Raises `DataError`: images for a model of texts or the reverse, no template for a language model, bad rows.
    """
    check_kind(encoder, task)
    if task.form is not None:
        return encode_causal(encoder, task, split, max_length=max_length, limit=limit)
    examples = task.split(split, limit)
    if isinstance(examples, ImageSplit):
        assert encoder.image is not None
        return preprocess(encoder.image, examples, size=image_size, crop=task.crop)
    assert isinstance(examples, Split)
    length = min(max_length, encoder.max_length)
    try:
        match encoder.kind:
            case "mask":
                texts = (examples.texts, examples.texts2, examples.labels)
                return mask_inputs(encoder.tokenizer, template_of(task, "mask"), *texts, length)
            case "text_to_text":
                texts = (examples.texts, examples.texts2, examples.labels)
                return label_inputs(encoder.tokenizer, template_of(task, "text_to_text"), *texts, length)
    except DataError as error:
        raise DataError(f"task {task.name!r}, split {split}: {error}") from error
    return tokenise(encoder, examples, max_length)


def check_kind(encoder: Encoder, task: Task) -> None:
    """Raise `DataError` where a model of this kind cannot be asked a task of that kind."""
    if task.form is not None and encoder.kind != "causal":
        raise DataError(
            f"task {task.name!r} is of kind {task.kind}, for causal language models, and {encoder.folder} is read as {encoder.kind}. "
            "Give a causal language model, or a task with classes."
        )
    if task.form is None and encoder.kind == "causal":
        raise DataError(
            f"task {task.name!r} is of kind {task.kind}, and {encoder.folder} is a causal language model, which is not understood as an encoder of "
            "sentences. Describe the task as one of kind choices, generation or perplexity, give a checkpoint with an encoder, or `--kind sentence` "
            "(`load_encoder(folder, 'sentence')`) to read the mean of its tokens all the same."
        )
    seen = "image" if encoder.kind == "image" else "text"
    if (task.kind == "image") != (seen == "image"):
        raise DataError(
            f"task {task.name!r} is of kind {task.kind}, and the model reads {seen}s. Choose a task of {seen}s, or another model."
        )


def encode_causal(encoder: Encoder, task: Task, split: str, *, max_length: int, limit: int | None = None) -> CausalInputs:
    """A causal model's task as token ids; `max_length` is of what it is taught, what it is measured by goes up to its context. Raises `DataError`."""
    check_kind(encoder, task)
    assert task.form is not None
    asked, shots = task.asked(split, limit)
    try:
        return encode_questions(
            encoder.tokenizer,
            task.form,
            asked,
            shots,
            context=encoder.max_length,
            max_length=min(max_length, encoder.max_length),
            pad=padding_of(encoder.tokenizer),
        )
    except DataError as error:
        raise DataError(f"task {task.name!r}, split {split}: {error}") from error


def template_of(task: Task, kind: Literal["mask", "text_to_text"]) -> Prompt:
    """The template of a task for a masked or a text-to-text model: `<kind>.yaml` in its folder, else the shipped one of its name.

    Raises `DataError`: there is none, or its labels are not the task's.
    """
    own = task.folder / f"{kind}.yaml"
    shipped = Path(str(files("thetau.tasks").joinpath("prompts", kind, f"{task.name.removeprefix('glue_')}.yaml")))
    found = next((path for path in (own, shipped) if path.is_file()), None)
    if found is None:
        raise DataError(
            f"task {task.name!r} has no template for a {'masked' if kind == 'mask' else 'text-to-text'} language model. Write one: {own}."
        )
    prompt = read_prompt(found, masked=kind == "mask")
    if task.regression != (prompt.values is not None) or (not task.regression and prompt.labels != task.labels):
        got = "values" if prompt.values is not None else ", ".join(prompt.labels)
        need = "numbers" if task.regression else ", ".join(task.labels)
        raise DataError(f"{found}: the template must be of the task's labels, in their order: {need}. Got {got}.")
    return prompt


def tokenise(encoder: Encoder, split: Split, max_length: int) -> Tokens:
    """The token ids of a split; pairs go through the tokenizer's own pair encoding. Longer inputs are cut at `max_length` tokens.

    A pair is cut from its longer text first.
    """
    limit = min(max_length, encoder.max_length)
    tokenizer = encoder.tokenizer
    pair = [] if split.texts2 is None else [list(split.texts2)]
    encoded: Any = tokenizer(list(split.texts), *pair, truncation=True, max_length=limit, return_overflowing_tokens=False)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    full: Any = tokenizer(list(split.texts), *pair, truncation=False, verbose=False, return_attention_mask=False)
    pads = {"input_ids": int(tokenizer.pad_token_id), "attention_mask": 0, "token_type_ids": int(tokenizer.pad_token_type_id)}
    return Tokens(
        columns=columns,
        pads={name: pads[name] for name in columns},
        labels=split.labels,
        max_length=limit,
        truncated=sum(len(ids) > limit for ids in full["input_ids"]),
    )


def ordered_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches, the shortest examples first, so that little is padded; each example once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) >= _ROWS_PER_BATCH or (len(batch) + 1) * lengths[index] > _TOKENS_PER_BATCH):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def features(
    encoder: Encoder, inputs: Inputs, tick: Callable[[int], None] | None = None, rows: Sequence[int] | None = None
) -> Float[Tensor, "example feature"]:
    """What the head reads of each example, in the order of `inputs`, or of `rows`; `tick` is called with the number of tokens or patches
    done, in the place of whoever watches (`thetau.pace`).

    Raises `DataError` when the weights that `encoder` runs with give NaN or Inf, and for a causal model, whose answers differ in length.
    """
    if encoder.kind == "causal":
        raise DataError(
            f"{encoder.folder}: a causal language model has no features of one length, which this needs. Give an encoder and tasks with classes."
        )
    places = range(len(inputs)) if rows is None else rows
    done: list[tuple[int, Tensor]] = []
    encoder.module.eval()
    with torch.inference_mode(), counted_by(tick, sum(inputs.lengths[place] for place in places), "tokens") as advance:
        for batch in ordered_batches([inputs.lengths[place] for place in places]):
            indices = [places[i] for i in batch]
            output = encoder.module(**inputs.batch(indices))
            if not torch.isfinite(output).all():
                raise DataError(
                    "the model's features must be finite; these weights give NaN or Inf, so no accuracy would mean anything."
                )
            done.extend(zip(batch, output, strict=True))
            advance(sum(inputs.lengths[i] for i in indices))
        return torch.stack([row for _, row in sorted(done, key=lambda pair: pair[0])])
