"""From a folder to a live encoder of the right kind."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from thetau.checkpoint.locate import OPEN_CLIP, locate
from thetau.errors import CheckpointError, nearest
from thetau.models.causal import load_causal
from thetau.models.encoder import Encoder, Kind, raw_features
from thetau.models.language import load_mask_encoder, load_text_to_text
from thetau.models.sentence import load_sentence_encoder
from thetau.models.vision import MODEL_TYPES, load_vision_encoder


def load_encoder(model: str | Path, kind: Kind | None = None, *, raw: bool = False) -> Encoder:
    """The encoder in a folder, a packaged model or a hub id, in float32 and evaluation mode; with `raw` as `raw_features`.

    Without `kind`, `kind_of` its folder. Raises `CheckpointError` (not found, not readable, not of the kind, pooling not
    supported) and `AlignmentError` (weights that are not those of the config).
    """
    folder = locate(model)
    encoder = _load(folder, kind)
    return raw_features(encoder) if raw else encoder


def _load(folder: Path, kind: Kind | None) -> Encoder:
    match kind or kind_of(folder):
        case "sentence":
            return load_sentence_encoder(folder)
        case "image":
            return load_vision_encoder(folder)
        case "mask":
            return load_mask_encoder(folder)
        case "text_to_text":
            return load_text_to_text(folder)
        case "causal":
            return load_causal(folder)
    raise CheckpointError(f"{folder}: the kind of an encoder must be one of {', '.join(get_args(Kind))}. Got {kind!r}.")


def kind_named(name: str | None) -> Kind | None:
    """The kind of this name; None for none. Raises `CheckpointError`."""
    known: tuple[Kind, ...] = get_args(Kind)
    found = next((kind for kind in known if kind == name), None)
    if name is not None and found is None:
        raise CheckpointError(f"the kind of an encoder must be one of {', '.join(known)}. Got {name!r}.{nearest(name, known)}")
    return found


def kind_of(folder: Path) -> Kind:
    """What the files of a folder say: an image model, a text-to-text one, a causal or a masked language model; else sentences.

    A language model that sentence-transformers pools (`modules.json`) is a sentence encoder. Raises `CheckpointError`: not readable.
    """
    if (folder / OPEN_CLIP).is_file():
        return "image"
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: must be a JSON object. Got {type(config).__name__}.")
    if config.get("model_type") in MODEL_TYPES:
        return "image"
    if config.get("is_encoder_decoder"):
        return "text_to_text"
    names = config.get("architectures") or []
    if not (folder / "modules.json").is_file() and is_causal(str(config.get("model_type", ""))):
        return "causal"
    masked = isinstance(names, list) and any(str(name).endswith("ForMaskedLM") for name in names)
    return "mask" if masked and not (folder / "modules.json").is_file() else "sentence"


def is_causal(model_type: str) -> bool:
    """Whether transformers knows this architecture as a causal language model and not as a masked one; False without transformers."""
    try:
        auto = import_module("transformers.models.auto.modeling_auto")
    except ImportError:
        return False
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
