"""The towers of a model as recipes call them, and how each is cut into slices of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from thetau.checkpoint import Source
from thetau.errors import nearest
from thetau.recipes.mergekit.layout import AUDIO, BRIDGE, VISION, Layout, Place, aside, is_after
from thetau.recipes.mergekit.schema import Module, Slice

SHARED = "shared"  # what several towers share: T5's embedding and its head
_NAMES = {
    "vision_tower": ("vision_tower", "vision_model", "vision_encoder", "vision", "visual"),
    "audio_tower": ("audio_tower", "audio_model", "audio_encoder", "audio"),
    "text_decoder": ("text_decoder", "text_model", "language_model", "text", "default"),
    "multi_modal_projector": ("multi_modal_projector", "projector", "connector"),
}


@dataclass(frozen=True)
class Tower:
    """A layered container with the loose tensors that belong to it; or loose ones alone, where `container` is None.

    `beyond` are those of `after` in layers behind the last one, with what their names are counted from.
    """

    name: str
    container: str | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    tensors: tuple[str, ...]
    beyond: Mapping[str, Place]

    @property
    def role(self) -> str:
        """What it is to the whole, in mergekit's words."""
        said = self.container or self.name
        kinds = {"multi_modal_projector": BRIDGE, "vision_tower": VISION, "audio_tower": AUDIO}
        return next((role for role, kind in kinds.items() if kind.search(said)), "text_decoder")


@dataclass(frozen=True)
class Layer:
    """One layer of the output: its slice, its depth t there, and the layer of each source."""

    slice: Slice
    t: float
    prefix: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A tower and the slices that its layers come from."""

    tower: Tower
    module: Module
    slices: tuple[Slice, ...]

    def placed(self, name: str) -> str:
        """What a loose tensor is called in the output: one behind the last layer stays behind it."""
        place = self.tower.beyond.get(name)
        if place is None:
            return name
        return f"{place.container}.{sum(1 for _ in self.layers()) + place.index}.{place.rest}"

    def layers(self) -> Iterator[Layer]:
        """The output's layers, in order."""
        number = 0
        for piece in self.slices:
            ranges = [one.layers or (0, 0) for one in piece.sources]
            count = ranges[0][1] - ranges[0][0] if self.tower.container is not None else 0
            for index in range(count):
                t = index / (count - 1) if count > 1 else 1.0
                yield Layer(piece, t, f"{self.tower.container}.{number}.", tuple(first + index for first, _ in ranges))
                number += 1


def towers(layout: Layout, source: Source, named: Sequence[str | None]) -> list[Tower]:
    """The towers of a model; loose tensors that a recipe names as a module of their own are one too."""
    loose: dict[str, list[str]] = {container: [] for container in layout.depth}
    for name, place in layout.places.items():
        if place.container is None:
            bridge = BRIDGE.search(name) is not None and any(aside(container) for container in layout.depth)
            home = _BRIDGE_NAME if bridge else layout.tower(name) or (SHARED if layout.depth else _ONLY)
            loose.setdefault(home, []).append(name)
    for module in named:
        held = _apart(module, layout, loose)
        if module is not None and held:
            loose = {owner: [name for name in mine if name not in held] for owner, mine in loose.items()}
            loose[module] = held
    found = []
    for owner, mine in loose.items():
        container = owner if owner in layout.depth else None
        layered = [name for name, place in layout.places.items() if container is not None and place.container == container]
        if mine or layered:
            found.append(_tower(owner, container, mine, layered, layout, source))
    return found


def chosen(name: str | None, known: Sequence[Tower], *, cut: bool) -> tuple[list[Tower], str | None]:
    """The towers that a module of the recipe means, or what is wrong with its name."""
    layered = [tower for tower in known if tower.container is not None]
    if name is None:
        if cut and len(layered) > 1:
            return [], f"the model has several towers ({_names(layered)}): cut them one by one, with `modules`."
        if cut and not layered:
            return [], "no layers are found in the names of the tensors, so nothing can be cut into slices."
        return list(known), None
    for tower in known:
        if name in (tower.name, tower.container):
            return _with_kin(tower, known), None
    for role, names in _NAMES.items():
        some = [tower for tower in known if tower.role == role and tower.name != SHARED]
        if name in names and some and (len(some) == 1 or role == _BRIDGE_NAME):
            return some, None
    beginning = [tower for tower in layered if (tower.container or "").startswith(f"{name.rstrip('.')}.")]
    worded = [tower for tower in layered if name in (tower.container or "").split(".")]
    for some in (beginning, worded):
        if len(some) == 1:
            return some, None
    return [], f"no tower is called {name!r}.{nearest(name, [tower.name for tower in known])} The model has {_names(known)}."


_BRIDGE_NAME = "multi_modal_projector"
_ONLY = "model"  # a model without layers


def _with_kin(tower: Tower, known: Sequence[Tower]) -> list[Tower]:
    """A bridge with the layers that are part of it."""
    return [one for one in known if one.role == _BRIDGE_NAME] if tower.name == _BRIDGE_NAME else [tower]


def _tower(
    owner: str, container: str | None, loose: Sequence[str], layered: Sequence[str], layout: Layout, source: Source
) -> Tower:
    after = [name for name in loose if name in layout.beyond or is_after(name, source.specs[name].shape)]
    before = [name for name in loose if name not in after]
    beyond = {name: layout.beyond[name] for name in after if name in layout.beyond}
    return Tower(owner, container, tuple(before), tuple(after), (*before, *layered, *after), beyond)


def _apart(module: str | None, layout: Layout, loose: Mapping[str, Sequence[str]]) -> list[str]:
    """The loose tensors that a module without layers means: those whose names begin with it."""
    words = {word for container in layout.depth for word in container.split(".")}
    if module is None or module in loose or module in words or any(module in names for names in _NAMES.values()):
        return []
    return [name for mine in loose.values() for name in mine if name.split(".")[0] == module]


def _names(known: Sequence[Tower]) -> str:
    return ", ".join(repr(tower.name) for tower in known)
