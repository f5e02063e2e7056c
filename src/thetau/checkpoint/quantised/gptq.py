"""GPTQ: integer codes of 2, 3, 4 or 8 bits, a scale and a zero point for each group of inputs. Frantar et al., <https://arxiv.org/abs/2210.17323>.

The value is (code − zero) · scale, as GPTQModel's `dequantize_weight` has it. `qweight` is a stream of bits down each column of
`[in, out]`, `qzeros` along each row of `[groups, out]`. In the first format (`checkpoint_format: gptq`) zero points are stored less 1, which
GPTQModel undoes word by word where a word holds whole codes and code by code where it does not (3 bits); in the second (`gptq_v2`)
as they are. `g_idx` gives each input's group; without it, groups lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.quantised.form import Form, Said, Weight, check_index, check_shape, damaged, part
from thetau.checkpoint.quantised.reading import columns, from_words
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less 1


@dataclass(frozen=True, kw_only=True)
class GptqWeight(Weight):
    """A weight `[out, in]` of which the transposed is stored. `group`: inputs of a group, where no `g_idx` gives them."""

    bits: int
    group: int
    less_one: bool

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32: columns of what is stored."""
        codes = from_words(columns(stored, self.parts["codes"], start, stop), self.bits)
        scale = columns(stored, self.parts["scale"], start, stop).float()
        zero = self._zeros(stored, start, stop)
        index = stored.read(self.parts["index"]).long() if "index" in self.parts else torch.arange(self.shape[1]) // self.group
        values = codes.float().sub_(zero.float().index_select(0, index)).mul_(scale.index_select(0, index))
        return values.T.contiguous()

    def _zeros(self, stored: Source, start: int, stop: int) -> Tensor:
        """Zero points of some outputs, `[groups, stop - start]`; 32 outputs lie in whole words, whatever the bits."""
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, self.shape[0])
        words = columns(stored, self.parts["zero"], first * self.bits // 32, -(-last * self.bits // 32)).T
        if self.less_one and 32 % self.bits == 0:
            words = (words.long() + sum(1 << at for at in range(0, 32, self.bits))) & 0xFFFFFFFF
        zeros = from_words(words, self.bits)
        if self.less_one and 32 % self.bits:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        return zeros.T[:, start - first : stop - first]


class Gptq(Form):
    """`qweight`, `qzeros`, `scales` and `g_idx`."""

    title = "GPTQ"
    methods = ("gptq",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every `qweight`, where the config says GPTQ."""
        if said.method != "gptq":
            return
        kind = str(said.table.get("checkpoint_format") or "gptq").lower()
        if kind not in FORMATS or said.table.get("is_marlin_format"):
            yield from self._refused(stored, said, kind)
        for codes in [name for name in stored.specs if name.endswith(".qweight")]:
            yield self._weight(stored, codes, said, FORMATS[kind])

    def _refused(self, stored: Source, said: Said, kind: str) -> Iterator[Weight]:
        name = next(iter(stored.specs))
        damaged(
            stored,
            name,
            f"belongs to a model in GPTQ's format {kind!r} ({said.file}), which is not read; {' and '.join(FORMATS)} are. "
            "Take the original, unquantised checkpoint, or save the model in one of these formats.",
        )
        yield

    def _weight(self, stored: Source, codes: str, said: Said, less_one: bool) -> GptqWeight:
        stem, spec = codes.removesuffix(".qweight"), stored.specs[codes]
        parts = {"codes": codes}
        for role, end in (("scale", "scales"), ("zero", "qzeros")):
            parts[role] = part(stored, codes, f"{stem}.{end}", self.title)
        if spec.dtype != Dtype.I32 or len(spec.shape) != 2 or stored.specs[parts["zero"]].dtype != Dtype.I32:
            damaged(
                stored,
                codes,
                f"must be a matrix of 32-bit words in GPTQ, and so its zero points. Got {spec.dtype} {list(spec.shape)}.",
            )
        out, said_bits = spec.shape[1], said.table.get("bits")
        mixed = bool(said.table.get("dynamic"))
        index = f"{stem}.g_idx"
        if index in stored.specs:
            parts["index"], inputs = index, stored.specs[index].elements
            bits = spec.shape[0] * 32 // max(1, inputs)
        else:
            bits = said_bits if type(said_bits) is int else 0
            inputs = spec.shape[0] * 32 // max(1, bits)
        if bits not in BITS or spec.shape[0] * 32 != inputs * bits or (not mixed and bits != said_bits):
            damaged(
                stored,
                codes,
                f"{list(spec.shape)} holds no {said_bits}-bit codes of {inputs} inputs, as {said.file} says. GPTQ with {', '.join(map(str, BITS))} "
                "bits is read; config and weights must belong together.",
            )
        groups = stored.specs[parts["scale"]].rows
        check_shape(stored, parts["scale"], (groups, out), f"a scale for each group and output of {codes!r}")
        check_shape(stored, parts["zero"], (groups, -(-out * bits // 32)), f"a zero point for each group and output of {codes!r}")
        group = said.table.get("group_size")
        group = group if type(group) is int and group > 0 else max(1, inputs)
        if "index" in parts:
            check_index(stored, parts["index"], codes, groups)
        elif -(-inputs // group) != groups:
            check_shape(
                stored, parts["scale"], (-(-inputs // group), out), f"a scale for each {group} inputs of {codes!r} and output"
            )
        return GptqWeight(name=f"{stem}.weight", shape=(out, inputs), parts=parts, bits=bits, group=group, less_one=less_one)
