"""Names of dtypes: safetensors' spelling, torch's, and the recipe's."""

from __future__ import annotations

from enum import Enum, unique
from typing import TYPE_CHECKING, final

from thetau._lazy import torch

if TYPE_CHECKING:
    from torch import dtype as TorchDtype


@final
@unique
class Dtype(Enum):
    """What a stored tensor's numbers are, by safetensors' name: known from a header, without torch."""

    BOOL = "bool", 1
    U8 = "uint8", 1
    I8 = "int8", 1
    I16 = "int16", 2
    U16 = "uint16", 2
    I32 = "int32", 4
    U32 = "uint32", 4
    I64 = "int64", 8
    U64 = "uint64", 8
    F8_E4M3 = "float8_e4m3fn", 1
    F8_E5M2 = "float8_e5m2", 1
    F8_E4M3FNUZ = "float8_e4m3fnuz", 1
    F8_E5M2FNUZ = "float8_e5m2fnuz", 1
    F8_E8M0 = "float8_e8m0fnu", 1  # powers of two, which are scales and never weights
    F4 = "float4_e2m1fn_x2", 1  # two numbers a byte, the lower half first; shapes count bytes here, and numbers in a file
    F16 = "float16", 2
    BF16 = "bfloat16", 2
    F32 = "float32", 4
    F64 = "float64", 8

    def __init__(self, title: str, itemsize: int) -> None:
        self.title = title  # torch's name
        self.itemsize = itemsize
        self.is_floating_point = "float" in title

    def __str__(self) -> str:
        """As torch writes it."""
        return f"torch.{self.title}"

    @property
    def torch(self) -> TorchDtype:
        """Torch's own."""
        found: TorchDtype = getattr(torch, self.title)
        return found

    def wider(self, other: Dtype) -> Dtype:
        """The narrowest that holds the numbers of both."""
        return self if self is other else Dtype.of(torch.promote_types(self.torch, other.torch))

    @classmethod
    def of(cls, dtype: TorchDtype) -> Dtype:
        """That of a tensor, which is one of `KNOWN`."""
        return KNOWN[dtype_name(dtype)]


KNOWN = {dtype.title: dtype for dtype in Dtype}  # by torch's name
EXPONENTS, PACKED = Dtype.F8_E8M0, Dtype.F4
SCALED = (EXPONENTS, PACKED)  # what means something beside its scales or codes alone
WRITTEN = {dtype.title: dtype for dtype in Dtype if dtype is not PACKED}

# What safetensors can hold and nothing here reads.
UNREAD = {
    "F6_E2M3": "the 6-bit floats of MXFP6",
    "F6_E3M2": "the 6-bit floats of MXFP6",
    "C64": "complex numbers",
}

FLOATS = {
    dtype.title: dtype for dtype in (Dtype.F32, Dtype.F16, Dtype.BF16, Dtype.F64, Dtype.F8_E4M3, Dtype.F8_E5M2)
}  # what an output may be, as recipes spell it


def dtype_name(dtype: TorchDtype | Dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`.

    Examples:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
