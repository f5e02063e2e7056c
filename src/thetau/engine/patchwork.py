"""A model that is put together: each tensor comes from one of several combinations, a merge of its own or a stored tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from thetau._lazy import torch
from thetau.checkpoint import Alignment, Slots, Source, Spec, align
from thetau.checkpoint.config import has_config, read_config
from thetau.checkpoint.source import Demand, computed, leaves
from thetau.checkpoint.ties import untied
from thetau.checkpoint.window import Window
from thetau.engine.guard import strangers
from thetau.engine.window import Reading, read_rows, straight
from thetau.errors import AlignmentError
from thetau.plan import TORCH_PACE
from thetau.vectors import Combination

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Patch:
    """A combination of degree 1 and the tensors that it gives; `alignment` where its sources call them otherwise."""

    combination: Combination
    names: tuple[str, ...]
    alignment: Alignment | None = None


class Patchwork(Source):
    """A model of which each part is a combination of its own.

    - `specs`: the tensors in the order in which they are written, with the dtypes that they have unless a recipe says otherwise.
    - `models`: what was put together, by name, and what each is compared with: for a warning about strangers.
    - `made`: how a recipe would say it.
    """

    degree = 1

    def __init__(
        self,
        patches: Sequence[Patch],
        specs: Mapping[str, Spec],
        *,
        label: str,
        folder: Path | None = None,
        files: Mapping[str, Any] = MappingProxyType({}),
        models: Mapping[str, Source] = MappingProxyType({}),
        base: Source | None = None,
        notes: Sequence[str] = (),
        alarms: Sequence[str] = (),
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.label, self.specs, self.folder, self.files = label, dict(specs), folder, files
        self.models, self.base, self._made = dict(models), base, made
        self._said, self._alarms = tuple(notes), tuple(alarms)
        self.patches = tuple(patches)
        children = {source.key: source for patch in patches for source in patch.combination.sources()}
        self._children = tuple(children.values())
        self.patch_of = {name: index for index, patch in enumerate(patches) for name in patch.names}
        lacking = [name for name in specs if name not in self.patch_of]
        if lacking or len(self.patch_of) != sum(len(patch.names) for patch in patches):
            raise AlignmentError(f"{label}: each tensor must come from one part; {len(lacking)} come from none ({lacking[:3]}).")
        self.readings = [self._reading(patch) for patch in patches]
        self.key = f"patchwork:{self._digest(lambda source: source.key)}"

    @classmethod
    def of(cls, combination: Combination, *, label: str) -> Source:
        """A model as one source: its own where it is one, else what its terms add up to (a base and its adapter)."""
        if len(combination.terms) == 1 and combination.terms[0][0] == 1:
            return combination.terms[0][1]
        specs = combination.specs()
        alignment = align(specs, label, combination.sources())
        stays = tuple(alignment.kept)
        reference = combination.reference
        assert reference is not None
        patches = [Patch(combination, (*alignment.names, *alignment.tied), alignment)]
        if stays:
            patches.append(Patch(Combination(((1.0, reference),), reference=reference), stays))
        folder, own, files = reference.folder, alignment.own, dict(reference.files)
        if own and "config.json" in files:
            files["config.json"] = untied(files["config.json"])
        elif own and folder is not None and has_config(folder):
            files["config.json"] = untied(read_config(folder))
        return cls(patches, alignment.specs, label=label, folder=folder, files=files, notes=alignment.notes)

    def _reading(self, patch: Patch) -> Reading:
        alignment = patch.alignment
        if alignment is None:
            mine = {name: self.specs[name] for name in patch.names}
            maps = {
                source.key: {name: name for name in patch.names if name in source.specs} for source in patch.combination.sources()
            }
            alignment = Alignment(mine, patch.names, {}, maps)
        return Reading(alignment, [patch.combination])

    def _digest(self, said: Callable[[Source], str]) -> str:
        found = hashlib.blake2b(digest_size=16)
        for name, index in self.patch_of.items():
            terms = self.readings[index].terms(self.patches[index].combination, name)
            found.update(repr((name, [(weight, said(source), theirs) for weight, source, theirs in terms])).encode())
        return found.hexdigest()

    def fingerprint(self) -> str:
        """Of the stored weights below, and of how they are arranged."""
        found = hashlib.blake2b(digest_size=16)
        for source in leaves(self.children() or self.origins()):
            found.update(source.fingerprint().encode())
        for name, index in self.patch_of.items():
            found.update(repr((name, index)).encode())
        return found.hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said when it was put together, and what the parts say."""
        return tuple(dict.fromkeys((*self._said, *(note for source in self.children() for note in source.notes))))

    def children(self) -> Sequence[Source]:
        """The sources of all parts, each once."""
        return self._children

    @property
    def abreast(self) -> int:
        """Those of the part that has most."""
        return max(len(patch.combination.terms) for patch in self.patches)

    def prepare(self) -> None:
        """What the parts need."""
        for source in self.children():
            source.prepare()

    def recipe(self) -> Mapping[str, Any] | None:
        """How a recipe would say it."""
        return self._made

    def warnings(self, base: Source | None) -> Sequence[str]:
        """What deserved a second look when it was put together, and models that are no relatives of the first one.

        Models that no tensor was read of, and that were not downloaded therefore, are not looked at.
        """
        if self.base is None or not _is_here(self.base):
            return self._alarms
        others = {label: model for label, model in self.models.items() if model.key != self.base.key and _is_here(model)}
        names = {source.key: {name: name for name in source.specs} for source in (self.base, *others.values())}
        label = next((label for label, model in self.models.items() if model.key == self.base.key), self.base.label)
        return [*self._alarms, *strangers(others, self.base, label, names)]

    def _terms(self, name: str) -> tuple[Reading, Combination]:
        index = self.patch_of[name]
        return self.readings[index], self.patches[index].combination

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows in float32, or as they are stored where they are copied."""
        self.prepare()
        return read_rows(self, name, start, stop)

    def block(self, window: Window, name: str, start: int, stop: int) -> Tensor:
        """Rows of the combination that gives this tensor; of a single stored one, its own."""
        window = window.called(name)
        reading, combination = self._terms(name)
        terms = reading.terms(combination, name)
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1].block(window, terms[0][2], start, stop)
        out = torch.empty((stop - start, *self.specs[name].shape[1:]), dtype=reading.dtype)
        reading.evaluate(combination, window, start, stop, out)
        return out

    def whole(self, name: str) -> bool:
        """Whether some merge needs the whole tensor at once."""
        reading, combination = self._terms(name)
        return any(source.whole(theirs) for _, source, theirs in reading.terms(combination, name))

    def grain(self, name: str) -> int:
        """The rows that some merge needs at once."""
        reading, combination = self._terms(name)
        return max(source.grain(theirs) for _, source, theirs in reading.terms(combination, name))

    def write(self, name: str, ground: Source | None, weight: float, slots: Slots) -> bool:
        """Let the compiled loop write a tensor, where the part that gives it can."""
        found = straight(*self._terms(name), name)
        if ground is not None or weight != 1 or found is None:
            return False
        return found[1].write(name, found[2], found[0], slots)

    def demand(self, name: str) -> Demand:
        """What the part takes that gives this tensor."""
        reading, combination = self._terms(name)
        terms = reading.terms(combination, name)
        below = {child.key for _, source, _ in terms for child in computed([source]) for child in child.children()}
        inner = [source.demand(theirs) for _, source, theirs in terms if source.key not in below]
        by_loop = straight(reading, combination, name) is not None and any(one.by == "loop" for one in inner)
        return Demand(
            sum(one.read for one in inner),
            sum(one.memory for one in inner),
            sum(one.flops for one in inner),
            "loop" if by_loop else "torch",
            min(one.pace for one in inner) if by_loop else TORCH_PACE,
        )


def _is_here(source: Source) -> bool:
    return all(leaf.lacking() is None for leaf in leaves([source]))
