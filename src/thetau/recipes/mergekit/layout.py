"""Where a model's tensors stand: in which layer of which tower, before the layers or after them; told from names, for any architecture.

A layered container is what stands before a block's number (`model.layers`, `decoder.block`, `visual.blocks`). Everything else is loose:
before the layers (embeddings and what makes the input), or after them (final norms, poolers, heads).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from thetau.checkpoint import Kind, Source, kind_of
from thetau.checkpoint.config import depth_of
from thetau.checkpoint.names import Names
from thetau.checkpoint.naming import place_of

VISION = re.compile(r"vision|visual|image|vit(?:\.|$)", re.IGNORECASE)
AUDIO = re.compile(r"audio|speech", re.IGNORECASE)
BRIDGE = re.compile(r"projector|merger|mm_|multi_modal|connector|resampler|qformer", re.IGNORECASE)
_MORE_TOKENS = re.compile(
    r"(?:^|[._])mtp(?:[._]|$)", re.IGNORECASE
)  # heads that predict several tokens, with layers of their own
_FIRST_ONLY = re.compile(r"relative_attention_bias|(?:^|\.)ln0\.")  # stands in layer 0 for all layers: T5's, RWKV's
_INNER = re.compile(r"^(.+?)\.(\d+)\.")
_AFTER = re.compile(
    r"(?:^|\.)(?:norm|norm_f|ln_f|final_\w*norm\w*|final_layernorm|post_\w*norm\w*|layernorm_post|layer_norm|lm_head|embed_out|output|output_layer|score"
    r"|pooler|classifier|pre_classifier|cls|qa_outputs|heads?|vocab_\w+|proj_out|\w*_projection|vision_adapter|ln_post|logit_scale|layernorm)(?:\.|$)"
)
_LAST_NORM = re.compile(r"(?:^|\.)embedding_norm\.")  # LFM2's norm behind its layers, whatever its name says
_BEFORE = re.compile(r"embed|(?:^|\.)(?:conv|patch|pre_layrnorm|ln_pre|layernorm_pre)")
_HEAD_TOO = re.compile(
    r"(?:^|\.)(?:embed_out|vocab_projector)\.|^decoder\.(?:weight|bias)$"
)  # of GPT-NeoX, DistilBERT, ModernBERT


@dataclass(frozen=True)
class Place:
    """A tensor's place: its container, the layer's number and the name inside the layer; `container` is None for a loose one."""

    container: str | None
    index: int
    rest: str


@dataclass(frozen=True)
class Layout:
    """The places of all tensors of a model.

    - `depth`: the number of layers of each container.
    - `beyond`: tensors in layers behind the last one that the config counts, each with its container and the number behind the last:
      DeepSeek's and GLM's heads for further tokens, `model.layers.61` of 61 layers. They are loose.
    """

    places: Mapping[str, Place]
    depth: Mapping[str, int] = field(default_factory=dict)
    beyond: Mapping[str, Place] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, config: Mapping[str, Any] = MappingProxyType({})) -> Layout:
        """The layout of a model; a container whose numbers do not run from 0 is none."""
        found = {name: _place(name) for name in source.specs}
        numbers: dict[str, set[int]] = {}
        for place in found.values():
            if place is not None:
                numbers.setdefault(place.container or "", set()).add(place.index)
        whole = {container: len(seen) for container, seen in numbers.items() if seen == set(range(len(seen)))}
        depth = {container: min(count, depth_of(config, container) or count) for container, count in whole.items()}
        later = {(place.container, place.rest) for place in found.values() if place is not None and place.index}
        places, beyond = {}, {}
        for name, place in found.items():
            place = place or _inside(name, whole)
            places[name] = Place(None, 0, name)
            if place is None or place.container is None or place.container not in whole:
                continue
            if place.index >= depth[place.container]:
                beyond[name] = Place(place.container, place.index - depth[place.container], place.rest)
            elif not _FIRST_ONLY.search(place.rest) or (place.container, place.rest) in later:
                places[name] = place
        return cls(places, depth, beyond)

    def rests(self, container: str) -> set[str]:
        """The names inside a container's layers."""
        return {place.rest for place in self.places.values() if place.container == container}

    def further(self, name: str) -> bool:
        """Whether a loose tensor belongs to heads for further tokens, which a model can do without."""
        return name in self.beyond or _MORE_TOKENS.search(name) is not None

    def reading(self) -> list[str]:
        """The containers of the model's main part, that is none for images or sound and no bridge from them; all where only such are there."""
        found = [container for container in self.depth if not aside(container)]
        return found or list(self.depth)

    def tower(self, name: str) -> str | None:
        """The container that a loose tensor belongs to; None for what several share.

        It is the one whose name shares most words at its beginning; what is for images or sound goes by its words to such a tower.
        """
        if name in self.beyond:
            return self.beyond[name].container
        reading = self.reading()
        others = [container for container in self.depth if container not in reading and not BRIDGE.search(container)]
        for kind in (VISION, AUDIO):
            mine = [container for container in others if kind.search(container)]
            if kind.search(name) and mine:
                return _nearest(name, mine) or mine[0]
        return _nearest(name, reading) or (reading[0] if len(reading) == 1 else None)


