"""The text towers of CLIP models (Radford et al., ICML 2021, <https://arxiv.org/abs/2103.00020>), of transformers and open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thetau.checkpoint.locate import OPEN_CLIP
from thetau.errors import CheckpointError, DataError
from thetau.models.library import package, quiet, transformers
from thetau.models.naming import match_names
from thetau.models.vision import config_of, open_clip_model
from thetau.models.weights import read_weights

_SENTENCES = 64


def load_clip_text(folder: Path) -> tuple[nn.Module, Any]:
    """The text tower of the CLIP model in a folder, in float32 and evaluation mode, and its tokenizer.

    Raises `CheckpointError` (not readable, no CLIP model) and `AlignmentError` (weights that are not those of the config).
    """
    if (folder / OPEN_CLIP).is_file():
        model, tokenizer = open_clip_model(folder), package("open_clip", "open_clip_torch").get_tokenizer(f"local-dir:{folder}")
    else:
        api, config = transformers(), config_of(folder)
        if config.model_type != "clip":
            raise CheckpointError(f"{folder}: a text tower is part of a model of type clip. Got {config.model_type!r}.")
        config.text_config.projection_dim = config.projection_dim
        with quiet(), torch.random.fork_rng(devices=[]):
            try:
                model = api.CLIPTextModelWithProjection(config.text_config).float().eval()
                tokenizer = api.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
                raise CheckpointError(f"{folder}: transformers cannot open its text tower ({error}).") from error
    weights = read_weights(folder)
    live = model.state_dict()
    with torch.no_grad():
        for name, stored in match_names(model, weights, "", str(folder)).items():
            if live[name].shape != weights[stored].shape:
                shapes = f"{list(live[name].shape)}, got {list(weights[stored].shape)}"
                raise CheckpointError(
                    f"{folder}: {stored} must have shape {shapes}. Is the folder's config that of these weights?"
                )
            live[name].copy_(weights[stored])
    return model, tokenizer


def clip_text_features(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Float[Tensor, "sentence feature"]:
    """The unit vectors of sentences in the space of the images. `model` is open_clip's, or transformers' `CLIPModel` or
    `CLIPTextModelWithProjection`; `tokenizer` is its own.
    """
    if not sentences:
        raise DataError("`clip_text_features(sentences=...)` must hold at least one sentence. Got none.")
    tower: Any = model
    rows = []
    with torch.no_grad():
        for start in range(0, len(sentences), _SENTENCES):
            batch = list(sentences[start : start + _SENTENCES])
            if hasattr(tower, "encode_text"):
                rows.append(tower.encode_text(tokenizer(batch)))
            else:
                columns = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
                output = tower.text_model(input_ids=columns["input_ids"], attention_mask=columns["attention_mask"])
                rows.append(tower.text_projection(output.pooler_output))
    return nn.functional.normalize(torch.cat(rows), dim=-1)
