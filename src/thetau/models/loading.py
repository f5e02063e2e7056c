"""From a folder to a live encoder: architecture and tokenizer through transformers, weights through thetau's own reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from thetau.errors import CheckpointError
from thetau.models.encoder import Encoder, TextEncoder
from thetau.models.locate import locate
from thetau.models.naming import match_names
from thetau.models.pooling import pooling_of
from thetau.models.weights import read_weights, weights_hash


def load_encoder(model: str | Path) -> Encoder:
    """The encoder in a folder, a packaged model or a hub id, in float32 and evaluation mode.

    Raises `CheckpointError` (not found, not readable, not a text encoder, pooling not supported) and `AlignmentError` (weights
    that are not those of the config).
    """
    folder = locate(model)
    pooling = pooling_of(folder)
    config, tokenizer, backbone = _skeleton(folder)
    weights = read_weights(folder)
    prefix = str(getattr(backbone, "base_model_prefix", ""))
    if not any("pooler." in name for name in weights) and getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # saved without the head that masked language models pool with, and `pool` does not use it
    names = match_names(backbone, weights, prefix, str(folder))
    stored = set(names.values())
    encoder = Encoder(
        module=TextEncoder(backbone.float().eval(), pooling),
        tokenizer=tokenizer,
        folder=folder,
        names=names,
        carried={name: tensor for name, tensor in weights.items() if name not in stored},
        dtypes={name: weights[name].dtype for name in stored},
        max_length=_max_length(folder, config, tokenizer),
        base_hash=weights_hash(weights),
    )
    encoder.load(weights, str(folder))
    return encoder


def _skeleton(folder: Path) -> tuple[Any, Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("running a model needs transformers. Install it: pip install 'thetau[models]'") from error
    api: Any = transformers  # its functions carry no types
    # The weights that are drawn here are overwritten; the fork leaves the caller's random state alone.
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            backbone = api.AutoModel.from_config(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{folder}: transformers cannot open it as an encoder with a tokenizer ({reason}).") from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer must have a padding token; it has none.")
    return config, tokenizer, backbone


def _max_length(folder: Path, config: Any, tokenizer: Any) -> int:
    limits = [int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", 0) or 0)]
    own = folder / "sentence_bert_config.json"
    if own.is_file():
        limits.append(int(json.loads(own.read_text(encoding="utf-8")).get("max_seq_length") or 0))
    return min(limit for limit in limits if limit > 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers; the caller's setting comes back."""
    import transformers

    logging: Any = transformers.utils.logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
