"""The towers of a model as recipes call them, and how each is cut into slices of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thetau.checkpoint import Source
from thetau.errors import nearest
from thetau.recipes.mergekit.layout import Layout, is_after
from thetau.recipes.mergekit.schema import Module, Slice

_VISION = re.compile(r"vision|visual|image|vit(?:\.|$)", re.IGNORECASE)
_BRIDGE = re.compile(r"projector|merger|mm_|multi_modal|connector|resampler", re.IGNORECASE)
_VISION_NAMES = ("vision_tower", "vision_model", "vision_encoder", "vision", "visual")
_TEXT_NAMES = ("text_decoder", "text_model", "language_model", "text", "default")
_BRIDGE_NAMES = ("multi_modal_projector", "projector", "connector")


@dataclass(frozen=True)
class Tower:
    """A layered container with the loose tensors that belong to it; or loose ones alone, where `container` is None."""

    name: str
    container: str | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    tensors: tuple[str, ...]

    @property
    def sees(self) -> bool:
        """Whether it is one for images."""
        return _VISION.search(self.container or self.name) is not None


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
    loose = [name for name, place in layout.places.items() if place.container is None]
    apart: dict[str, list[str]] = {}
    for module in named:
        held = _apart(module, layout, loose)
        if module is not None and held:
            apart[module] = held
            loose = [name for name in loose if name not in held]
    main = next((container for container in layout.depth if not _VISION.search(container)), next(iter(layout.depth), None))
    owner = {name: _owner(name, layout, main) for name in loose}
    found = []
    containers: list[str | None] = [*layout.depth] or [None]
    for container in containers:
        mine = [name for name in loose if owner[name] == container]
        layered = [name for name, place in layout.places.items() if place.container is not None and place.container == container]
        found.append(_tower(container or "model", container, mine, layered, source))
    return [*found, *(_tower(name, None, held, [], source) for name, held in apart.items())]


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
        if name in (tower.name, tower.container) or (tower.container or "").startswith(f"{name.rstrip('.')}."):
            return [tower], None
    sees = [tower for tower in layered if tower.sees]
    reads = [tower for tower in layered if not tower.sees]
    for names, some in ((_VISION_NAMES, sees), (_TEXT_NAMES, reads)):
        if name in names and len(some) == 1:
            return some, None
    worded = [tower for tower in layered if name in (tower.container or "").split(".")]
    if len(worded) == 1:
        return worded, None
    known_names = [tower.name for tower in known]
    return [], f"no tower is called {name!r}.{nearest(name, known_names)} The model has {_names(known)}."


def _tower(name: str, container: str | None, loose: Sequence[str], layered: Sequence[str], source: Source) -> Tower:
    after = [one for one in loose if is_after(one, source.specs[one].shape)]
    before = [one for one in loose if one not in after]
    return Tower(name, container, tuple(before), tuple(after), (*before, *layered, *after))


def _apart(module: str | None, layout: Layout, loose: Sequence[str]) -> list[str]:
    """The loose tensors that a module without layers means."""
    if module is None or module in layout.depth:
        return []
    if module in _BRIDGE_NAMES:
        return [name for name in loose if _BRIDGE.search(name)]
    if any(module in container.split(".") for container in layout.depth):
        return []
    return [name for name in loose if name.split(".")[0] == module]


def _owner(name: str, layout: Layout, main: str | None) -> str | None:
    """The tower of a loose tensor: a tower for images has only what its words say."""
    if _VISION.search(name) or _BRIDGE.search(name):
        sees = [container for container in layout.depth if _VISION.search(container)]
        if sees and _VISION.search(name):
            return sees[0]
        return main
    found = layout.tower(name)
    return main if found is None or _VISION.search(found) else found


def _names(known: Sequence[Tower]) -> str:
    return ", ".join(repr(tower.name) for tower in known)
