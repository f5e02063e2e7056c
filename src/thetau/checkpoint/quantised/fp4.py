"""4-bit floats (E2M1): the experts of gpt-oss in MXFP4, and matrices in NVFP4 and MXFP4 as ModelOpt and compressed-tensors store them.

MXFP4: a power of two for each 32 values (OCP Microscaling Formats v1.0). NVFP4: an 8-bit float for each 16, and one float32 for the tensor,
which multiplies in ModelOpt (`weight_scale_2`) and divides in compressed-tensors (`weight_global_scale`). The lower half of a byte comes first.
Codes may lie in uint8, in safetensors' own F4, or, where the config says `expert_dtype: fp4` (DeepSeek-V4), in int8; powers of two in uint8 or F8_E8M0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.dtypes import EXPONENTS, PACKED, Dtype
from thetau.checkpoint.quantised.form import Form, Said, Weight, check_shape, damaged, part
from thetau.checkpoint.quantised.fp8 import scale_names
from thetau.checkpoint.quantised.reading import E2M1, exponents, nibbles
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

MX_GROUP, NV_GROUP = 32, 16
STEP = 1 << 16  # bytes of codes that are unpacked at once


@dataclass(frozen=True, kw_only=True)
class ExpertsWeight(Weight):
    """Stacked experts `[expert, in, out]`, as gpt-oss holds them; stored are `codes` `[expert, out, in / 32, 16]`, `scale` `[expert, out, in / 32]`."""

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Whole experts, in float32."""
        out = torch.empty((stop - start, *self.shape[1:]))
        table = torch.tensor(E2M1)
        for expert in range(start, stop):
            codes, scale = (stored.read(self.parts[which], expert, expert + 1)[0] for which in ("codes", "scale"))
            step = max(1, STEP // max(1, codes[0].numel())) if len(codes) else 1
            for first in range(0, len(codes), step):
                values = table[nibbles(codes[first : first + step])]
                values *= exponents(scale[first : first + step].view(torch.uint8))[..., None]
                out[expert - start, :, first : first + step] = values.reshape(len(values), -1).T
        return out


class GptOss(Form):
    """`…_blocks` and `…_scales` of stacked experts."""

    title = "MXFP4 experts (gpt-oss)"
    methods = ("mxfp4",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every tensor with `_blocks`."""
        for codes in [name for name, spec in stored.specs.items() if name.endswith("_blocks") and spec.dtype == Dtype.U8]:
            name, spec = codes.removesuffix("_blocks"), stored.specs[codes]
            scale = part(stored, codes, f"{name}_scales", self.title)
            if len(spec.shape) != 4 or spec.shape[3] != MX_GROUP // 2:
                damaged(stored, codes, f"must have shape [experts, out, groups, {MX_GROUP // 2}]. Got {list(spec.shape)}.")
            check_shape(stored, scale, spec.shape[:3], f"a scale for each group of {codes!r}")
            if stored.specs[scale].dtype not in (Dtype.U8, EXPONENTS):
                damaged(stored, scale, f"must hold exponents in uint8 or F8_E8M0. Got {stored.specs[scale].dtype}.")
            experts, out, groups, _ = spec.shape
            yield ExpertsWeight(name=name, shape=(experts, groups * MX_GROUP, out), parts={"codes": codes, "scale": scale})


@dataclass(frozen=True, kw_only=True)
class GroupedWeight(Weight):
    """A weight E2M1[code] · scale of its group, along the last axis. Parts: `codes` two a byte, `scale` a group, and `whole` for the tensor.

    `divides`: whether the tensor's number divides the groups' scales.
    """

    group: int
    divides: bool

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32."""
        values = torch.tensor(E2M1)[nibbles(stored.read(self.parts["codes"], start, stop).view(torch.uint8))]
        scale = stored.read(self.parts["scale"], start, stop)
        scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
        if "whole" in self.parts:
            whole = stored.read(self.parts["whole"]).float().reshape(())
            scale = scale / whole if self.divides else scale * whole
        return (values.reshape(*scale.shape, self.group) * scale[..., None]).reshape(values.shape)


class Fp4(Form):
    """`weight` (ModelOpt, DeepSeek) or `weight_packed` (compressed-tensors) beside its scales."""

    title = "NVFP4 and MXFP4"
    methods = ("modelopt", "modelopt_fp4", "compressed-tensors", "nvfp4", "mxfp4", "fp8")

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every packed matrix with a scale for each group."""
        kinds = {Dtype.U8, PACKED, *((Dtype.I8,) if said.table.get("expert_dtype") == "fp4" else ())}
        for codes, spec in list(stored.specs.items()):
            packed = codes.endswith(".weight_packed")
            name = codes.removesuffix("_packed") if packed else codes
            scales = [f"{name}_scale"] if packed else scale_names(name)
            scale = next((one for one in scales if one in stored.specs), scales[0])
            sure = packed or spec.dtype == PACKED
            if (
                spec.dtype not in kinds
                or len(spec.shape) < 2
                or not (sure or (name.endswith("weight") and scale in stored.specs))
            ):
                continue
            scale = part(stored, codes, scale, self.title)
            parts = {"codes": codes, "scale": scale}
            if stored.specs[scale].dtype in (Dtype.U8, EXPONENTS):
                group = MX_GROUP
            else:
                second = f"{name}_global_scale" if packed else f"{name}_scale_2"
                group, parts["whole"] = NV_GROUP, part(stored, codes, second, self.title)
                if stored.specs[second].elements != 1:
                    check_shape(stored, second, (1,), "one number for the tensor")
            shape = (*spec.shape[:-1], 2 * spec.shape[-1])
            check_shape(stored, scale, (*shape[:-1], -(-shape[-1] // group)), f"a scale for each {group} values of {codes!r}")
            if shape[-1] % group:
                damaged(stored, codes, f"has {shape[-1]} values a row, which must be a multiple of {group}.")
            yield GroupedWeight(name=name, shape=shape, parts=parts, group=group, divides=packed)
