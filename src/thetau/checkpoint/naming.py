"""What a tensor is, told by its name and shape: attention, MLP, embedding, norm, bias; its layer; how it is stored.

Covers the names of BERT, RoBERTa, MPNet, ViT, DINOv2, CLIP (transformers and open_clip), T5, GPT-2, GPT-NeoX and Llama-style models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The part that a tensor plays."""

    ATTENTION = "attention"  # weight matrices of q, k, v, o inside a block
    MLP = "mlp"  # every other weight matrix inside a block
    LINEAR = "linear"  # weight matrices outside the blocks: poolers, projections
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    CONV = "conv"
    OTHER = "other"


_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|resblocks|h|block)\.(\d+)(?=\.)")
_ATTENTION = re.compile(
    r"(?:^|[._])(?:attn|attention|crossattention|self_attn|cross_attn|SelfAttention|EncDecAttention|q_proj|k_proj|v_proj|o_proj|in_proj|qkv|Wqkv)(?=[._]|$)"
)
_ATTENTION_OUTPUT = re.compile(
    r"(?:^|[._])(?:o|wo|o_proj|out_proj|out_lin|c_proj|(?:attn|attention)\.(?:proj|dense|output\.dense))\.weight$"
)
_EMBEDDING = re.compile(
    r"embed|(?:^|\.)(?:wte|wpe|shared|positional|class_embedding|relative_attention_bias)(?:\.|$)", re.IGNORECASE
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|classifier|score|qa_outputs|heads?|cls\.predictions)(?:\.|$)")
# Words of an MLP, and of matrices outside the blocks: a name with one of them leaves no doubt.
_MLP = re.compile(
    r"(?:^|[._])(?:mlp|ffn?|feed_forward|feedforward|DenseReluDense|intermediate|output|(?:c_)?fc(?:_?(?:\d|in|out))?|c_proj"
    r"|(?:gate_)?up_proj|gate_proj|down_proj|dense_h_to_4h|dense_4h_to_h|lin(?:ear)?_?[12]|w[123]|wi(?:_\d)?|wo|experts?|block_sparse_moe)(?=[._]|$)"
)
_OUTSIDE = re.compile(
    r"(?:^|[._])(?:pooler|proj|project|projection|proj_(?:in|out)|(?:visual|text)_projection|projector|transform|classifier)(?=[._]|$)"
)
# A numbered container of any name that holds such parts, as `encoder.0.q_proj`, where no word for a block is known.
_NUMBERED = re.compile(r"(?:^|\.)\w*[A-Za-z_]\w*\.(\d+)(?=\.)")
_NORM = re.compile(r"norm|(?:^|[._])ln(?:_?\w)?(?=[._]|$)", re.IGNORECASE)
_CONV1D = re.compile(
    r"(?:^|\.)h\.\d+\.(?:attn\.c_attn|attn\.c_proj|attn\.q_attn|crossattention\.\w+|mlp\.c_fc|mlp\.c_proj)\.weight$"
)
_FUSED = re.compile(r"(?:in_proj_weight|(?:^|\.)(?:qkv|Wqkv|W_pack|c_attn)\.weight)$")


