"""What each tensor of a checkpoint is: attention, MLP, embedding, and in which block; from its name, or from the model's module tree.

Names with the words that models use for their parts (`layer.3.attention…query`, `layers.0.mlp.fc1`) say it themselves, on any machine and
without any library. As soon as one name of a checkpoint leaves a doubt, the module tree of the model that its folder's config describes
decides; who builds live models brings it with `bring_tree`, so that this room needs no library of models. Without a tree the nearest
reading of the name is taken and called a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Literal, final

from thetau.checkpoint.naming import Kind, kind_of, layer_of, plain, weighed_left
from thetau.checkpoint.source import Source

Origin = Literal["name", "module tree", "guess"]
Tree = Callable[[Path, tuple[str, ...]], Mapping[str, tuple[Kind, int | None]]]


@final
@dataclass(frozen=True, kw_only=True)
class Role:
    """The part that a tensor plays, its block's number, and what that is told from."""

    kind: Kind
    layer: int | None
    origin: Origin


@final
@dataclass(kw_only=True)
class Roles:
    """The roles of one checkpoint's tensors.

    - `shapes`: of all its tensors, by name.
    - `folder`: where its config lies, None where there is none; then names decide alone.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    folder: Path | None = None

    @classmethod
    def of(cls, source: Source) -> Roles:
        """The roles of a source's tensors. Nothing is built as long as all its names are plain."""
        folder = source.folder
        known = folder is not None and (folder / "config.json").is_file()
        return cls(shapes={name: spec.shape for name, spec in source.specs.items()}, folder=folder if known else None)

    @cached_property
    def doubtful(self) -> bool:
        """Whether some name leaves a doubt: then the module tree decides about all the tensors that it knows."""
        return any(not plain(name, shape) for name, shape in self.shapes.items())

    @cached_property
    def tree(self) -> Mapping[str, tuple[Kind, int | None]]:
        """What the module tree knows, by the checkpoint's names; empty where there is no config or no library that reads it."""
        return {} if self.folder is None else _TREE.read(self.folder, tuple(self.shapes))

    def role(self, name: str, shape: tuple[int, ...]) -> Role:
        """What a tensor is, and how that is known."""
        if self.doubtful and name in self.tree:
            kind, layer = self.tree[name]
            return Role(kind=kind, layer=layer, origin="module tree")
        return Role(kind=kind_of(name, shape), layer=layer_of(name), origin="name" if plain(name, shape) else "guess")

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """The part that a tensor plays."""
        return self.role(name, shape).kind

    def layer(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The block's number, or None outside the blocks."""
        return self.role(name, shape).layer

    def weighed_left(self, name: str, shape: tuple[int, int]) -> bool:
        """`naming.weighed_left`, with the kind that is known here."""
        return weighed_left(name, shape, self.kind(name, shape))


class _Builder:
    """Who reads a config into a module tree: named as `module:function` and loaded at the first doubt."""

    def __init__(self) -> None:
        self._where: str | None = None

    def bring(self, where: str) -> None:
        self._where = where

    def read(self, folder: Path, names: tuple[str, ...]) -> Mapping[str, tuple[Kind, int | None]]:
        if self._where is None:
            return {}
        module, _, function = self._where.partition(":")
        build: Tree = import_module(module).__dict__[function]
        return build(folder, names)


_TREE = _Builder()


def bring_tree(where: str) -> None:
    """Say who builds module trees: `module:function` of (folder, the checkpoint's names) → name → kind and layer.

    The function returns an empty mapping where it cannot; it never raises for a config that it does not know.
    """
    _TREE.bring(where)
