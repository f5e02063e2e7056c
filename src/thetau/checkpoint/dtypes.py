"""Names of dtypes: safetensors' spelling, torch's, and the recipe's."""

from __future__ import annotations

from thetau._lazy import torch

FROM_SAFETENSORS: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
EXPONENTS = torch.float8_e8m0fnu  # powers of two, which are scales and never weights
PACKED = torch.float4_e2m1fn_x2  # two numbers a byte, the lower half first; shapes count bytes here, and numbers in a file
SCALED = (EXPONENTS, PACKED)  # what means something beside its scales or codes alone
TO_SAFETENSORS = {dtype: name for name, dtype in FROM_SAFETENSORS.items() if dtype != PACKED}

# What safetensors can hold and nothing here reads.
UNREAD = {
    "F6_E2M3": "the 6-bit floats of MXFP6",
    "F6_E3M2": "the 6-bit floats of MXFP6",
    "C64": "complex numbers",
}

FLOATS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`.

    Examples:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
