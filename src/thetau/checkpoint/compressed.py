"""Compressed task vectors: sparse, low rank, or quantised, in one safetensors file, read by rows as if they were dense.

Format 1. The metadata say `thetau.kind=task_vector`, `thetau.form`, `thetau.format`, and `thetau.tensors`: a JSON table from each
tensor's name to its dense `shape` and its `kind`. A tensor's parts are stored under `part:name`:

| kind | parts |
|---|---|
| sparse | `mask`: a bit an entry, row by row, the lowest bit of a byte first · `values`: where the bit is set · `offsets`: values before each block of rows |
| low_rank | `u` `[rows, rank]` and `v` `[rank, row elements]` |
| scaled | `values` in int8 · `scale`: one a row, or one in all where rows are shorter than 16 |
| dense | `values` |
| masked | of several tasks: `values` that they share · `mask0`, `mask1`, …: a bit an entry for each (`thetau.checkpoint.masked`) |

Nothing is believed: the parts must be exactly these, in these shapes, and each block's bits must be as many as its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

from thetau._lazy import numpy as np
from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype
from thetau.checkpoint.safetensors import SafetensorsSource
from thetau.checkpoint.source import Source, Spec, span
from thetau.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
FORMS = ("sparse", "low_rank", "quantised")
KINDS = ("sparse", "low_rank", "scaled", "dense")
BLOCK = (
    1 << 16
)  # elements of a block of rows: between two offsets, and of one product U·V, so that no way of reading changes a bit
SCALED_ROW = 16  # shorter rows share one scale, which would otherwise take more room than it saves
FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16)
REMEDY = "Copy the file again, or write it again with `thetau vector compress`."

Layout = dict[str, tuple[tuple[int, ...], Dtype]]


def block_rows(row_elements: int) -> int:
    """Rows of one block."""
    return max(1, BLOCK // max(1, row_elements))


def layout(kind: str, shape: tuple[int, ...], dtype: Dtype, *, kept: int = 0, rank: int = 0) -> Layout:
    """Shape and dtype of each part of a tensor; `kept` entries of a sparse one, `rank` of a product."""
    rows, row = shape[0] if shape else 1, prod(shape[1:])
    match kind:
        case "sparse":
            blocks = -(-rows // block_rows(row))
            return {
                "mask": ((-(-rows * row // 8),), Dtype.U8),
                "values": ((kept,), dtype),
                "offsets": ((blocks + 1,), Dtype.I64),
            }
        case "low_rank":
            return {"u": ((rows, rank), dtype), "v": ((rank, row), dtype)}
        case "scaled":
            return {"values": (shape, Dtype.I8), "scale": ((rows if row >= SCALED_ROW else 1,), Dtype.F32)}
        case _:
            return {"values": (shape, dtype)}


def part(which: str, name: str) -> str:
    """What a part of a tensor is called in the file."""
    return f"{which}:{name}"


def nbytes(parts: Layout) -> int:
    """Bytes of a tensor's parts."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts.values())


def expanded(source: Source) -> Source:
    """A compressed task vector as a dense one; every other source as it is.

    Raises:
        CheckpointError: the form is not known, newer than this version, or the file is damaged.
    """
    if isinstance(source, SafetensorsSource) and "thetau.form" in source.metadata:
        return CompressedSource(source)
    return source


def check_metadata(label: str, metadata: Mapping[str, str], forms: Sequence[str]) -> None:
    """Nothing where a file says that it is a task vector of this format, in one of these forms.

    Raises:
        CheckpointError: it says otherwise, or is of a newer format.
    """
    version, kind, form = metadata.get("thetau.format", ""), metadata.get("thetau.kind"), metadata.get("thetau.form")
    if version.isdecimal() and version.isascii() and len(version) < 9 and int(version) > FORMAT:
        raise CheckpointError(
            f"{label}: is of format {version} of compressed task vectors; this thetau reads up to {FORMAT}. Update thetau."
        )
    if version != str(FORMAT) or form not in forms or kind != "task_vector":
        raise CheckpointError(
            f"{label}: a compressed file must be a task_vector of form {', '.join(forms)} and format {FORMAT}. "
            f"Got {kind!r}, {form!r}, {version!r}. {REMEDY}"
        )


def table_of(label: str, metadata: Mapping[str, str], key: str, of: str) -> Mapping[str, Any]:
    """A JSON table of the metadata, which must not be empty; `of` is what it must name.

    Raises:
        CheckpointError: it is no such table.
    """
    try:
        table = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: `{key}` in the metadata is no JSON table ({error}). {REMEDY}") from error
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{label}: `{key}` in the metadata must name at least one {of}. {REMEDY}")
    return table


