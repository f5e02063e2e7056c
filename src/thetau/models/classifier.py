"""A checkpoint with a classifier that was trained with it: the model of the library as a whole, whose output is its own logits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from thetau.errors import CheckpointError
from thetau.models.encoder import Encoder
from thetau.models.library import max_length_of, quiet, reason_of, transformers
from thetau.models.naming import match_names
from thetau.models.vision import load_vision_encoder, matched
from thetau.models.weights import read_weights, weights_hash

_KINDS = {"ForSequenceClassification": "sentence", "ForImageClassification": "image"}
_NUMBERED = re.compile(r"LABEL_\d+")


@final
class ClassifierModel(nn.Module):
    """A classifier as a plain module: `forward(**columns) → [example, class]`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **columns: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.backbone(**columns).logits
        return logits


@final
@dataclass(frozen=True, kw_only=True)
class Classifier:
    """`encoder` gives logits instead of features. `labels`: the names of its classes, none where the config only numbers them."""

    encoder: Encoder
    labels: tuple[str, ...] | None
    count: int


def classifier_of(folder: Path) -> str | None:
    """The class of a checkpoint that was saved with a classifier (`BertForSequenceClassification`), else None."""
    config = _config(folder)
    names = config.get("architectures") or []
    found = [str(name) for name in names if any(str(name).endswith(end) for end in _KINDS)] if isinstance(names, list) else []
    return found[0] if found else None


def load_classifier(folder: Path) -> Classifier:
    """The classifier in a folder, in float32 and evaluation mode.

    Raises `CheckpointError` (no classifier, or one that transformers cannot open) and `AlignmentError` (weights that are not those of the config,
    the classifier's own among them).
    """
    name = classifier_of(folder)
    if name is None:
        raise CheckpointError(f"{folder}: holds no classifier; its config names none. Use a head of class names: --head names.")
    kind = next(kind for end, kind in _KINDS.items() if name.endswith(end))
    api = transformers()
    made = api.AutoModelForSequenceClassification if kind == "sentence" else api.AutoModelForImageClassification
    # The weights that are drawn here are overwritten; the fork leaves the caller's random state alone.
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True) if kind == "sentence" else None
            backbone: Any = made.from_config(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"{folder}: transformers cannot open it as a classifier ({reason_of(error)}).") from error
    weights = read_weights(folder)
    names = matched(backbone, weights, str(folder)) if kind == "image" else match_names(backbone, weights, "", str(folder))
    stored = set(names.values())
    image = load_vision_encoder(folder).image if kind == "image" else None
    encoder = Encoder(
        module=ClassifierModel(backbone.float().eval()),
        folder=folder,
        names=names,
        carried={key: tensor for key, tensor in weights.items() if key not in stored},
        dtypes={key: weights[key].dtype for key in stored},
        max_length=10**6 if tokenizer is None else max_length_of(folder, config, tokenizer),
        base_hash=weights_hash(weights),
        form="classifier",
        kind="image" if kind == "image" else "sentence",
        tokenizer=tokenizer,
        image=image,
    )
    encoder.load(weights, str(folder))
    count = int(config.num_labels)
    labels = tuple(str(config.id2label[i]) for i in range(count))
    return Classifier(encoder=encoder, labels=None if all(map(_NUMBERED.fullmatch, labels)) else labels, count=count)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    return found if isinstance(found, dict) else {}
