"""compressed-tensors' integers: one code an entry (`int-quantized`), or packed into 32-bit words along a row (`pack-quantized`).

The value is (code − zero) · scale in float32; the library multiplies in the scales' own dtype, which rounds the same product, and, for 8 bits
with zero points in bfloat16, the difference before it. Its fp8 and fp4 forms are read in `fp8` and `fp4`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.quantised.form import Form, Said, Weight, check_index, check_shape, damaged, part
from thetau.checkpoint.quantised.fp8 import group_weights
from thetau.checkpoint.quantised.reading import from_words
from thetau.checkpoint.quantised.scaled import Block, Scaled, block_of
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 4, 8)


class PlainInts(Form):
    """`weight` in int8 beside `weight_scale`."""

    title = "compressed-tensors int8"
    methods = ("compressed-tensors",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every int8 weight with a scale."""
        blocks: list[Block] = [(1, size) for size in _numbers(said.table, "group_size")]
        for codes in [name for name, spec in stored.specs.items() if spec.dtype == Dtype.I8 and f"{name}_scale" in stored.specs]:
            scale, zero = f"{codes}_scale", f"{codes}_zero_point"
            parts = {"codes": codes, "scale": scale}
            if zero in stored.specs:
                check_shape(stored, zero, stored.specs[scale].shape, f"a zero point for each scale of {codes!r}")
                parts["zero"] = zero
            block = block_of(stored, codes, scale, blocks)
            yield Scaled(name=codes, shape=stored.specs[codes].shape, parts=parts, block=block)


@dataclass(frozen=True, kw_only=True)
class PackedWeight(Weight):
    """A weight `[out, in]` in words along its rows, codes stored plus half their range. `group`: inputs that share a scale."""

    bits: int
    group: int

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32."""
        half = 1 << (self.bits - 1)
        codes = from_words(stored.read(self.parts["codes"], start, stop).T, self.bits).T[:, : self.shape[1]] - half
        scale = stored.read(self.parts["scale"], start, stop).float()
        index = stored.read(self.parts["index"]).long() if "index" in self.parts else torch.arange(self.shape[1]) // self.group
        if "zero" in self.parts:
            pack = 32 // self.bits
            first = start // pack
            words = stored.read(self.parts["zero"], first, -(-stop // pack))
            zeros = from_words(words, self.bits)[start - first * pack : stop - first * pack] - half
            codes = codes - zeros[:, index]
        return codes.float().mul_(scale[:, index])


class PackedInts(Form):
    """`weight_packed` in 32-bit words beside `weight_scale` and `weight_shape`."""

    title = "compressed-tensors packed integers"
    methods = ("compressed-tensors",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every weight in words."""
        for codes in [name for name, spec in stored.specs.items() if name.endswith(".weight_packed") and spec.dtype == Dtype.I32]:
            yield self._weight(stored, codes, said)

    def _weight(self, stored: Source, codes: str, said: Said) -> PackedWeight:
        name, spec = codes.removesuffix("_packed"), stored.specs[codes]
        scale, said_shape = (part(stored, codes, name + end, self.title) for end in ("_scale", "_shape"))
        if stored.specs[said_shape].dtype.is_floating_point or stored.specs[said_shape].elements != 2:
            damaged(stored, said_shape, f"must give rows and columns of {codes!r}: stacks of matrices are not read in this form.")
        shape = tuple(int(n) for n in stored.read(said_shape).reshape(-1))
        known = _numbers(said.table, "num_bits")
        fits = [
            bits
            for bits in BITS
            if bits in (known or BITS) and len(shape) == 2 and spec.shape == (shape[0], -(-shape[1] * bits // 32))
        ]
        if len(fits) != 1:
            damaged(
                stored,
                codes,
                f"{list(spec.shape)} must hold {', '.join(map(str, BITS))}-bit codes of a matrix of shape {list(shape)}, with the bits that the config "
                f"says ({', '.join(map(str, known)) or 'nothing'}). Other widths and stacks are not read: take the unquantised checkpoint.",
            )
        parts = {"codes": codes, "scale": scale, "shape": said_shape}
        groups = stored.specs[scale].row_elements
        check_shape(stored, scale, (shape[0], groups), f"scales for each row of {codes!r}")
        if groups == 0 or shape[1] % groups:
            damaged(stored, scale, f"has {groups} scales a row, into which the {shape[1]} inputs of {codes!r} cannot be divided.")
        if f"{name}_g_idx" in stored.specs:
            parts["index"] = f"{name}_g_idx"
            check_shape(stored, parts["index"], (shape[1],), f"a group for each input of {codes!r}")
            check_index(stored, parts["index"], codes, groups)
        zero = f"{name}_zero_point"
        if zero in stored.specs:
            parts["zero"] = zero
            if stored.specs[zero].dtype != Dtype.I32:
                damaged(stored, zero, f"must hold 32-bit words. Got {stored.specs[zero].dtype}.")
            check_shape(stored, zero, (-(-shape[0] * fits[0] // 32), groups), f"packed zero points of {codes!r}")
        elif not _symmetric(said.table):
            part(stored, codes, zero, self.title)
        return PackedWeight(name=name, shape=(shape[0], shape[1]), parts=parts, bits=fits[0], group=max(1, shape[1] // groups))


def _numbers(table: Mapping[str, Any], key: str) -> list[int]:
    """What the groups give under a key, where it is a positive number, each once."""
    found = [weights.get(key) for weights in group_weights(table)]
    return list(dict.fromkeys(value for value in found if type(value) is int and value > 0))


def _symmetric(table: Mapping[str, Any]) -> bool:
    return all(weights.get("symmetric", True) for weights in group_weights(table))
