"""A quantised checkpoint as a plain one: its weights under their usual names, dequantised by rows when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from thetau._lazy import torch
from thetau.checkpoint.dtypes import Dtype, dtype_name
from thetau.checkpoint.quantised.form import Said, Weight
from thetau.checkpoint.quantised.said import plain_files
from thetau.checkpoint.source import Demand, Lack, Source, Spec, span

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20  # elements that are dequantised at once
BYTES = 32  # of memory that an element takes meanwhile: its code, its scale and its zero point, widened
SHOWN = 3


class QuantisedSource(Source):
    """A model whose weights are stored in parts.

    A weight is read in float32, as its form makes it, so that it is rounded once, into the output. Its dtype, in which it is written where
    nobody asks for another, is the model's own: the one that its config names, bfloat16 where it names none.
    """

    def __init__(
        self,
        stored: Source,
        weights: Mapping[str, Weight],
        forms: Sequence[str],
        said: Said | None,
        dtype: Dtype,
        idle: Sequence[str],
    ) -> None:
        self.stored, self.weights = stored, weights
        self.label, self.folder, self.metadata = stored.label, stored.folder, stored.metadata
        self.degree, self.partial = stored.degree, stored.partial
        self.key = f"quantised:{stored.key}"
        self.quantised = " and ".join(forms)
        self.coded = frozenset(weights)
        self.files = {**stored.files, **plain_files(stored.folder, dtype)}
        places = {name: weight for weight in weights.values() for name in weight.parts.values()}
        self.specs: dict[str, Spec] = {}
        for name, spec in stored.specs.items():
            weight = places.get(name)
            if weight is not None:
                self.specs.setdefault(weight.name, Spec(name=weight.name, shape=weight.shape, dtype=dtype, file=spec.file))
            elif name not in idle:
                self.specs[name] = spec
        said_nothing = "" if said is not None else " Nothing beside them says how they are quantised; their names and dtypes do."
        self._notes = (
            *stored.notes,
            f"{self.label}: {len(weights)} weights in {self.quantised} are read dequantised; what is made of this model is written as "
            f"{dtype_name(dtype)} without quantisation unless `--quantise` asks for it, and its config says so.{said_nothing}",
            *(
                (
                    f"{self.label}: {len(idle)} scales of activations and caches are left out ({', '.join(idle[:SHOWN])}{', …' if len(idle) > SHOWN else ''}).",
                )
                if idle
                else ()
            ),
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows: of a quantised weight in float32, of every other tensor as stored."""
        if name not in self.weights:
            return self.stored.read(name, start, stop)
        spec, weight = self.specs[name], self.weights[name]
        start, stop = span(spec, start, stop)
        step = max(1, CHUNK // max(1, spec.row_elements))
        if start < stop <= start + step and spec.elements:
            return weight.rows(self.stored, start, stop)
        out = torch.empty((stop - start, *spec.shape[1:]))
        if not out.numel():
            return out
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = weight.rows(self.stored, first, last)
        return out

    def as_stored(self) -> Source:
        """Codes and scales."""
        return self.stored

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a tensor lies that is no quantised weight; of those None, since no bytes hold them."""
        return None if name in self.weights else self.stored.place(name)

    def has_place(self, name: str) -> bool:
        """As `place`, of files that need not be here yet."""
        return name not in self.weights and self.stored.has_place(name)

    def lacking(self) -> Lack | None:
        """What the stored weights have to download."""
        return self.stored.lacking()

    def prepare(self) -> None:
        """What the stored weights need."""
        self.stored.prepare()

    def demand(self, name: str) -> Demand:
        """The bytes of a weight's parts, and the memory that they take while they become numbers."""
        if name not in self.weights:
            return self.stored.demand(name)
        spec = self.specs[name]
        held = sum(self.stored.specs[part].nbytes for part in self.weights[name].parts.values())
        at_once = max(spec.row_elements, min(spec.elements, CHUNK))
        return Demand(held, BYTES * at_once, 0.0, "torch")

    def fingerprint(self) -> str:
        """That of the stored weights."""
        return self.stored.fingerprint()

    def header_hashes(self) -> dict[str, str]:
        """Those of the stored weights."""
        return self.stored.header_hashes()

    def changed_files(self) -> list[str]:
        """Files that are no longer what was opened."""
        return self.stored.changed_files()
