"""Random image models of a few thousand weights, and npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import WORDS

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


Array = np.ndarray[Any, Any]


def frame(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def made(kind: str) -> Any:
    """A tiny random model of transformers."""
    vision = {**SIZES, "intermediate_size": 32}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": len(WORDS) + 4,
    }
    text |= {"max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match kind:
            case "dinov2":
                model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
            case "vit":
                model = transformers.ViTModel(transformers.ViTConfig(**vision))
            case "vit-classifier":
                model = transformers.ViTForImageClassification(transformers.ViTConfig(**vision))
            case "clip":
                model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
            case "clip-vision":
                model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
            case _:
                model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=8))
        for parameter in model.parameters():  # away from transformers' zeros and ones, so that every tensor counts
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    model.config.architectures = [type(model).__name__]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder)
    model.float()
    if bars:
        transformers.utils.logging.enable_progress_bar()
    return folder


def write_npz(path: Path, **arrays: Any) -> Path:
    whole = {"train_images": frame(6, 5, 4, 3), "train_labels": np.array([0, 1, 2] * 2, dtype=np.uint8)} | arrays
    np.savez_compressed(path, **{name: array for name, array in whole.items() if array is not None})
    return path
