"""What is said of dtypes, and told from bytes, without torch is what torch says."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fixtures import odd_weights
from thetau.checkpoint import open_source
from thetau.checkpoint.dtypes import FLOATS, KNOWN, PACKED, Dtype, dtype_name
from thetau.checkpoint.memory import from_mapping
from thetau.checkpoint.source import Source
from thetau.engine.guard import _numbers
from thetau.engine.verify import not_finite

BYTES = [dtype for dtype in Dtype if dtype.itemsize == 1 and dtype.is_floating_point and dtype is not PACKED]
FINE = [Dtype.F32, Dtype.F64]


@pytest.mark.parametrize("dtype", list(Dtype))
def test_torch_says_the_same(dtype: Dtype) -> None:
    real = dtype.torch
    assert (str(real), real.itemsize, real.is_floating_point) == (str(dtype), dtype.itemsize, dtype.is_floating_point)
    assert Dtype.of(real) is dtype
    assert KNOWN[dtype_name(dtype)] is dtype
    assert f"{dtype}" == str(real)
    assert pickle.loads(pickle.dumps(dtype)) is dtype


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FLOATS.values(), [Dtype.F32, Dtype.F16, Dtype.I64])))
def test_the_wider_of_two(one: Dtype, other: Dtype) -> None:
    if one.itemsize > 1:  # torch promotes no 8-bit floats
        assert one.wider(other).torch == torch.promote_types(one.torch, other.torch)
    assert one.wider(one) is one


@pytest.mark.parametrize("dtype", BYTES)
def test_every_byte_is_finite_or_not(dtype: Dtype) -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    want = (~torch.isfinite(codes.view(dtype.torch).float())).tolist()
    assert [not_finite(memoryview(bytes([code])), dtype) for code in range(256)] == [int(one) for one in want]


@pytest.mark.parametrize("dtype", [Dtype.F16, Dtype.BF16])
def test_every_half_is_finite_or_not(dtype: Dtype) -> None:
    codes = np.arange(1 << 16, dtype="<u2")
    values = torch.from_numpy(codes.view(np.int16)).view(dtype.torch)
    assert not_finite(memoryview(codes.tobytes()), dtype) == int((~torch.isfinite(values)).sum())
    kept = codes[torch.isfinite(values).numpy()]
    assert len(kept) < len(codes)
    assert not_finite(memoryview(kept.tobytes()), dtype) == 0


@pytest.mark.parametrize("dtype", FINE)
def test_longer_numbers_are_finite_or_not(dtype: Dtype) -> None:
    bad = [float("nan"), float("inf"), -float("inf")]
    largest = torch.finfo(dtype.torch).max
    good = [0.0, -0.0, largest, -largest, torch.finfo(dtype.torch).tiny, 1.5]
    raw = torch.tensor(bad + good, dtype=dtype.torch).numpy().tobytes()
    assert not_finite(memoryview(raw), dtype) == len(bad)
    assert not_finite(memoryview(torch.tensor(good, dtype=dtype.torch).numpy().tobytes()), dtype) == 0


def test_what_is_no_float_is_finite() -> None:
    assert not_finite(memoryview(b"\xff" * 16), Dtype.I64) == 0
    assert not_finite(memoryview(b""), Dtype.F32) == 0


@pytest.fixture(params=["file", "memory"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """Every dtype and shape, stored or in memory."""
    if request.param == "memory":
        return from_mapping(odd_weights(), "odd")
    save_file(odd_weights(), tmp_path / "odd.safetensors")
    return open_source(tmp_path / "odd.safetensors")


def test_bytes_are_those_of_the_rows(odd: Source) -> None:
    for name, spec in odd.specs.items():
        for start, stop in {(0, spec.rows), (spec.rows // 2, spec.rows)}:
            rows = odd.read(name, start, stop).contiguous().reshape(-1)
            want = rows.view(torch.uint8).numpy().tobytes() if rows.numel() else b""
            assert bytes(odd.raw(name, start, stop)) == want, name


def test_rows_outside_a_tensor_have_no_bytes(odd: Source) -> None:
    with pytest.raises(IndexError, match="do not lie inside"):
        odd.raw("scalar", 0, 2)


def test_numbers_of_a_sample(odd: Source) -> None:
    for name in ("matrix.float64", "matrix.float32", "matrix.float16", "matrix.bfloat16", "matrix.float8_e4m3fn", "count.int8"):
        want = odd.read(name, 0, 2).reshape(-1).double().numpy()
        assert np.array_equal(_numbers(odd, name, 2), want), name
