"""Weights in the quantised forms that people have, encoded by plain loops from the definition of each form.

An encoder draws codes and scales, packs them as the form says, and gives the value that they stand for, computed from the codes themselves and
not from what was packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = [*FP4, *(-value for value in FP4)]
Shape = tuple[int, int]
Encoded = tuple[dict[str, Tensor], Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=generator)


def stream(codes: Sequence[int], bits: int) -> list[int]:
    """One long number of all codes, the first one lowest, cut into words of 32 bits, signed."""
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    found = [(number >> (32 * place)) & 0xFFFFFFFF for place in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Each row a stream of words, int32."""
    return torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)


def bnb_int8(name: str, shape: Shape, generator: torch.Generator) -> Encoded:
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = 0.1 + normal(generator, shape[0]).abs()
    value = (codes.float() * scale[:, None]) * 7.874015718698502e-3
    stem = name.removesuffix(".weight")
    return {name: codes, f"{stem}.SCB": scale, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}, value


def bnb_4bit(
    name: str, shape: Shape, generator: torch.Generator, *, table: Sequence[float] = NF4, nested: bool = False
) -> Encoded:
    block, inner = 64, 256
    codes = codes_of(generator, 4, shape[0] * shape[1])
    count = -(-codes.numel() // block)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    parts = {}
    if nested:
        outer, quant_map = codes_of(generator, 8, count), torch.linspace(-1, 1, 256)
        scales = 0.05 + 0.01 * normal(generator, -(-count // inner)).abs()
        absmax = quant_map[outer] * scales[torch.arange(count) // inner] + 0.2
        parts = {f"{name}.nested_absmax": scales, f"{name}.nested_quant_map": quant_map, f"{name}.absmax": outer.to(torch.uint8)}
        state |= {"nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": 0.2}
    else:
        absmax = 0.1 + normal(generator, count).abs()
        parts = {f"{name}.absmax": absmax}
    value = torch.tensor([table[code] for code in codes.tolist()]) * absmax[torch.arange(codes.numel()) // block]
    pairs = codes.tolist() + [0] * (codes.numel() % 2)
    bytes_ = [high * 16 + low for high, low in zip(pairs[::2], pairs[1::2], strict=True)]
    parts |= {
        name: torch.tensor(bytes_, dtype=torch.uint8)[:, None],
        f"{name}.quant_map": torch.tensor(table),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, value.reshape(shape)


def gptq(
    name: str,
    shape: Shape,
    generator: torch.Generator,
    *,
    bits: int = 4,
    version: int = 1,
    order: bool = False,
    index: bool = True,
) -> Encoded:
    (out, inputs), group = shape, 32
    groups = inputs // group
    codes, zeros = codes_of(generator, bits, inputs, out), codes_of(generator, bits, groups, out).clamp(min=1)
    scales = (0.01 + 0.02 * normal(generator, groups, out).abs()).half()
    g_idx = torch.arange(inputs) // group
    if order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    value = torch.empty(inputs, out)
    for row in range(inputs):
        value[row] = (codes[row] - zeros[g_idx[row]]) * scales[g_idx[row]].float()
    stem = name.removesuffix(".weight")
    parts = {
        f"{stem}.qweight": packed_rows(codes.T, bits).T.contiguous(),
        f"{stem}.qzeros": packed_rows(zeros - int(version == 1), bits),
        f"{stem}.scales": scales,
    }
    return parts | ({f"{stem}.g_idx": g_idx.int()} if index else {}), value.T.contiguous()


def awq(name: str, shape: Shape, generator: torch.Generator) -> Encoded:
    (out, inputs), group = shape, 32
    codes, zeros = codes_of(generator, 4, inputs, out), codes_of(generator, 4, inputs // group, out)
    scales = (0.01 + 0.02 * normal(generator, inputs // group, out).abs()).half()
    value = torch.stack([(codes[row] - zeros[row // group]) * scales[row // group].float() for row in range(inputs)])
    stem = name.removesuffix(".weight")

    def packed(values: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the k-th field from below holds this output of its eight
        rows = [[row[8 * word + at] for word in range(out // 8) for at in order] for row in values.tolist()]
        return packed_rows(torch.tensor(rows), 4)

    return {f"{stem}.qweight": packed(codes), f"{stem}.qzeros": packed(zeros), f"{stem}.scales": scales}, value.T.contiguous()


def fp8(
    name: str,
    shape: Shape,
    generator: torch.Generator,
    *,
    block: Shape | None = None,
    rows: bool = False,
    scale: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Encoded:
    codes = (20 * normal(generator, *shape)).to(dtype)
    high, wide = block or ((1, shape[1]) if rows else shape)
    grid = 0.001 + 0.01 * normal(generator, -(-shape[0] // high), -(-shape[1] // wide)).abs()
    value = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            value[row, column] = codes[row, column].float() * grid[row // high, column // wide]
    stem = name.removesuffix(".weight")
    stored = grid if block or rows else grid.reshape(())
    return {name: codes, f"{stem}.{scale}": stored, f"{stem}.input_scale": torch.tensor(0.5)}, value


def powers(
    name: str,
    shape: Shape,
    generator: torch.Generator,
    *,
    block: Shape,
    scale: str = "weight_scale",
    dtype: torch.dtype = torch.float8_e8m0fnu,
) -> Encoded:
    """fp8 whose scales are powers of two, a byte each."""
    codes = (20 * normal(generator, *shape)).to(torch.float8_e4m3fn)
    high, wide = block
    exponents = torch.randint(110, 135, (-(-shape[0] // high), -(-shape[1] // wide)), generator=generator)
    value = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            value[row, column] = codes[row, column].double() * 2.0 ** (int(exponents[row // high, column // wide]) - 127)
    return {name: codes, f"{name.removesuffix('.weight')}.{scale}": exponents.to(torch.uint8).view(dtype)}, value


def fp4_powers(
    name: str, shape: Shape, generator: torch.Generator, *, codes_in: torch.dtype, scale: str = "weight_scale"
) -> Encoded:
    """E2M1 in a dtype of its own or in bytes, under E8M0."""
    parts, value = mxfp4_packed(name, shape, generator)
    packed, exponents = parts.values()
    return {
        name: packed.view(codes_in),
        f"{name.removesuffix('.weight')}.{scale}": exponents.view(torch.float8_e8m0fnu),
    }, value


def nvfp4_own(name: str, shape: Shape, generator: torch.Generator) -> Encoded:
    parts, value = nvfp4(name, shape, generator, packed=False)
    return parts | {name: parts[name].view(torch.float4_e2m1fn_x2)}, value


def mxfp4_experts(name: str, experts: int, inputs: int, out: int, generator: torch.Generator) -> Encoded:
    codes = codes_of(generator, 4, experts, out, inputs // 32, 32)
    scales = torch.randint(115, 126, codes.shape[:3], generator=generator)
    value = torch.tensor(FP4)[codes] * (2.0 ** (scales.double() - 127)).float()[..., None]
    low, high = codes[..., ::2], codes[..., 1::2]
    parts = {f"{name}_blocks": (low + 16 * high).to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
    return parts, value.reshape(experts, out, inputs).transpose(1, 2).contiguous()


def nvfp4(name: str, shape: Shape, generator: torch.Generator, *, packed: bool) -> Encoded:
    codes = codes_of(generator, 4, *shape)
    scales = (50 + 20 * normal(generator, shape[0], shape[1] // 16).abs()).to(torch.float8_e4m3fn)
    whole = torch.tensor([700.0 if packed else 1 / 700.0])
    step = scales.float() / whole if packed else scales.float() * whole
    value = torch.tensor(FP4)[codes] * step.repeat_interleave(16, 1)
    bytes_ = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    if packed:
        return {f"{name}_packed": bytes_, f"{name}_scale": scales, f"{name}_global_scale": whole}, value
    return {name: bytes_, f"{name}_scale": scales, f"{name}_scale_2": whole.reshape(())}, value


def mxfp4_packed(name: str, shape: Shape, generator: torch.Generator) -> Encoded:
    codes = codes_of(generator, 4, *shape)
    scales = torch.randint(118, 126, (shape[0], shape[1] // 32), generator=generator)
    value = torch.tensor(FP4)[codes] * (2.0 ** (scales.double() - 127)).float().repeat_interleave(32, 1)
    return {
        f"{name}_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        f"{name}_scale": scales.to(torch.uint8),
    }, value


def ct_packed(
    name: str, shape: Shape, generator: torch.Generator, *, bits: int = 4, zero: bool = False, group: int = 32
) -> Encoded:
    half = 1 << (bits - 1)
    codes, groups = codes_of(generator, bits, *shape), shape[1] // group
    scales = (0.01 + 0.02 * normal(generator, shape[0], groups).abs()).bfloat16()
    zeros = codes_of(generator, bits, shape[0], groups) if zero else torch.full((shape[0], groups), half)
    value = (codes - zeros.repeat_interleave(group, 1)).float() * scales.float().repeat_interleave(group, 1)
    parts = {f"{name}_packed": packed_rows(codes, bits), f"{name}_scale": scales, f"{name}_shape": torch.tensor(shape)}
    return parts | ({f"{name}_zero_point": packed_rows(zeros.T, bits).T.contiguous()} if zero else {}), value


def ct_int8(name: str, shape: Shape, generator: torch.Generator) -> Encoded:
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = (0.001 + 0.002 * normal(generator, shape[0], 1).abs()).bfloat16()
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales.float()


def groups(**weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@dataclass(frozen=True)
class Case:
    """A form: its encoder, and what a config says of it."""

    encode: Callable[..., Encoded]
    config: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, name: str, shape: Shape, seed: int) -> Encoded:
        return self.encode(name, shape, torch.Generator().manual_seed(seed), **self.options)


def case(encode: Callable[..., Encoded], config: dict[str, Any], **options: Any) -> Case:
    return Case(encode, config, options)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "group_size": 32, "desc_act": False}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 16]}
CASES: dict[str, Case] = {
    "bitsandbytes int8": case(bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes NF4": case(bnb_4bit, BNB),
    "bitsandbytes NF4, nested": case(bnb_4bit, BNB, nested=True),
    "bitsandbytes FP4": case(bnb_4bit, BNB, table=FP4),
    **{f"GPTQ, {bits} bits": case(gptq, GPTQ | {"bits": bits}, bits=bits) for bits in (2, 3, 4, 8)},
    **{
        f"GPTQ v2, {bits} bits": case(gptq, GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2"}, bits=bits, version=2)
        for bits in (3, 4)
    },
    "GPTQ in order of activations": case(gptq, GPTQ | {"bits": 4, "desc_act": True}, order=True),
    "GPTQ without g_idx": case(gptq, GPTQ | {"bits": 4}, index=False),
    "AWQ": case(awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "fp8, a scale in all": case(fp8, {"quant_method": "fp8"}, scale="weight_scale"),
    "fp8, a scale a row": case(fp8, {"quant_method": "fbgemm_fp8"}, rows=True, scale="weight_scale"),
    "fp8, a scale a block": case(fp8, BLOCKS, block=(32, 16)),
    "fp8, e5m2": case(fp8, {"quant_method": "fp8"}, dtype=torch.float8_e5m2),
    "fp8, compressed-tensors": case(fp8, groups(num_bits=8, type="float"), rows=True, scale="weight_scale"),
    "fp8, AMD's e4m3fnuz": case(fp8, {"quant_method": "fp8"}, rows=True, dtype=torch.float8_e4m3fnuz),
    "fp8, AMD's e5m2fnuz": case(fp8, {"quant_method": "fp8"}, rows=True, dtype=torch.float8_e5m2fnuz),
    "fp8, Mistral's names": case(fp8, BLOCKS, block=(32, 16), scale="qscale_weight"),
    "MXFP8, exponents in uint8": case(powers, {"quant_method": "mxfp8"}, block=(1, 32), dtype=torch.uint8),
    "MXFP8, exponents in E8M0": case(powers, {"quant_method": "mxfp8"}, block=(1, 32)),
    "fp8, DeepSeek-V4": case(powers, BLOCKS | {"scale_fmt": "ue8m0"}, block=(32, 16), scale="scale"),
    "FP4 in int8, DeepSeek-V4": case(
        fp4_powers, {"quant_method": "fp8", "expert_dtype": "fp4"}, codes_in=torch.int8, scale="scale"
    ),
    "MXFP4 in F4": case(fp4_powers, {"quant_method": "mxfp4"}, codes_in=torch.float4_e2m1fn_x2),
    "NVFP4 in F4": case(nvfp4_own, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "NVFP4, ModelOpt": case(nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, packed=False),
    "NVFP4, compressed-tensors": case(nvfp4, groups(num_bits=4, type="float", group_size=16), packed=True),
    "MXFP4, compressed-tensors": case(mxfp4_packed, groups(num_bits=4, type="float", group_size=32)),
    **{f"packed integers, {bits} bits": case(ct_packed, groups(num_bits=bits, symmetric=True), bits=bits) for bits in (4, 8)},
    "packed integers with zero points": case(ct_packed, groups(num_bits=4, symmetric=False), zero=True),
    "packed integers, a scale a row": case(ct_packed, groups(num_bits=4, symmetric=True), group=64),
    "integers": case(ct_int8, groups(num_bits=8, symmetric=True)),
}


def numpy_order(value: Tensor) -> np.ndarray[Any, Any]:
    """The values in numpy, for libraries that want them so."""
    return np.ascontiguousarray(value.numpy())