def entry_of(label: str, name: str, entry: Any, kinds: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """A tensor's kind and dense shape, as `thetau.tensors` gives them.

    Raises:
        CheckpointError: it gives something else.
    """
    kind, shape = (entry.get("kind"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    fine = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
    if kind not in kinds or not fine or prod([n or 1 for n in shape or ()]) >= 1 << 60:
        damaged(label, name, f"`thetau.tensors` must give its kind ({', '.join(kinds)}) and its shape, not {str(entry)[:80]}")
    return str(kind), tuple(shape or ())


def read_bits(stored: Source, name: str, spec: Spec, start: int, stop: int) -> Tensor:
    """Which bits of a mask, stored under a name, are set at some rows of a tensor: bool `[(stop - start) · row elements]`.

    Raises:
        CheckpointError: the last byte has bits beyond the tensor's entries.
    """
    first, last = start * spec.row_elements, stop * spec.row_elements
    raw = stored.read(name, first // 8, -(-last // 8)).numpy()
    bits = np.unpackbits(raw, bitorder="little")
    used = bits[first % 8 : first % 8 + last - first]
    if stop == spec.rows and bits[first % 8 + last - first :].any():
        damaged(stored.label, spec.name, f"its mask has bits beyond its {spec.elements} entries")
    return torch.from_numpy(used).bool()


def damaged(label: str, name: str, what: str) -> NoReturn:
    """Raises `CheckpointError` about a tensor."""
    raise CheckpointError(f"{label}: tensor {name!r}: {what}. {REMEDY}")


class CompressedSource(Source):
    """A task vector whose rows are made when they are read, in float32. `stored` is the file as it is."""

    degree = 0
    partial = True

    def __init__(self, stored: SafetensorsSource) -> None:
        self.stored = stored
        self.label, self.key, self.folder = stored.label, f"expanded:{stored.key}", stored.folder
        self.metadata = stored.metadata
        self.form = self.metadata["thetau.form"]
        check_metadata(self.label, self.metadata, FORMS)
        self._kinds: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        for name, entry in table_of(self.label, self.metadata, "thetau.tensors", "tensor").items():
            self._kinds[name], shape = entry_of(self.label, name, entry, KINDS)
            file = next(iter(stored.specs.values())).file
            self.specs[name] = Spec(name=name, shape=shape, dtype=Dtype.F32, file=file)
        known = {part(which, name) for name in self.specs for which in layout(self._kinds[name], (), Dtype.F32)}
        for name in self.specs:
            self._check_parts(name)
        extra = [name for name in stored.specs if name not in known]
        if extra:
            raise CheckpointError(
                f"{self.label}: {extra[0]!r} belongs to no tensor of `thetau.tensors` ({len(extra)} such). {REMEDY}"
            )
        self._offsets: dict[str, Tensor] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which form it was restored from."""
        return (*self.stored.notes, f"{self.label}: a compressed task vector ({self.form.replace('_', ' ')}), read as dense.")

    def parts(self, name: str) -> dict[str, Spec]:
        """What is stored of a tensor, by part."""
        return {which: self.stored.specs[part(which, name)] for which in layout(self._kinds[name], (), Dtype.F32)}

    def by_kind(self) -> dict[str, list[str]]:
        """Which tensors are stored how: sparse, low_rank, scaled or dense."""
        found: dict[str, list[str]] = {}
        for name, kind in self._kinds.items():
            found.setdefault(kind, []).append(name)
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the vector, in float32: `[stop - start, *shape[1:]]`.

        Raises:
            CheckpointError: what the file holds contradicts itself there.
        """
        spec = self.specs[name]
        start, stop = span(spec, start, stop)
        match self._kinds[name]:
            case "sparse":
                rows = self._sparse(name, spec, start, stop)
            case "low_rank":
                rows = self._product(name, spec, start, stop)
            case "scaled":
                rows = self._scaled(name, spec, start, stop)
            case _:
                rows = self.stored.read(part("values", name), start, stop).float()
        return rows.reshape((stop - start, *spec.shape[1:]) if spec.shape else ())

    def fingerprint(self) -> str:
        """That of the file."""
        return self.stored.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """That of the file."""
        return self.stored.header_hashes()

    def changed_files(self) -> list[str]:
        """The file, if it is no longer what was opened."""
        return self.stored.changed_files()

    def mask(self, name: str, start: int, stop: int) -> Tensor:
        """Which entries of some rows are stored, bool `[(stop - start) · row elements]`; of sparse tensors only."""
        return read_bits(self.stored, part("mask", name), self.specs[name], start, stop)

    def _sparse(self, name: str, spec: Spec, start: int, stop: int) -> Tensor:
        out = torch.zeros((stop - start) * spec.row_elements)
        if not out.numel():
            return out
        offsets, row, step = self._blocks(name, spec), spec.row_elements, block_rows(spec.row_elements)
        first, last = start // step, -(-stop // step)
        begin, end = first * step, min(last * step, spec.rows)
        mask = self.mask(name, begin, end)
        values = self.stored.read(part("values", name), int(offsets[first]), int(offsets[last])).float()
        for block in range(first, last):
            low, high = block * step, min((block + 1) * step, spec.rows)
            bits = mask[(low - begin) * row : (high - begin) * row]
            count = int(offsets[block + 1] - offsets[block])
            if int(bits.sum()) != count:
                damaged(
                    self.label,
                    name,
                    f"rows {low}:{high} have {int(bits.sum())} bits in the mask and {count} values; they must be as many",
                )
            dense = torch.zeros(len(bits))
            at = int(offsets[block] - offsets[first])
            dense[bits] = values[at : at + count]
            one, other = max(low, start), min(high, stop)
            out[(one - start) * row : (other - start) * row] = dense[(one - low) * row : (other - low) * row]
        return out

    def _blocks(self, name: str, spec: Spec) -> Tensor:
        """Values before each block of rows, and all of them, int64."""
        if name not in self._offsets:
            found = self.stored.read(part("offsets", name))
            count = self.stored.specs[part("values", name)].rows
            widest = block_rows(spec.row_elements) * spec.row_elements
            steps = found[1:] - found[:-1]
            if int(found[0]) != 0 or int(found[-1]) != count or bool(((steps < 0) | (steps > widest)).any()):
                damaged(self.label, name, f"its offsets must rise from 0 to the {count} values, by at most {widest} a block")
            self._offsets[name] = found
        return self._offsets[name]

    def _product(self, name: str, spec: Spec, start: int, stop: int) -> Tensor:
        if start == stop or not spec.row_elements:
            return torch.empty((stop - start, spec.row_elements))
        v = self.stored.read(part("v", name)).float()
        step = block_rows(spec.row_elements)
        first = start - start % step
        blocks = [
            self.stored.read(part("u", name), low, min(low + step, spec.rows)).float() @ v for low in range(first, stop, step)
        ]
        return torch.cat(blocks)[start - first : stop - first] if blocks else torch.empty((0, spec.row_elements))

    def _scaled(self, name: str, spec: Spec, start: int, stop: int) -> Tensor:
        values = self.stored.read(part("values", name), start, stop).float()
        whole = self.stored.specs[part("scale", name)].rows == 1
        scale = self.stored.read(part("scale", name), *((0, 1) if whole else (start, stop)))
        return values.reshape(stop - start, spec.row_elements) * scale[:, None]

    def _check_parts(self, name: str) -> None:
        kind, shape = self._kinds[name], self.specs[name].shape
        found = {which: self.stored.specs.get(part(which, name)) for which in layout(kind, shape, Dtype.F32)}
        lost = [which for which, spec in found.items() if spec is None]
        if lost:
            damaged(self.label, name, f"is stored as {kind}, but its part {lost[0]!r} is missing")
        held = {which: spec for which, spec in found.items() if spec is not None}
        first = held.get("values") or held["u"]
        dtype = first.dtype if first.dtype in FLOATS else Dtype.F32
        kept = first.shape[0] if kind == "sparse" and first.shape else 0
        rank = first.shape[1] if kind == "low_rank" and len(first.shape) == 2 else 0
        for which, (want, of) in layout(kind, shape, dtype, kept=kept, rank=rank).items():
            got = held[which]
            if (got.shape, got.dtype) != (want, of):
                damaged(
                    self.label,
                    name,
                    f"its part {which!r} must be {of} {list(want)} for shape {list(shape)}, not {got.dtype} {list(got.shape)}",
                )
        elements = self.specs[name].elements
        if kept > elements:
            damaged(self.label, name, f"has {kept} values for {elements} entries")
        if kind == "low_rank" and rank == 0 and elements:
            damaged(self.label, name, "is a product of rank 0")
