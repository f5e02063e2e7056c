"""AWQ: 4-bit integer codes, a scale and a zero point for each group of inputs. Lin et al., <https://arxiv.org/abs/2306.00978>.

The value is (code − zero) · scale. Read in AutoAWQ's `gemm` packing: `qweight` `[in, out / 8]` and `qzeros` `[groups, out / 8]`, eight outputs a
word, the lowest four bits first, in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.quantised.form import Form, Said, Weight, check_shape, damaged, part
from thetau.checkpoint.quantised.reading import columns
from thetau.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8


@dataclass(frozen=True, kw_only=True)
class AwqWeight(Weight):
    """A weight `[out, in]` of which the transposed is stored, in groups of `group` inputs."""

    group: int

    def rows(self, stored: Source, start: int, stop: int) -> Tensor:
        """Rows in float32: columns of what is stored."""
        codes, zeros = (self._codes(stored, which, start, stop) for which in ("codes", "zero"))
        scale = columns(stored, self.parts["scale"], start, stop).float()
        index = torch.arange(self.shape[1]) // self.group
        values = codes.float().sub_(zeros.float().index_select(0, index)).mul_(scale.index_select(0, index))
        return values.T.contiguous()

    def _codes(self, stored: Source, which: str, start: int, stop: int) -> Tensor:
        """Codes of some outputs, `[in or groups, stop - start]`."""
        first = start // PACK
        words = columns(stored, self.parts[which], first, -(-stop // PACK)).long()
        fields = (words[..., None] >> (4 * torch.arange(PACK))) & 0xF
        found = torch.empty_like(fields)
        found[..., list(ORDER)] = fields
        return found.reshape(words.shape[0], -1)[:, start - PACK * first : stop - PACK * first]


class Awq(Form):
    """`qweight`, `qzeros` and `scales`, where the config says AWQ."""

    title = "AWQ"
    methods = ("awq",)

    def find(self, stored: Source, said: Said) -> Iterator[Weight]:
        """Every `qweight`, where the config says AWQ."""
        if said.method != "awq":
            return
        names = [name for name in stored.specs if name.endswith(".qweight")]
        version, bits = (
            said.table.get(key, said.table.get(other, usual))
            for key, other, usual in (("version", "format", "gemm"), ("bits", "w_bit", 4))
        )
        if names and (str(version).lower() != "gemm" or bits != 4):
            damaged(
                stored,
                names[0],
                f"is in AWQ's packing {version!r} with {bits!r} bits ({said.file}), which is not read; 'gemm' with 4 bits is. "
                "Take the original, unquantised checkpoint.",
            )
        for codes in names:
            yield self._weight(stored, codes)

    def _weight(self, stored: Source, codes: str) -> AwqWeight:
        stem, spec = codes.removesuffix(".qweight"), stored.specs[codes]
        scale, zero = (part(stored, codes, f"{stem}.{end}", self.title) for end in ("scales", "qzeros"))
        if spec.dtype != Dtype.I32 or len(spec.shape) != 2 or stored.specs[zero].dtype != Dtype.I32:
            damaged(
                stored,
                codes,
                f"must be a matrix of 32-bit words in AWQ, and so its zero points. Got {spec.dtype} {list(spec.shape)}.",
            )
        inputs, out, groups = spec.shape[0], spec.shape[1] * PACK, stored.specs[scale].rows
        check_shape(stored, scale, (groups, out), f"a scale for each group and output of {codes!r}, {PACK} outputs a word")
        check_shape(stored, zero, (groups, spec.shape[1]), f"a zero point for each group and output of {codes!r}")
        if not groups or inputs % groups:
            damaged(stored, scale, f"has {groups} groups, into which the {inputs} inputs of {codes!r} cannot be divided.")
        return AwqWeight(
            name=f"{stem}.weight",
            shape=(out, inputs),
            parts={"codes": codes, "scale": scale, "zero": zero},
            group=inputs // groups,
        )