def aside(container: str) -> bool:
    """Whether a container is for images or sound, or a bridge from them."""
    return any(kind.search(container) for kind in (VISION, AUDIO, BRIDGE))


def _nearest(name: str, containers: Sequence[str]) -> str | None:
    """The one container whose name shares most words with another name's beginning; None where several do, or none."""
    shared = {container: _beginning(name.split("."), container.split(".")) for container in containers}
    most = max(shared.values(), default=0)
    best = [container for container, count in shared.items() if count == most]
    return best[0] if most and len(best) == 1 else None


def _place(name: str) -> Place | None:
    """A tensor's place as its name says it. Of numbers inside numbers, as `stages.0.blocks.1`, the outer one counts."""
    found = place_of(name)
    if found is None or _MORE_TOKENS.search(found[0]):
        return None
    outer = _INNER.match(f"{found[0]}.")
    return Place(outer[1], int(outer[2]), name[outer.end() :]) if outer is not None else Place(*found)


def _inside(name: str, containers: Collection[str]) -> Place | None:
    """The place of a tensor whose name says no part of a block, but which stands in a container that others make known."""
    for match in re.finditer(r"\.(\d+)\.", name):
        if name[: match.start()] in containers:
            return Place(name[: match.start()], int(match[1]), name[match.end() :])
    return None


def is_after(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a loose tensor comes after the layers: final norms, poolers, heads."""
    if is_head(name) or _LAST_NORM.search(name):
        return True
    if kind_of(name, shape) is Kind.EMBEDDING or _BEFORE.search(name) or BRIDGE.search(name):
        return False
    return _AFTER.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a matrix of this name is a head, which may be tied to the embedding."""
    return kind_of(name, (2, 2)) is Kind.HEAD or _HEAD_TOO.search(name) is not None


def renamed(reference: Layout, other: Layout) -> dict[str, str]:
    """The other model's tensors under the reference's names, each with its own layer's number.

    Containers meet by name, else by what their layers hold; the words before a container that differ are taken off, or put before, in the
    loose tensors too (`h.0…` against `transformer.h.0…`, `model.layers…` against `model.language_model.layers…`). What has no counterpart then
    is looked up in the spellings that `checkpoint.names` knows.
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
    spellings = Names(reference.places)
    for name, said in list(found.items()):
        spelt = None if said in reference.places else spellings.find(said, leading=False)
        if spelt is not None and spelt not in found.values():
            found[name] = spelt
    return found


def _heads(mine: str, theirs: str) -> tuple[str, str]:
    """What stands before the common ending of two containers' names, each with its dot."""
    shared = _ending(mine, theirs)
    left, right = mine.split("."), theirs.split(".")
    return tuple("".join(f"{word}." for word in words[: len(words) - shared]) for words in (left, right))  # type: ignore[return-value]


def _ending(one: str, other: str) -> int:
    """How many words two names share at their ends."""
    return _beginning(one.split(".")[::-1], other.split(".")[::-1])


def _beginning(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two names share at their beginnings."""
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared
