"""The built-in rules: words that wrappers put into a path, and words that libraries have changed over the years, brought to one spelling.

A spelling is no name of any checkpoint. Two names that have one spelling are two names of one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# What torch.compile, activation checkpointing, FSDP, DDP, DeepSpeed and PEFT put into a path.
_WRAPPERS = re.compile(
    r"(?:^base_model\.model\.|(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|module|default"
    r"|base_layer)\.)"
)
_NORM = re.compile(r"((?:^|[._])(?:layer_?norm|norm|ln)\w*)\.(gamma|beta)$", re.IGNORECASE)
_PARTS = {"gamma": "weight", "beta": "bias"}
# torch.nn.utils.weight_norm, before and after it became a parametrization.
_WEIGHT_NORM = re.compile(r"(^|\.)weight_([gv])$")
_ORIGINAL = {"g": "original0", "v": "original1"}
# transformers 5 renamed the parts of a block, not the files.
_BLOCKS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?:^|(?<=\.))(?:encoder\.)?layers?\.(?=\d)"), "layers."),
    (re.compile(r"\.attention\.(?:attention|self)\.(query|key|value)\."), lambda match: f".attention.{match[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"(?<=\d)\.output\.dense\."), ".mlp.fc2."),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
)
# What stands before a language model's own names alone, inside a model that reads images, or under a head.
_LEADING = re.compile(r"^(?:(?:model|language_model|text_model|vit|dinov2|vision_model)\.)+")


def unwrapped(name: str) -> str:
    """A name without what wrappers put into it, and with the words of today for norms and weight normalisation.

    Examples:
        >>> unwrapped("_orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
        'layers.0.mlp.weight'
        >>> unwrapped("bert.embeddings.LayerNorm.gamma")
        'bert.embeddings.LayerNorm.weight'
        >>> unwrapped("conv.weight_g")
        'conv.parametrizations.weight.original0'
    """
    name = _WRAPPERS.sub("", name)
    name = _NORM.sub(lambda match: f"{match[1]}.{_PARTS[match[2].lower()]}", name)
    return _WEIGHT_NORM.sub(lambda match: f"{match[1]}parametrizations.weight.{_ORIGINAL[match[2]]}", name)


def spelled(name: str) -> str:
    """A name in the one spelling, with the words before the layers that models with other towers or heads have.

    Examples:
        >>> spelled("encoder.layer.0.attention.attention.query.weight")
        'layers.0.attention.q_proj.weight'
        >>> spelled("layers.0.attention.q_proj.weight")
        'layers.0.attention.q_proj.weight'
    """
    name = unwrapped(name)
    for pattern, replacement in _BLOCKS:
        name = pattern.sub(replacement, name)
    return name


def bare(name: str) -> str:
    """A spelling without the words that stand before a language model's layers.

    Examples:
        >>> bare("model.language_model.layers.0.mlp.up_proj.weight")
        'layers.0.mlp.up_proj.weight'
    """
    return spelled(_LEADING.sub("", unwrapped(name)))
