"""Writing 8-bit floats with scales: which weights become codes, the scales, and what the output's config says of them.

A scale is the largest magnitude of what shares it, divided by 448, the largest E4M3 number, in float32; a code is the value divided by
its scale, rounded to the nearest E4M3 number (ties to even) and no larger than 448. What is all zero has the scale 1. With blocks the form is
DeepSeek-V3's (`weight_scale_inv`, `quant_method: fp8`), as `FineGrainedFP8Config` of transformers reads it; with a scale for a row or
a tensor it is compressed-tensors' `float-quantized` (`weight_scale`), with activations quantised for each token when the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from thetau._lazy import torch
from thetau.checkpoint.config import is_tower
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.naming import Kind, view_of
from thetau.checkpoint.quantised.scaled import Block, grid_of
from thetau.checkpoint.roles import Roles
from thetau.checkpoint.source import Source, Spec
from thetau.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

CODES = Dtype.F8_E4M3
LARGEST = 448.0  # of E4M3
BYTES = 17  # of memory that an element takes meanwhile: its magnitude, its scale, its quotient and what is left over, in float32, and its code
MATRICES = (Kind.ATTENTION, Kind.MLP, Kind.LINEAR)
# What decides where a token goes, and the layer that joins two streams in a prediction of later tokens: no library reads them quantised.
_PLAIN = re.compile(r"(?:^|\.)(?:router|gate|shared_expert_gate|eh_proj)(?:\.|$)|router")

Rows: TypeAlias = "Iterable[tuple[int, Tensor]]"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights become codes.

    - `name`: as `--quantise` has it.
    - `share`: what has a scale, in words.
    - `high`, `wide`: rows and columns that share one; None for all.
    - `suffix`: of the scale's name.
    - `strategy`: what compressed-tensors calls it; empty where the config is `quant_method: fp8`.
    """

    name: str
    share: str
    high: int | None
    wide: int | None
    suffix: str
    strategy: str = ""

    def block(self, shape: tuple[int, ...]) -> Block:
        """Rows and columns of a weight that share a scale."""
        return self.high or shape[-2], self.wide or shape[-1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight can be divided: a matrix, whose sides are whole blocks where there are blocks (transformers reads no others)."""
        if len(shape) != 2 or 0 in shape:
            return False
        return self.strategy != "" or (shape[0] % self.block(shape)[0] == 0 and shape[1] % self.block(shape)[1] == 0)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight's scales."""
        return (1,) if self.strategy == "tensor" else (*shape[:-2], *grid_of(shape, self.block(shape)))

    def config(self, plain: list[str]) -> dict[str, Any]:
        """The output's `quantization_config`; `plain` are the modules whose matrices stay as they are."""
        if not self.strategy:
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [self.high, self.wide],
                "modules_to_not_convert": plain,
            }
        weights = {"num_bits": 8, "type": "float", "strategy": self.strategy, "symmetric": True, "dynamic": False}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {**weights, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": plain,
        }


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="fp8-tensor", share="tensor", high=None, wide=None, suffix="_scale", strategy="tensor"),
        Scheme(name="fp8-row", share="row", high=1, wide=None, suffix="_scale", strategy="channel"),
        Scheme(name="fp8-block", share="block of 128 × 128", high=128, wide=128, suffix="_scale_inv"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A weight that is written as codes and scales. `spec`: the weight as it would be written plain."""

    spec: Spec
    scheme: Scheme

    @property
    def scale(self) -> str:
        """The name of its scales."""
        return self.spec.name + self.scheme.suffix

    def stored(self) -> dict[str, Spec]:
        """The tensors that it is written as."""
        name, shape, file = self.spec.name, self.spec.shape, self.spec.file
        return {
            name: Spec(name=name, shape=shape, dtype=CODES, file=file),
            self.scale: Spec(name=self.scale, shape=self.scheme.grid(shape), dtype=Dtype.F32, file=file),
        }

    def twice(self, window: int) -> bool:
        """Whether its values are needed twice: one scale for more than are there at once."""
        return self.scheme.high is None and window < self.spec.elements

    def memory(self, window: int) -> int:
        """Bytes that its codes take in the making, beside a window of so many elements."""
        return BYTES * (window + (self.scheme.high or 1) * self.spec.row_elements)

    def encode(self, read: Callable[[], Rows]) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, first row, rows) of codes and scales. `read` gives the weight's rows in float32, in order, as often as it is called."""
        name, shape = self.spec.name, self.spec.shape
        if self.scheme.high is None:
            yield from self._under_one_scale(read)
            return
        high, wide = self.scheme.block(shape)
        for start, rows in _whole_blocks(read(), high) if len(shape) == 2 else read():
            scales = scales_of(rows, (high, wide))
            yield name, start, codes_of(rows, scales, (high, wide))
            yield self.scale, start // high if len(shape) == 2 else start, scales

    def _under_one_scale(self, read: Callable[[], Rows]) -> Iterator[tuple[str, int, Tensor]]:
        largest, kept = torch.zeros(()), None
        for _, rows in read():
            largest = torch.maximum(largest, rows.abs().amax())
            kept = rows if len(rows) == self.spec.rows else None
        scale = _scale(largest).reshape(1, 1)
        for start, rows in read() if kept is None else [(0, kept)]:
            yield self.spec.name, start, codes_of(rows, scale, (rows.shape[0], rows.shape[1]))
        yield self.scale, 0, scale.reshape(1)


def coded(source: Source | None, specs: Mapping[str, Spec], scheme: Scheme) -> dict[str, Coded]:
    """The weights of an output that become codes: those that its base stores as codes, or else the matrices of its language model's blocks.

    Norms, embeddings, heads, routers, convolutions and towers stay as they are; so do the matrices of a module of which one cannot be divided
    into blocks, since libraries join their rows.

    Raises:
        OutputError: nothing would be quantised.
    """
    roles = Roles.of(source) if source is not None else Roles(shapes={name: spec.shape for name, spec in specs.items()})
    known = source.coded if source is not None else frozenset()

    def wanted(name: str, spec: Spec) -> bool:
        if not spec.dtype.is_floating_point or _PLAIN.search(name) or len(spec.shape) < 2:
            return False
        if known and len(spec.shape) == 3:
            return name in known and not scheme.strategy
        if len(spec.shape) != 2 or not name.endswith(".weight") or roles.kind(name, spec.shape) not in MATRICES:
            return False
        inside = (
            roles.kind(name, spec.shape) is not Kind.LINEAR and not is_tower(name) and not view_of(name, spec.shape).transposed
        )
        return name in known if known else inside

    candidates = {name: spec for name, spec in specs.items() if wanted(name, spec)}
    whole = {_module(name) for name, spec in candidates.items() if not (name in known or scheme.fits(spec.shape))}
    found = {name: Coded(spec=spec, scheme=scheme) for name, spec in candidates.items() if _module(name) not in whole}
    if not found:
        odd = next((name for name in candidates), None)
        why = (
            f"{odd!r} {list(candidates[odd].shape)} cannot be divided into blocks of 128 × 128: take `fp8-row`"
            if odd is not None
            else "it holds no matrix in a block of a language model"
        )
        raise OutputError(f"`{scheme.name}` would quantise nothing of {source.label if source else 'the output'}: {why}.")
    return found


def plain_modules(specs: Mapping[str, Spec], written: Mapping[str, Coded], source: Source | None) -> list[str]:
    """The modules with matrices that stay as they are, embeddings and convolutions aside; of fused experts, the experts."""
    roles = Roles.of(source) if source is not None else Roles(shapes={name: spec.shape for name, spec in specs.items()})
    found: list[str] = []
    for name, spec in specs.items():
        if name in written or not 2 <= len(spec.shape) <= 3 or not spec.dtype.is_floating_point:
            continue
        if roles.kind(name, spec.shape) is Kind.EMBEDDING:
            continue
        found.append(name.removesuffix(".weight") if name.endswith(".weight") else _module(name))
        if ".experts." in name:
            found.append(name[: name.index(".experts.") + len(".experts")])
    return list(dict.fromkeys(["lm_head", *(module for module in found if module)]))  # a tied head has no tensor and is a module


def scales_of(values: Tensor, block: Block) -> Tensor:
    """The scale of each block, `[…, rows / high, columns / wide]`, of values `[…, rows, columns]` in float32."""
    (high, wide), (rows, columns) = block, values.shape[-2:]
    tall, broad = grid_of(tuple(values.shape), block)
    padded = torch.nn.functional.pad(values.abs(), (0, broad * wide - columns, 0, tall * high - rows))
    return _scale(padded.reshape(*values.shape[:-2], tall, high, broad, wide).amax((-3, -1)))


def codes_of(values: Tensor, scales: Tensor, block: Block) -> Tensor:
    """The codes of values under their blocks' scales."""
    (high, wide), (rows, columns) = block, values.shape[-2:]
    spread = scales if high == 1 else scales.repeat_interleave(high, -2)[..., :rows, :]
    spread = spread if scales.shape[-1] == 1 else spread.repeat_interleave(wide, -1)[..., :columns]
    return (values / spread).clamp_(-LARGEST, LARGEST).to(CODES.torch)


def _scale(largest: Tensor) -> Tensor:
    """The scale of what is at most so large: never zero, so that the quotient is a number, and never so large that 448 times it is none."""
    scale = (largest / LARGEST).clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / LARGEST)
    return torch.where(largest > 0, scale, 1.0)


def _whole_blocks(rows: Rows, high: int) -> Iterator[tuple[int, Tensor]]:
    """The same rows in runs of whole blocks, the last one as it ends."""
    left: Tensor | None = None
    begin = 0
    for start, given in rows:
        joined = given if left is None else torch.cat([left, given])
        begin = start if left is None else begin
        count = len(joined) // high * high
        if count:
            yield begin, joined[:count]
        begin += count
        left = joined[count:].clone() if count < len(joined) else None
    if left is not None:
        yield begin, left


def _module(name: str) -> str:
    """The module that holds a weight's module: q, k and v are in one."""
    return name.removesuffix(".weight").rpartition(".")[0]
