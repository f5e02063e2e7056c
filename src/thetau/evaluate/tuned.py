"""Fine-tuned models as task vectors over one base: which task each is of, and in which space it lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from thetau.checkpoint.safetensors import SafetensorsFile
from thetau.errors import DataError
from thetau.evaluate.evaluator import Evaluator
from thetau.evaluate.spaces import Space, TangentSpace, WeightSpace
from thetau.facade import Expression, as_vector
from thetau.facade import open as open_weights
from thetau.finetune.output import read_record, trained_heads
from thetau.models import Encoder, read_weights
from thetau.tasks.head import AnyHead
from thetau.vectors.identity import identities


@final
@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A fine-tuned model: the name of its task, where it lies, whether its vector belongs to the tangent space.

    `given`: the words that named it. `raw`: whether it was trained on features that the head normalises.
    """

    task: str
    path: Path
    tangent: bool
    base_hash: str | None = None
    given: str = ""
    raw: bool = False

    def heads(self) -> dict[str, AnyHead]:
        """The heads that were trained with it, by task."""
        return trained_heads(self.path) if self.path.is_dir() else {}


def open_tuned(given: str | Path) -> Tuned:
    """A fine-tuned model by its path, whose record names its task, or by `task=path`. Raises `DataError`."""
    text = str(given)
    name, equals, rest = text.partition("=")
    path = Path(rest if equals else text)
    if not path.exists():
        raise DataError(f"{path}: no such model. Give its folder, or task=folder.")
    if not equals and (not path.is_dir() or read_record(path) is None):
        raise DataError(f"{path}: has no record of its task. Name it: TASK={path}.")
    return tuned_at(path, name if equals else None, text)


def tuned_at(path: Path, name: str | None, given: str = "") -> Tuned:
    """What lies at a path that is there; called as its record says, which there must be then, or `name`."""
    record = (read_record(path) if path.is_dir() else None) or {}
    return Tuned(
        task=str(record["task"]) if name is None else name,
        path=path,
        tangent=is_tangent(path),
        base_hash=record.get("base_hash"),
        given=given,
        raw=record.get("features") == "raw",
    )


def task_vectors(given: Sequence[str], base: Expression) -> tuple[list[str], list[Expression]]:
    """Names and task vectors of models, adapters or saved vectors, as `path` or `name=path`.

    A fine-tuned model that was not named is called by the task that its record says; anything else by its path.
    """
    vectors: list[Expression] = []
    own: list[str | None] = []
    for text in given:
        name, equals, path = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        file = path if named else text
        record = read_record(Path(file)) if Path(file).is_dir() else None
        label = Path(file).name.removesuffix(".safetensors") if Path(file).exists() else None
        vectors.append(as_vector(open_weights(file, base=base, name=label if record is None else str(record["task"])), base))
        own.append(name if named else None)
    return [name or other for name, other in zip(own, identities(vectors), strict=True)], vectors


def is_tangent(path: Path) -> bool:
    """Whether a checkpoint or a saved vector says that it belongs to the tangent space."""
    if path.is_dir() and (record := read_record(path)) is not None:
        return record.get("space") == "tangent"
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    return (
        bool(files) and files[0].suffix == ".safetensors" and SafetensorsFile(files[0]).metadata.get("thetau.space") == "tangent"
    )


def one_space(models: Sequence[Tuned], encoder: Encoder) -> bool:
    """Whether all the models live in the tangent space, or none. Raises `DataError`: some do, another base, a task twice."""
    if not models:
        raise DataError("at least one fine-tuned model is needed. Got none.")
    for model in models:
        check_over(model, encoder)
    names = [model.task for model in models]
    if len(set(names)) != len(names):
        raise DataError(f"each model must be of another task. Got {', '.join(names)}; name them apart: NAME=folder.")
    tangent = [model for model in models if model.tangent]
    if tangent and len(tangent) < len(models):
        other = next(model for model in models if not model.tangent)
        raise DataError(
            f"{tangent[0].path} belongs to the tangent space and {other.path} does not. "
            "Task vectors are added in one space: fine-tune them with the same paradigm."
        )
    return bool(tangent)


def check_over(model: Tuned, encoder: Encoder) -> None:
    """Refuse a model that does not belong over this base. Raises `DataError`: trained from another, or linear over other features."""
    if model.base_hash not in (None, encoder.base_hash):
        raise DataError(
            f"{model.path}: was fine-tuned from another base than {encoder.folder} (their contents differ). Give its own base."
        )
    if model.raw != encoder.raw and model.tangent:
        now = {True: "raw", False: "unit"}
        raise DataError(
            f"{model.path}: is the linear form of {now[model.raw]} features, and these are {now[encoder.raw]}. Give --features {now[model.raw]}."
        )


def read_vectors(models: Sequence[Tuned], encoder: Encoder, base: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The task vector of each model in float32, by the checkpoint's names; `base` are the weights of `encoder`'s."""
    return {model.task: difference(read_weights(model.path, base=encoder.folder), base) for model in models}


def difference(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ − θ₀ of the floating-point tensors, in float32."""
    return {name: tensor.float() - base[name].float() for name, tensor in weights.items() if tensor.is_floating_point()}


def check_linear(encoder: Encoder) -> None:
    """Refuse a model whose linear form cannot be measured. Raises `DataError`."""
    if encoder.kind == "causal":
        raise DataError(
            "a causal language model is measured as itself: its linear form gives logits of texts that are there, and says none. "
            "Use the weights (--space weights), which the vector of the tangent space was not trained for."
        )


def make_space(
    evaluator: Evaluator,
    base: Mapping[str, Tensor],
    vectors: Mapping[str, Mapping[str, Tensor]],
    *,
    tangent: bool,
    cache: Path | None = None,
) -> Space:
    """The space in which `vectors` (by the checkpoint's names) are evaluated: the model itself, or its linear form."""
    if not tangent:
        return WeightSpace(evaluator, base, vectors)
    check_linear(evaluator.encoder)
    live = {}
    for name, vector in vectors.items():
        moved = evaluator.encoder.parameters(vector)
        live[name] = {key: tau for key, tau in moved.items() if bool(tau.any())} or moved
    return TangentSpace(evaluator, live, cache)
