"""8-bit floats with scales: a tensor's, a row's (FBGEMM, compressed-tensors), or a block's (DeepSeek-V3, Qwen, MiniMax: 128 × 128).

The value is code · scale in float32, as `Fp8Dequantize` of transformers has it; `weight_scale_inv` multiplies too, whatever its name
says (DeepSeek-V3's `weight_dequant`, <https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py>). Scales in uint8 or E8M0 are
exponents (MXFP8, DeepSeek-V4). DeepSeek-V4 calls them `scale` beside `weight`, Mistral Large `qscale_weight`.
An 8-bit float without any scale, in a model that says nothing of quantisation, is a plain number and stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from thetau.checkpoint.dtypes import EXPONENTS, Dtype
from thetau.checkpoint.quantised.form import Form, Said, damaged
from thetau.checkpoint.quantised.scaled import Block, Scaled, block_of
from thetau.checkpoint.source import Source

CODES = (Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2FNUZ)
SCALES = ("_scale_inv", "_scale")
BLOCK: Block = (128, 128)
MX = (1, 32)


class Fp8(Form):
    """`weight` in float8 beside `weight_scale` or `weight_scale_inv`."""

    title = "fp8 with scales"
    methods = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp8")

    def find(self, stored: Source, said: Said) -> Iterator[Scaled]:
        """Every 8-bit float with a scale; one without, where others have one, is refused."""
        codes = [name for name, spec in stored.specs.items() if spec.dtype in CODES and not name.endswith(SCALES)]
        scales = {name: next((one for one in scale_names(name) if one in stored.specs), None) for name in codes}
        bare = [name for name, scale in scales.items() if scale is None]
        if bare and (said.method in self.methods or len(bare) < len(codes)):
            damaged(
                stored,
                bare[0],
                f"is a weight in fp8 and its scale ({bare[0] + SCALES[0]!r} or {bare[0] + SCALES[1]!r}) is missing. "
                "Give the whole checkpoint: codes mean nothing without their scales.",
            )
        blocks = _blocks(said.table)
        for name, scale in scales.items():
            if scale is None:
                continue
            kind = stored.specs[scale].dtype
            if not kind.is_floating_point and kind != Dtype.U8:
                damaged(stored, scale, f"holds scales and must be floating-point, or exponents in uint8. Got {kind}.")
            known = {Dtype.U8: [MX], EXPONENTS: [*blocks, MX]}.get(kind, blocks)
            block = block_of(stored, name, scale, known)
            yield Scaled(name=name, shape=stored.specs[name].shape, parts={"codes": name, "scale": scale}, block=block)


def scale_names(codes: str) -> list[str]:
    """What the scales of a weight may be called."""
    stem = codes.removesuffix("weight")
    return [codes + end for end in SCALES] + ([f"{stem}scale", f"{stem}qscale_weight"] if codes.endswith(".weight") else [])


def _blocks(table: Mapping[str, Any]) -> list[Block]:
    """The blocks that the config names; DeepSeek's where it names none."""
    said = [table.get("weight_block_size"), *(weights.get("block_structure") for weights in group_weights(table))]
    found = [
        (one[0], one[1])
        for one in said
        if isinstance(one, list | tuple) and len(one) == 2 and all(type(n) is int and n > 0 for n in one)
    ]
    return found or [BLOCK]


def group_weights(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of weights, by group of modules."""
    groups = table.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    )
    return [weights for weights in found if isinstance(weights, Mapping)]