_STATISTIC = re.compile(
    r"(?:^|\.)(?:running_mean|running_var|num_batches_tracked|inv_freq|original_inv_freq|masked_bias|cos_cached|sin_cached|attn_mask"
    r"|relative_coords_table|causal_mask|attn\.bias_mask)$"
)
_VARIANCE = re.compile(r"(?:^|\.)running_var$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is no weight but what a model counts, or works out from its config: moments of batches, frequencies, masks, positions."""
    return _STATISTIC.search(name) is not None


def is_variance(name: str) -> bool:
    """Whether a tensor holds variances, which are never negative."""
    return _VARIANCE.search(name) is not None


@dataclass(frozen=True)
class View:
    """How a stored matrix maps to logical ones of shape `[d_out, d_in]`: transposed (GPT-2's Conv1D), and `parts` stacked along d_out."""

    transposed: bool = False
    parts: int = 1


def layer_of(name: str) -> int | None:
    """The block's number, or None outside the blocks.

    A number after a word for blocks (`layer.3`, `h.3`), else the first one after which a part of a block is named (`encoder.3.q_proj`).
    """
    place = place_of(name)
    return place[1] if place else None


def place_of(name: str) -> tuple[str, int, str] | None:
    """What stands before a block's number, the number, and what follows; None outside the blocks.

    Examples:
        >>> place_of("model.layers.3.mlp.up_proj.weight")
        ('model.layers', 3, 'mlp.up_proj.weight')
    """
    match = _LAYER.search(name)
    if match is None and not _HEAD.search(name):
        match = next((one for one in _NUMBERED.finditer(name) if _part_of_a_block(name[one.end() :])), None)
    return (name[: match.start(1) - 1], int(match[1]), name[match.end() + 1 :]) if match else None


def _part_of_a_block(rest: str) -> bool:
    """Whether what follows a number names attention, an MLP or a norm below it, and not only the last word of a tensor's name."""
    return any(pattern.search(rest) is not None for pattern in (_ATTENTION, _MLP, _NORM))


def plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the words of a name leave no doubt about what the tensor is and in which block."""
    if _LAYER.search(name) is None and layer_of(name) is not None:
        return False  # a container of an unknown name
    kind = kind_of(name, shape)
    if len(shape) != 2:
        return kind is not Kind.OTHER or not name.endswith("weight")
    match kind:
        case Kind.MLP:
            return _MLP.search(name) is not None
        case Kind.LINEAR:
            return _OUTSIDE.search(name) is not None
        case _:
            return True


def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    """The part that a tensor plays in its model."""
    if len(shape) < 2:
        if name.endswith("bias") and not _NORM.search(name):
            return Kind.BIAS
        return Kind.NORM if _NORM.search(name) else Kind.BIAS if name.endswith("bias") else Kind.OTHER
    if _EMBEDDING.search(name) and len(shape) == 2:
        return Kind.EMBEDDING
    if len(shape) > 2:
        return Kind.CONV if name.endswith("weight") else Kind.OTHER
    if not re.search(r"(?:^|[._])weight$|_weight$|(?:^|\.)proj$", name):
        return Kind.OTHER
    if layer_of(name) is not None:
        return Kind.ATTENTION if _ATTENTION.search(name) else Kind.MLP
    return Kind.HEAD if _HEAD.search(name) else Kind.LINEAR


def weighed_left(name: str, shape: tuple[int, int], kind: Kind | None = None) -> bool:
    """Whether a linear layer's weight `[d_out, d_in]` faces the space that its block's function fixes with its output, not its input.

    In an MLP that is the hidden layer, whose neurons a nonlinearity sets apart: the larger dimension, the input where both are equal. In
    attention it is the residual stream, which q, k and v read and the output projection writes: between them, any invertible change of
    a head's coordinates leaves the function as it is. `kind` is the tensor's where it is known otherwise than from its name.
    """
    if (kind or kind_of(name, shape)) is Kind.ATTENTION:
        return _ATTENTION_OUTPUT.search(name) is not None
    return shape[0] > shape[1]


def has_conv1d(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model keeps layers transposed, as GPT-2's: told from shapes by name, since GPT-BigCode has the same names and plain layers.

    All of these layers widen but an MLP's last one; a square one tells nothing.
    """
    found = [(name.endswith("mlp.c_proj.weight"), *shape) for name, shape in shapes.items() if view_of(name, shape).transposed]
    return any(rows > columns if narrows else rows < columns for narrows, rows, columns in found)


def view_of(name: str, shape: tuple[int, ...]) -> View:
    """How a stored matrix maps to logical ones; interleaved q/k/v (GPT-NeoX) counts as one matrix."""
    if len(shape) != 2:
        return View()
    transposed = _CONV1D.search(name) is not None
    out, inner = reversed(shape) if transposed else shape
    return View(transposed, 3 if _FUSED.search(name) and out == 3 * inner else 1)
