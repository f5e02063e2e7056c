"""Sentence encoders: architecture and tokenizer through transformers, weights through thetau's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thetau.errors import CheckpointError
from thetau.models.encoder import Encoder, TextEncoder
from thetau.models.library import max_length_of, quiet, reason_of, transformers
from thetau.models.naming import match_names
from thetau.models.pooling import pooling_of
from thetau.models.weights import read_weights, weights_hash


def load_sentence_encoder(folder: Path) -> Encoder:
    """The sentence encoder in a folder, in float32 and evaluation mode.

    Raises `CheckpointError` (not readable, not a text encoder, pooling not supported) and `AlignmentError` (weights
    that are not those of the config).
    """
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
        max_length=max_length_of(folder, config, tokenizer),
        base_hash=weights_hash(weights),
        form=pooling,
    )
    encoder.load(weights, str(folder))
    return encoder


def _skeleton(folder: Path) -> tuple[Any, Any, Any]:
    api = transformers()
    # The weights that are drawn here are overwritten; the fork leaves the caller's random state alone.
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = api.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            backbone = api.AutoModel.from_config(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{folder}: transformers cannot open it as an encoder with a tokenizer ({reason_of(error)})."
            ) from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer must have a padding token; it has none.")
    return config, tokenizer, backbone
