"""Where a model's tensors stand: in which layer of which tower, before the layers or after them; told from names, for any architecture.

A layered container is what stands before a block's number (`model.layers`, `decoder.block`, `visual.blocks`). Everything else is loose:
before the layers (embeddings and what makes the input), or after them (final norms, poolers, heads).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from thetau.checkpoint import Kind, Source, kind_of
from thetau.checkpoint.naming import place_of

_AFTER = re.compile(
    r"(?:^|\.)(?:norm|norm_f|ln_f|final_\w*norm\w*|final_layernorm|post_\w*norm\w*|layernorm_post|layer_norm|lm_head|embed_out|output|output_layer|score"
    r"|pooler|classifier|pre_classifier|cls|qa_outputs|heads?|vocab_\w+|proj_out|\w*_projection|vision_adapter|ln_post|logit_scale|layernorm)(?:\.|$)"
)


@dataclass(frozen=True)
class Place:
    """A tensor's place: its container, the layer's number and the name inside the layer; `container` is None for a loose one."""

    container: str | None
    index: int
    rest: str


@dataclass(frozen=True)
class Layout:
    """The places of all tensors of a model. `depth` counts the layers of each container."""

    places: Mapping[str, Place]
    depth: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> Layout:
        """The layout of a model; a container whose numbers do not run from 0 is none."""
        found = {name: place_of(name) for name in source.specs}
        numbers: dict[str, set[int]] = {}
        for place in found.values():
            if place is not None:
                numbers.setdefault(place[0], set()).add(place[1])
        whole = {container: len(seen) for container, seen in numbers.items() if seen == set(range(len(seen)))}
        places = {
            name: Place(*place) if place is not None and place[0] in whole else Place(None, 0, name)
            for name, place in found.items()
        }
        return cls(places, whole)

    def rests(self, container: str) -> set[str]:
        """The names inside a container's layers."""
        return {place.rest for place in self.places.values() if place.container == container}

    def tower(self, name: str) -> str | None:
        """The container that a loose tensor belongs to: the one whose name shares most of the words before; None where none does."""
        words = name.split(".")
        best, most = None, 0
        for container in self.depth:
            shared = 0
            for mine, theirs in zip(words, container.split("."), strict=False):
                if mine != theirs:
                    break
                shared += 1
            if shared > most:
                best, most = container, shared
        if best is not None or len(self.depth) > 1:
            return best
        return next(iter(self.depth), None)


def is_after(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a loose tensor comes after the layers: final norms, poolers, heads."""
    if kind_of(name, shape) is Kind.EMBEDDING or re.search(
        r"embed(?!_out)|(?:^|\.)(?:conv|patch|pre_layrnorm|ln_pre|layernorm_pre)", name
    ):
        return False
    return _AFTER.search(name) is not None


def renamed(reference: Layout, other: Layout) -> dict[str, str]:
    """The other model's tensors under the reference's names, each with its own layer's number.

    Containers meet by name, else by what their layers hold; the words before a container that differ are taken off, or put before, in the
    loose tensors too (`h.0…` against `transformer.h.0…`, `model.layers…` against `model.language_model.layers…`).
    """
    pairs: dict[str, str] = {}
    for container in other.depth:
        if container in reference.depth:
            pairs[container] = container
            continue
        inside = other.rests(container)
        alike = {
            theirs: len(inside & reference.rests(theirs)) - 0.1 * abs(len(theirs) - len(container)) / 100
            for theirs in reference.depth
            if theirs not in pairs.values() and theirs not in other.depth
        }
        best = max(alike, key=lambda theirs: (alike[theirs], _ending(theirs, container)), default=None)
        if best is not None and alike[best] > len(inside) / 2:
            pairs[container] = best
    heads = list(dict.fromkeys(_heads(mine, theirs) for mine, theirs in pairs.items() if mine != theirs))
    found: dict[str, str] = {}
    for name, place in other.places.items():
        if place.container is not None and place.container in pairs:
            said = f"{pairs[place.container]}.{place.index}.{place.rest}"
        elif name in reference.places:
            said = name
        else:
            tried = [theirs + name.removeprefix(mine) for mine, theirs in heads if name.startswith(mine)]
            said = next((one for one in tried if one in reference.places), name)
        found[name] = said
    return found


def _heads(mine: str, theirs: str) -> tuple[str, str]:
    """What stands before the common ending of two containers' names, each with its dot."""
    shared = _ending(mine, theirs)
    left, right = mine.split("."), theirs.split(".")
    return tuple("".join(f"{word}." for word in words[: len(words) - shared]) for words in (left, right))  # type: ignore[return-value]


def _ending(one: str, other: str) -> int:
    """How many words two names share at their ends."""
    shared = 0
    for mine, theirs in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared
