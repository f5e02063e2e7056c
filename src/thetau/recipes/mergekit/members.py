"""The models of a recipe, each with its tensors under the names of the first one, and what an output tensor is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thetau.checkpoint import Kind, Source, kind_of
from thetau.checkpoint.config import differences
from thetau.checkpoint.ties import Ties
from thetau.parts import Method
from thetau.recipes.mergekit.findings import some
from thetau.recipes.mergekit.layout import Layout, is_head
from thetau.recipes.mergekit.modules import Tower
from thetau.recipes.mergekit.reference import Reference
from thetau.recipes.mergekit.tokens import embedding_rows, is_vocabulary, vocabulary_size


@dataclass(frozen=True)
class Model:
    """A model of the recipe. `names` are its tensors by the donor's names, each with its own layer's number."""

    label: str
    source: Source
    layout: Layout
    names: Mapping[str, str]
    config: Mapping[str, Any]

    @cached_property
    def ties(self) -> Ties:
        """Which of its tensors are one."""
        return Ties(self.source)

    @cached_property
    def token_rows(self) -> tuple[int, ...]:
        """The numbers of rows that a tensor which counts tokens may have."""
        known = (embedding_rows(self.source, self.config), vocabulary_size(self.config))
        return tuple({rows for rows in known if rows is not None})

    def by_token(self, own: str) -> bool:
        """Whether the first axis of one of its tensors counts tokens."""
        return is_vocabulary(own, self.source.specs[own].shape, self.token_rows)

    @cached_property
    def layers(self) -> Mapping[str, Mapping[int, Sequence[str]]]:
        """The names inside each layer of each container, by the donor's name of the container."""
        found: dict[str, dict[int, list[str]]] = {}
        for said, own in self.names.items():
            place = self.layout.places[own]
            if place.container is not None:
                container = said.removesuffix(f".{place.index}.{place.rest}")
                found.setdefault(container, {}).setdefault(place.index, []).append(place.rest)
        return found

    def depth(self, container: str) -> int:
        """How many layers it has there."""
        return len(self.layers.get(container, ()))

    def holds(self, tower: Tower) -> bool:
        """Whether it has any tensor of a tower."""
        return any(name in self.names for name in tower.tensors)


@dataclass(frozen=True)
class Slot:
    """One output tensor: what each input calls it, the base's, and the method."""

    name: str
    inputs: tuple[tuple[str, Model, str], ...]  # identity, model, its tensor
    base: tuple[Model, str] | None
    method: Method | None  # None: the first input's tensor as it is


def find(model: Model, said: str) -> str | None:
    """The tensor that a model has under a donor's name; of a head that it ties, the tensor that it is tied to.

    Whose config says that the head is a tensor of its own has none where it stores none. Where nothing is said, the head is the embedding.
    """
    own = model.names.get(said)
    if own is not None:
        return own
    if not is_head(said) or model.ties.words is False:
        return None
    kept = model.ties.keeper(said)
    if kept is not None:
        return kept
    for name, spec in model.source.specs.items():
        if spec.dtype.is_floating_point and model.by_token(name) and kind_of(name, spec.shape) is Kind.EMBEDDING:
            return name
    return None


def apart(models: Sequence[Model]) -> str:
    """A sentence on where the models' configs differ, and that models of other architectures do not go together."""
    keys = [line for model in models[1:] for line in differences(models[0].config, model.config)]
    shown = some(list(dict.fromkeys(keys)), "; ")
    why = f" Their configs differ in {shown}." if keys else ""
    return f"{why} Models of other architectures cannot be merged."


def labels_of(references: Sequence[Reference]) -> dict[Reference, str]:
    """What messages, provenance and randomness call the models: the last words of their paths where these differ, else the paths."""
    short = {reference: "+".join(Path(part.split("@")[0]).name for part in str(reference).split("+")) for reference in references}
    count = list(short.values())
    return {reference: label if count.count(label) == 1 and label else str(reference) for reference, label in short.items()}


def identities_of(labels: Sequence[str]) -> list[str]:
    """A name for each input of a tensor; the same model a second time gets a number."""
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        out.append(label if seen[label] == 1 else f"{label}#{seen[label]}")
    return out
