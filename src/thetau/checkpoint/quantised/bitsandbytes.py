"""bitsandbytes: int8 with a scale a row, and 4-bit floats (NF4, FP4) with a scale a block, which may be quantised themselves.

As its own code reads them (`int8_vectorwise_dequant`, `dequantize_4bit`), in float32: Dettmers et al., LLM.int8(),
<https://arxiv.org/abs/2208.07339>, and QLoRA, <https://arxiv.org/abs/2305.14314>. The scales of 4-bit weights (`absmax`) may be codes in
a table of 256 values with scales of their own and an offset ("double quantisation").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.quantised.form import Form, Said, Weight, check_shape, damaged, part
from thetau.checkpoint.quantised.reading import nibbles
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

UNIT = 7.874015718698502e-3  # 1/127, as bitsandbytes writes it
STATE = ".quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Int8Weight(Weight):
    """A weight code · SCB / 127. Parts: `codes` int8 `[out, in]`, `scale` `[out]`."""

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32."""
        codes = stored.read(self.parts["codes"], start, stop)
        scale = stored.read(self.parts["scale"]).float().reshape(-1)[start:stop]
        return codes.float().mul_(scale[:, None]).mul_(UNIT)


class Int8(Form):
    """`weight` in int8 beside `SCB`."""

    title = "bitsandbytes int8"
    methods = ("bitsandbytes",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every weight with an `SCB`."""
        for scale in [name for name in stored.specs if name.endswith(".SCB")]:
            stem = scale.removesuffix(".SCB")
            codes = part(stored, scale, f"{stem}.weight", self.title)
            spec = stored.specs[codes]
            if spec.dtype != Dtype.I8 or len(spec.shape) != 2:
                damaged(
                    stored,
                    codes,
                    f"must be int8 and a matrix, as {scale!r} holds its scales. Got {spec.dtype}, {list(spec.shape)}.",
                )
            if stored.specs[scale].elements != spec.rows:
                check_shape(stored, scale, (spec.rows,), f"a scale for each row of {codes!r}")
            parts = {"codes": codes, "scale": scale}
            layout = f"{stem}.weight_format"
            if layout in stored.specs:
                if int(stored.read(layout).reshape(-1)[0]) != 0:
                    damaged(stored, layout, "must say row-major (0): save the model with a newer bitsandbytes.")
                parts["layout"] = layout
            yield Int8Weight(name=codes, shape=spec.shape, parts=parts)


@dataclass(frozen=True, kw_only=True)
class FourBitWeight(Weight):
    """A weight map[code] · absmax of its block of entries, row after row.

    Parts: `codes`, two a byte, the first in the higher half; `map` of 16 values; `absmax` a block; where that is in codes itself,
    `nested_map` of 256 values and `nested_absmax`, to which `offset` is added.
    """

    block: int
    nested_block: int
    offset: float

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32."""
        row = prod(self.shape[1:])
        first, last = start * row, stop * row
        spec = stored.specs[self.parts["codes"]]
        size = spec.row_elements * spec.dtype.itemsize
        begin, end = first // 2 // size, -(-last // (2 * size))
        raw = stored.read(spec.name, begin, end).contiguous().view(torch.uint8).reshape(-1)
        codes = nibbles(raw, high_first=True)[first - 2 * begin * size : last - 2 * begin * size]
        blocks = torch.arange(first, last) // self.block
        scale = self._absmax(stored, first // self.block, -(-last // self.block))
        values = stored.read(self.parts["map"]).float()[codes]
        return values.mul_(scale[blocks - first // self.block]).reshape(stop - start, *self.shape[1:])

    def _absmax(self, stored: Source, first: int, last: int) -> Tensor:
        """The scales of some blocks, in float32."""
        found = stored.read(self.parts["absmax"], first, last)
        if "nested_map" not in self.parts:
            return found.float()
        scale = stored.read(self.parts["nested_absmax"]).float()[torch.arange(first, last) // self.nested_block]
        return stored.read(self.parts["nested_map"]).float()[found.long()].mul_(scale).add_(self.offset)


class FourBit(Form):
    """`weight` in packed 4-bit codes beside `weight.absmax`, `weight.quant_map` and `weight.quant_state.bitsandbytes__nf4`."""

    title = "bitsandbytes 4-bit (NF4, FP4)"
    methods = ("bitsandbytes",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every weight with a `quant_state`."""
        for key in [name for name in stored.specs if STATE in name]:
            yield self._weight(stored, key)

    def _weight(self, stored: Source, key: str) -> FourBitWeight:
        name = key.partition(STATE)[0]
        parts = {"state": key}
        for role, end in (("codes", ""), ("absmax", ".absmax"), ("map", ".quant_map")):
            parts[role] = part(stored, key, name + end, self.title)
        state = _state(stored, key)
        shape, block = tuple(state["shape"]), state["blocksize"]
        if block not in BLOCKS:
            damaged(stored, key, f"must give one of the block sizes {', '.join(map(str, BLOCKS))}. Got {block!r}.")
        spec = stored.specs[name]
        if len(shape) < 1 or spec.row_elements != 1 or spec.nbytes != -(-prod(shape) // 2):
            damaged(
                stored,
                name,
                f"must hold the {prod(shape)} codes of shape {list(shape)}, two a byte, in one column. Got {spec.dtype} {list(spec.shape)}.",
            )
        check_shape(stored, parts["map"], (16,), "a value for each code")
        blocks = -(-prod(shape) // block)
        check_shape(stored, parts["absmax"], (blocks,), f"a scale for each {block} entries of {name!r}")
        nested = f"{name}.nested_absmax"
        if (nested in stored.specs) != (stored.specs[parts["absmax"]].dtype == Dtype.U8):
            damaged(
                stored,
                parts["absmax"],
                f"must be codes (uint8) exactly where {nested!r} holds their scales. Give the whole checkpoint.",
            )
        inner = 1
        if nested in stored.specs:
            parts["nested_absmax"] = nested
            parts["nested_map"] = part(stored, key, f"{name}.nested_quant_map", self.title)
            inner = int(state.get("nested_blocksize") or 256)
            check_shape(stored, parts["nested_map"], (256,), "a value for each code")
            check_shape(stored, nested, (-(-blocks // inner),), f"a scale for each {inner} scales of {name!r}")
        offset = float(state.get("nested_offset") or 0.0)
        return FourBitWeight(name=name, shape=shape, parts=parts, block=block, nested_block=inner, offset=offset)


def _state(stored: Source, key: str) -> dict[str, Any]:
    """The table that a `quant_state` tensor holds as the bytes of a JSON text."""
    try:
        state = json.loads(bytes(stored.read(key).reshape(-1).to(torch.uint8).tolist()).decode("utf-8"))
        fine = all(type(n) is int and n >= 0 for n in state["shape"]) and type(state["blocksize"]) is int
        fine = fine and type(state.get("nested_blocksize") or 256) is int and int(state.get("nested_blocksize") or 256) > 0
        fine = fine and float(state.get("nested_offset") or 0.0) == float(state.get("nested_offset") or 0.0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damaged(stored, key, f"must be a JSON table with `shape` and `blocksize` ({error}). Copy the file again.")
    if not fine:
        damaged(stored, key, f"gives no usable shape or block size. Got {str(state)[:120]}.")
    return dict(state)
