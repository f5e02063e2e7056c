"""Makes the files beside it: small weights as bitsandbytes and compressed-tensors store them, and what these libraries read them as.

Run in an environment with `bitsandbytes` and `compressed-tensors`: `python tests/checkpoint/data/make.py`. A file holds the stored tensors under
their names, what the library makes of them under `expected`, and the config's entry in its metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPE = (24, 64)
NAME = "proj.weight"


def drawn(seed: int) -> torch.Tensor:
    return 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def save(file: str, stored: dict[str, torch.Tensor], expected: torch.Tensor, config: dict[str, Any]) -> None:
    tensors = {f"proj.{name}": value.detach().contiguous().clone() for name, value in stored.items()}
    save_file(
        tensors | {"expected": expected.detach().contiguous().clone()}, HERE / file, metadata={"config": json.dumps(config)}
    )


def int8() -> None:
    codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(drawn(0).half())
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    save(
        "bnb-int8.safetensors",
        stored,
        int8_vectorwise_dequant(codes, scale),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    )


def four_bit(file: str, kind: str, double: bool) -> None:
    weight = bitsandbytes.nn.Params4bit(drawn(1), requires_grad=False, quant_type=kind, compress_statistics=double)
    weight = weight.to("cpu")
    state = weight.quant_state
    stored = {"weight": weight.data} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    save(file, stored, dequantize_4bit(weight.data, state), {"quant_method": "bitsandbytes", "load_in_4bit": True})


def compressed(file: str, form: str, *, whole: bool = False, **arguments: Any) -> None:
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    weight = drawn(2).bfloat16()
    group = arguments.get("group_size")
    parts = weight.float().reshape(SHAPE[0], -1, group or SHAPE[1])
    low, high = parts.amin(-1), parts.amax(-1)
    state = {"weight": weight}
    options = {}
    if whole:
        state["weight_global_scale"] = options["global_scale"] = generate_gparam(weight.float().min(), weight.float().max())
    scale, zero = calculate_qparams(low, high, weights, **options)
    state |= {"weight_scale": scale if scale.dtype.itemsize == 1 else scale.bfloat16(), "weight_zero_point": zero}
    if whole:
        state["weight_scale"] = scale.to(weight.dtype)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form}
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json())}}
    save(file, stored, expected, config)


if __name__ == "__main__":
    int8()
    four_bit("bnb-nf4.safetensors", "nf4", False)
    four_bit("bnb-nf4-double.safetensors", "nf4", True)
    four_bit("bnb-fp4.safetensors", "fp4", False)
    compressed("ct-packed.safetensors", "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    compressed(
        "ct-packed-zeros.safetensors", "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    )
    compressed("ct-int8.safetensors", "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)
    compressed("ct-fp8.safetensors", "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True)
    compressed(
        "ct-nvfp4.safetensors",
        "nvfp4-pack-quantized",
        whole=True,
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
    )
    compressed(
        "ct-mxfp4.safetensors", "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, symmetric=True
    )
