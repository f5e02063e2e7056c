"""LoRA through peft: adapters around the backbone while it trains, and an ordinary adapter folder at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thetau.errors import DataError
from thetau.finetune.config import FinetuneConfig
from thetau.models import Encoder
from thetau.models.parts import part_of


@contextmanager
def adapted(encoder: Encoder, config: FinetuneConfig) -> Iterator[Any]:
    """The encoder runs with fresh adapters inside the block; the block is given peft's model. Raises `DataError`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DataError("paradigm lora needs peft. Install it: pip install 'thetau[models]'") from error
    backbone = encoder.backbone
    targets = _targets(backbone, config)
    alpha: Any = config.lora_alpha  # peft takes fractions too
    settings = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it is renaming
                model: Any = get_peft_model(backbone, settings)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"lora_targets={config.lora_targets}: peft cannot adapt these modules ({reason}).") from error
    encoder.module.backbone = model
    try:
        yield model
    finally:
        model.unload()
        encoder.module.backbone = backbone
        for parameter in backbone.parameters():
            parameter.requires_grad_(True)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors; `base` is what the adapter says it belongs to."""
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = base
    # Embeddings are no target here; "auto" would ask the hub for the base to see whether they were resized.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _targets(backbone: nn.Module, config: FinetuneConfig) -> list[str]:
    if config.lora_targets is not None:
        return list(config.lora_targets)
    found = [
        name.removesuffix(".weight")
        for name, parameter in backbone.named_parameters()
        if name.endswith(".weight") and part_of(name, tuple(parameter.shape)) in ("attention", "mlp")
    ]
    if not found:
        raise DataError(
            "paradigm lora: no attention or MLP weights are known in this model by their names. Name modules in lora_targets."
        )
    return found
