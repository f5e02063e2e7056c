"""Forms that are known and not read: refused by name, with what would help; and the names that tell quantised parts of any form."""

from __future__ import annotations

import re

from thetau.checkpoint.dtypes import PACKED, SCALED, Dtype
from thetau.checkpoint.quantised.form import Said
from thetau.checkpoint.source import Source, Spec
from thetau.errors import CheckpointError

ORIGINAL = (
    "Take the original, unquantised checkpoint, or write one of full precision with the library that made this one ({how})."
)

# quant_method → how its own library gives the weights back in full precision.
METHODS = {
    "aqlm": "its layers' `codebooks` and `codes` must be multiplied out by `aqlm`",
    "auto-round": "export it as `auto_gptq`, whose form is read",
    "intel/auto-round": "export it as `auto_gptq`, whose form is read",
    "bitnet": "`transformers` with `dequantize`",
    "eetq": "`eetq`",
    "exl2": "`exllamav2`",
    "exl3": "`exllamav3`",
    "fouroversix": "`fouroversix`",
    "fp_quant": "`fp_quant`'s `dequantize`",
    "gemma": "`transformers`",
    "higgs": "`model.dequantize()` of transformers",
    "hqq": "`hqq`'s `dequantize`",
    "metal": "`transformers`",
    "mlx": "`mlx_lm.convert --dequantize`",
    "qqq": "`gptqmodel`",
    "quanto": "`optimum.quanto`'s `dequantize`",
    "quark": "`quark`",
    "quip": "its authors' code",
    "sinq": "`sinq`",
    "spqr": "`spqr_quant`",
    "torchao": "`dequantize` of its tensors",
    "vptq": "`vptq`",
}

# What a tensor's name ends in → the method that it tells, where no config does.
NAMES = (
    (re.compile(r"\.W_q$"), "hqq"),
    (re.compile(r"\.codebooks$"), "aqlm"),
    (re.compile(r"\.(?:q_weight|q_scale_max|q_invperm)$"), "exl2"),
    (re.compile(r"\.trellis$"), "exl3"),
    (re.compile(r"\.weight\._(?:data|scale)$"), "quanto"),
    (re.compile(r"\.(?:centroids|res_centroids)$"), "vptq"),
    (re.compile(r"\.(?:dense_weights|row_offsets|col_vals)$"), "spqr"),
)
# Integers under these names are parts of a quantised weight, whatever the form.
CODES = re.compile(
    r"(?:\.|_)(?:qweight|qzeros|g_idx|perm|absmax|quant_map|quant_state\.\w+|SCB|CB|weight_packed|weight_shape|weight_format|weight_zero_point|zero_point"
    r"|packed|codes|codebooks|qscales?|q_weight|trellis|blocks|scales|scale|scale_inv|W_q|bit_width|_data)$"
)
# Numbers under these names belong to a quantised weight too.
SCALES = re.compile(
    r"\.(?:SCB|weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight\.absmax|weight\.nested_absmax)$"
)
# Scales of activations and of the cache of keys and values: no part of a weight.
ACTIVATIONS = re.compile(
    r"(?:\.|_)(?:input_scale|output_scale|activation_scale|input_global_scale|output_global_scale|input_zero_point|output_zero_point|input_scale_ub"
    r"|[kvq]_scale|kv_scale|[kv]_zero_point)$"
)


def check_method(stored: Source, said: Said) -> None:
    """Refuse a model in a form that is known and not read.

    Raises:
        CheckpointError: its config, or its tensors' names, tell such a form.
    """
    if said.method in METHODS:
        raise CheckpointError(f"{said.file}: `{said.method}` weights cannot be read. {ORIGINAL.format(how=METHODS[said.method])}")
    if said.method:
        return
    for name, spec in stored.specs.items():
        for pattern, method in NAMES:
            if pattern.search(name) and (not spec.dtype.is_floating_point or method in ("exl2", "aqlm", "spqr", "vptq")):
                raise CheckpointError(
                    f"{spec.file}: {name!r} is a part of `{method}` weights, which cannot be read. {ORIGINAL.format(how=METHODS[method])}"
                )


def check_left(left: dict[str, Spec], said: Said) -> None:
    """Refuse tensors that no form took, and that are parts of quantised weights all the same.

    Raises:
        CheckpointError: there is one.
    """
    for name, spec in left.items():
        integer = spec.dtype == PACKED or (not spec.dtype.is_floating_point and spec.dtype != Dtype.BOOL)
        codes = spec.dtype in SCALED or (
            integer and (CODES.search(name) or (len(spec.shape) > 1 and re.search(r"(?:^|\.)weight$", name)))
        )
        if codes or (spec.dtype.is_floating_point and SCALES.search(name)):
            what = "codes" if integer else "scales"
            raise CheckpointError(
                f"{spec.file}: {name!r} ({str(spec.dtype).removeprefix('torch.')}, {list(spec.shape)}) holds {what} of a quantised weight that cannot be read: "
                f"{_said(said)}. Give the whole checkpoint with its config.json, or the original, unquantised one."
            )


def _said(said: Said) -> str:
    if said.method:
        return f"{said.file} says `{said.method}`, which does not explain it"
    return f"{said.file} says nothing of quantisation" if said.file else "nothing beside it says which form this is"
