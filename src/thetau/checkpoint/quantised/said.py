"""What a model's files say of its quantisation: `quantization_config` in `config.json`, or the file of the library that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thetau.checkpoint.config import FILE, has_config, read_config
from thetau.checkpoint.dtypes import FLOATS, Dtype
from thetau.checkpoint.quantised.form import Said
from thetau.errors import CheckpointError

KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # GPTQ's, AWQ's and ModelOpt's
WIDE = (Dtype.F32, Dtype.F16, Dtype.BF16)


def read_said(folder: Path | None) -> Said | None:
    """What the files beside the weights say; nothing in it where there is a config that says nothing, None where there is no config.

    A config that cannot be read says nothing here: whoever needs it says what is wrong with it.
    """
    if folder is None or not has_config(folder):
        return None
    for file in (FILE, *OWN_FILES):
        table = _table(folder, file)
        found = _entry(table) if file == FILE else table
        if found:
            return Said(file=str(folder / file), method=_method(found, file), table=found)
    return Said(file=str(folder / FILE))


def model_dtype(folder: Path | None) -> Dtype:
    """The dtype that the config gives the model; bfloat16 where it gives none, or one that is no plain float."""
    table = _table(folder, FILE) if folder is not None and has_config(folder) else {}
    for place in (table, *(value for key, value in table.items() if key.endswith("_config") and isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            dtype = FLOATS.get(str(place.get(key)).removeprefix("torch."))
            if dtype in WIDE:
                return dtype
    return Dtype.BF16


def plain_files(folder: Path | None, dtype: Dtype) -> dict[str, Any]:
    """The side files of a model without quantisation: its config without what it says of it, and no file of the library's own."""
    if folder is None or not has_config(folder):
        return {}
    config = _without(_table(folder, FILE))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    return {FILE: config} | {file: None for file in OWN_FILES if has_config(folder, file)}


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in KEYS
    }


def _table(folder: Path, file: str) -> dict[str, Any]:
    if not has_config(folder, file):
        return {}
    try:
        return read_config(folder, file)
    except CheckpointError:
        return {}


def _entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of quantisation, itself or in the config of a part (`text_config`)."""
    for key in KEYS:
        if isinstance(config.get(key), Mapping):
            found = dict(config[key])
            inner = found.get("quantization_config")  # as older versions of compressed-tensors nest it
            return {"quant_method": "compressed-tensors", **inner} if isinstance(inner, Mapping) else found
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping) and (found := _entry(value)):
            return found
    return {}


def _method(table: Mapping[str, Any], file: str) -> str:
    """The method's name, or what the entries of older files tell of it."""
    if table.get("quant_method"):
        return str(table["quant_method"]).lower()
    if table.get("load_in_8bit") or table.get("load_in_4bit"):
        return "bitsandbytes"
    if file == "hf_quant_config.json" or "quant_algo" in table:
        return "modelopt"
    if "w_bit" in table or "q_group_size" in table or file == "quant_config.json":
        return "awq"
    if "config_groups" in table:
        return "compressed-tensors"
    if "group_size" in table and "mode" in table:
        return "mlx"
    return "gptq" if "bits" in table and ("desc_act" in table or file == "quantize_config.json") else "unknown"
